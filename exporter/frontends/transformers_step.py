"""One step of the rolling engine with a decoder of `transformers` inside, which is left as it is.

The decoder takes three things from its caller: positions, a mask, and a cache object. Ours are those of the reference:
absolute positions, the pairs that `reference.attention` makes visible, and rings that `reference.step` writes. What it
has no word for is which tokens of each row are asked for, and so its final norm is handed those only, as in the
reference. Nothing here imports `transformers`.

Shapes: B rows, T new tokens of each row, R of them whose logits are asked for, S ring slots, G key and value heads,
D head dim, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference.attention import visible_pairs
from reference.step import slot_positions, states_at, write_ring

Rings = list[tuple[Tensor, Tensor]]
_FINAL_NORM = "model.norm"
"""Path of the decoder's last module before its head."""


class RingCache:
    """Stands for a cache of `transformers`: `update` writes into the layer's rings and returns them whole."""

    is_compileable = True

    def __init__(self, rings: Rings, position_BT: Tensor, valid_BT: Tensor) -> None:
        self.rings = list(rings)
        self._position_BT, self._valid_BT = position_BT, valid_BT

    def update(
        self, key_BGTD: Tensor, value_BGTD: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """The rings [B, G, S, D] of layer `layer_idx`, rolled on."""
        key_ring, value_ring = (
            write_ring(ring, new, self._position_BT, self._valid_BT)
            for ring, new in zip(self.rings[layer_idx], (key_BGTD, value_BGTD), strict=True)
        )
        self.rings[layer_idx] = (key_ring, value_ring)
        return key_ring, value_ring


class TransformersStep(nn.Module):
    """`reference.step.Step` by another decoder: feeds up to T tokens a row and rolls the rings on.

    decoder: a causal language model of `transformers`.
    windows: W or None for each of its layers.
    additive: whether its attention adds the mask to the scores (eager) or takes it as a boolean (sdpa).
    layer_types: for each layer the name under which the decoder looks up its mask; None where there is one layer, and
        one mask.
    """

    def __init__(
        self, decoder: nn.Module, windows: Sequence[int | None], *, additive: bool, layer_types: Sequence[str] | None
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self._windows, self._additive = tuple(windows), additive
        self._layer_types = tuple(layer_types) if layer_types is not None else None

    def forward(
        self,
        input_ids_BT: Tensor,
        start_B: Tensor,
        count_B: Tensor,
        logit_position_BR: Tensor,
        rings: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, R, V] and the rings, key and value [B, G, S, D] for each layer; see `reference.step.Step`."""
        offset_1T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
        position_BT, valid_BT = start_B[:, None] + offset_1T, offset_1T < count_B[:, None]
        masks = []
        for (key_ring, _), window in zip(rings, self._windows, strict=True):
            held_BS = slot_positions(start_B, count_B, key_ring.shape[2])
            masks.append(self._mask(visible_pairs(position_BT, held_BS, window)))
        cache: Any = RingCache(rings, position_BT, valid_BT)

        def asked_for(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x_BTC = inputs[0]
            B, R = logit_position_BR.shape
            return (states_at(x_BTC.flatten(0, 1), logit_position_BR).view(B, R, x_BTC.shape[2]), *inputs[1:])

        hook = self.decoder.get_submodule(_FINAL_NORM).register_forward_pre_hook(asked_for)
        try:
            output = self.decoder(
                input_ids=input_ids_BT,
                attention_mask=masks[0]
                if self._layer_types is None
                else dict(zip(self._layer_types, masks, strict=True)),
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            hook.remove()
        return output.logits, cache.rings

    def _mask(self, visible_B1TS: Tensor) -> Tensor:
        """A hidden score falls to the lowest finite number, and a row that sees nothing (padding) stays finite."""
        if not self._additive:
            return visible_B1TS
        return torch.where(visible_B1TS, 0.0, torch.finfo(torch.float32).min)
