"""Runs the reference model over rows of tokens, one layer in memory at a time.

The whole model in float64 would need eight bytes a parameter; this needs them for the largest layer only, and so a
model can be validated on a machine that could never hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from reference.checkpoint import Checkpoint
from reference.model import ContextLayer, refuse_beyond_limit
from reference.norm import RMSNorm
from reference.rope import RotaryAngles
from reference.rounding import Rounding
from reference.torch_state import plain_torch
from reference.weights import EMBEDDING, LM_HEAD, Source, bind, load_parameter

Progress = Callable[[str, int, int], None]


Load = Callable[[torch.dtype], Tensor]
OnLayer = Callable[[int, ContextLayer], None]


class Oracle:
    """Full-context logits of a checkpoint in a dtype of choice; float64 is taken as the truth.

    replaced: parameters that are not the checkpoint's but something else's, such as its quantised weights as numbers.
        An output projection of its own may be among them where the checkpoint's is tied to the embedding.
    """

    def __init__(self, checkpoint: Checkpoint, replaced: Mapping[str, Load] | None = None) -> None:
        self._checkpoint = checkpoint
        self._replaced = dict(replaced or {})
        self._sources: Mapping[str, Source] = bind(checkpoint)

    @plain_torch()
    def logits(
        self,
        rows: Sequence[Sequence[int]],
        dtype: torch.dtype,
        progress: Progress | None = None,
        *,
        rounding: Rounding | None = None,
        wanted: Sequence[Sequence[int]] | None = None,
        first_position: int = 0,
        on_layer: OnLayer | None = None,
    ) -> list[Tensor]:
        """Logits [T, V] in `dtype` for each row of token ids, computed layer by layer over all rows.

        rounding: what is rounded on the way, as an engine does.
        wanted: for each row the indices of the tokens whose logits are made, [R, V] then; None for all.
        first_position: of the first token of every row; what lies before it is not seen.
        on_layer: called with each layer before it runs, for whoever listens to its modules.
        Raises InputError for rows beyond the config's position_limit.
        """
        config, rounding = self._checkpoint.config, rounding or Rounding()
        refuse_beyond_limit(config, first_position + max((len(row) for row in rows), default=0))
        embedding = self._load(EMBEDDING, dtype)
        hidden = [embedding[torch.tensor(list(row), dtype=torch.int64)] for row in rows]
        tied = config.tie_word_embeddings and LM_HEAD not in self._replaced
        if not tied:
            del embedding  # it takes as much as a layer of a large model
        positions = [first_position + torch.arange(len(row))[None] for row in rows]
        rotary = RotaryAngles(config.rope, config.head_dim)
        angles = [rotary(position, dtype) for position in positions]
        for index in range(config.num_layers):
            layer = ContextLayer(config, index, device="meta", dtype=dtype)
            self._fill(layer, f"layers.{index}.", dtype)
            rounding.apply(layer, f"layers.{index}.")
            if on_layer is not None:
                on_layer(index, layer)
            hidden = [
                layer(x_NC, position, *cos_sin)
                for x_NC, position, cos_sin in zip(hidden, positions, angles, strict=True)
            ]
            if progress is not None:
                progress(f"reference in {str(dtype).removeprefix('torch.')}", index + 1, config.num_layers)
        norm = RMSNorm(config.hidden_size, config.norm_eps, device="meta", dtype=dtype)
        self._fill(norm, "norm.", dtype)
        if wanted is not None:
            hidden = [
                x_NC[torch.tensor(list(some), dtype=torch.int64)] for x_NC, some in zip(hidden, wanted, strict=True)
            ]
        head, rounded = embedding if tied else self._load(LM_HEAD, dtype), rounding.of(LM_HEAD)
        return [rounded(norm(x_NC)) @ head.T for x_NC in hidden]

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter as this runs it; of a tied model the output projection is the embedding."""
        tied = name == LM_HEAD and name not in self._replaced and self._checkpoint.config.tie_word_embeddings
        return self._load(EMBEDDING if tied else name, dtype)

    def _load(self, name: str, dtype: torch.dtype) -> Tensor:
        if name in self._replaced:
            return self._replaced[name](dtype)
        return load_parameter(self._checkpoint, self._sources[name], dtype)

    def _fill(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        state = {name: self._load(prefix + name, dtype) for name, _ in module.named_parameters()}
        module.load_state_dict(state, assign=True)
