"""The reference with an ear at every module: what each of them gives out for one row, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reference.model import ContextLayer, refuse_beyond_limit
from reference.norm import RMSNorm
from reference.oracle import Oracle
from reference.rope import RotaryAngles
from reference.rounding import Rounding
from reference.torch_state import plain_torch
from reference.weights import EMBEDDING, LM_HEAD

Outputs = dict[str, Tensor]
"""Module path, such as `layers.2.self_attn.o_proj`, to what the module gave out: [T, features]."""


class WatchedOracle(Oracle):
    """Module outputs of a checkpoint in a dtype of choice, stage by stage: embedding, each layer, norm and head."""

    def stages(self, row: list[int], dtype: torch.dtype, rounding: Rounding | None = None) -> Iterator[Outputs]:
        """Yield the outputs of each stage of the model for one row of token ids, L + 2 stages in all.

        rounding: what is rounded on the way, as an engine does.
        A layer's own output is its last entry. Modules whose output is another's (`mlp` is its `down_proj`) are
        not listed twice. Raises InputError for a row beyond the config's position_limit.
        """
        config, rounding = self._checkpoint.config, rounding or Rounding()
        refuse_beyond_limit(config, len(row))
        with plain_torch():
            embedding = self._load(EMBEDDING, dtype)
            hidden_NC = embedding[torch.tensor(row, dtype=torch.int64)]
            del embedding
        yield {"embed_tokens": hidden_NC}
        for index in range(config.num_layers):
            outputs = self._layer(index, hidden_NC, dtype, rounding)
            hidden_NC = outputs[f"layers.{index}"]
            yield outputs
            del outputs
        with plain_torch():
            norm = RMSNorm(config.hidden_size, config.norm_eps, device="meta", dtype=dtype)
            self._fill(norm, "norm.", dtype)
            tied = config.tie_word_embeddings and LM_HEAD not in self._replaced
            head = self._load(EMBEDDING if tied else LM_HEAD, dtype)
            normed_NC = norm(hidden_NC)
            logits_NV = rounding.of(LM_HEAD)(normed_NC) @ head.T
        yield {"norm": normed_NC, "lm_head": logits_NV}

    @plain_torch()
    def _layer(self, index: int, hidden_NC: Tensor, dtype: torch.dtype, rounding: Rounding) -> Outputs:
        """One layer over the whole row, with a forward hook on each of its modules that is called."""
        config = self._checkpoint.config
        layer = ContextLayer(config, index, device="meta", dtype=dtype)
        prefix = f"layers.{index}"
        self._fill(layer, f"{prefix}.", dtype)
        rounding.apply(layer, f"{prefix}.")
        outputs: Outputs = {}

        def listen(path: str, module: nn.Module) -> None:
            def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                outputs[path] = output.reshape(hidden_NC.shape[0], -1)  # a norm of heads gives [1, T, H, D]

            module.register_forward_hook(note)

        for name, module in layer.named_modules():
            if name and name != "mlp":
                listen(f"{prefix}.{name}", module)
        position_BT = torch.arange(hidden_NC.shape[0])[None]
        cos_sin = RotaryAngles(config.rope, config.head_dim)(position_BT, dtype)
        out_NC = layer(hidden_NC, position_BT, *cos_sin)
        return outputs | {prefix: out_NC}
