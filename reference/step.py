"""One step of the rolling engine in plain PyTorch: the form that is traced.

The same modules as `reference.model`, but keys and values live in rings. It is written in elementary operators on
purpose; the passes recognise their meaning and turn them into plugin nodes.

Shapes: B rows, T new tokens of each row, R of them whose logits are asked for, S ring slots, H query heads, G key and
value heads, D head dim, C hidden size, N = B·T, V vocabulary.

A worked example of the ring, S = 6, one row that holds 8 tokens and receives 3 more, of which the third is padding:

    start 8, count 2, last = 8 + 2 − 1 = 9
    positions of the chunk      8  9  10      slots (mod 6)  2  3  4     the third writes back what slot 4 holds
    slot                        0  1  2  3  4  5
    last − ((last − slot) mod 6)  6  7  8  9  4  5

so that slot 2 holds position 8, slot 3 position 9, and slots 4 and 5 still hold positions 4 and 5. A row that is
younger than its ring gives negative positions for the slots that were never written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.attention import attend, visible_pairs
from reference.model import Decoder, DecoderLayer


def modulo(x: Tensor, divisor: int) -> Tensor:
    """x mod divisor, never negative. A tensor divisor, since the ONNX exporter takes no symbolic size as a scalar."""
    return torch.remainder(x, torch.full((1,), divisor, dtype=x.dtype, device=x.device))


def slot_positions(start_B: Tensor, count_B: Tensor, slots: int) -> Tensor:
    """Absolute position that each slot holds after this step's write, int64 [B, S]; negative where empty."""
    last_B1 = (start_B + count_B - 1)[:, None]
    slot_S = torch.arange(slots, device=start_B.device)[None]
    return last_B1 - modulo(last_B1 - slot_S, slots)


def write_ring(ring_BGSD: Tensor, new_BGTD: Tensor, position_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """The ring with token t of row b in slot position[b, t] mod S. Padding writes back what the slot holds."""
    slot_BGTD = modulo(position_BT, ring_BGSD.shape[2])[:, None, :, None].expand_as(new_BGTD)
    kept_BGTD = ring_BGSD.gather(2, slot_BGTD)
    return ring_BGSD.scatter(2, slot_BGTD, torch.where(valid_BT[:, None, :, None], new_BGTD, kept_BGTD))


def states_at(x_NC: Tensor, position_BR: Tensor) -> Tensor:
    """Of the hidden states of B rows of T tokens those of token position[b, r] of each row: [B·R, C].

    position_BR: int64, 0 <= t < T. R may be 0.
    """
    batch = position_BR.shape[0]
    row_B1 = torch.arange(batch, device=x_NC.device)[:, None]
    return x_NC.index_select(0, (row_B1 * (x_NC.shape[0] // batch) + position_BR).view(-1))


class RingLayer(DecoderLayer):
    """A decoder layer whose keys and values live in rings."""

    def forward(
        self,
        x_NC: Tensor,
        start_B: Tensor,
        count_B: Tensor,
        position_BT: Tensor,
        valid_BT: Tensor,
        cos_BTd: Tensor,
        sin_BTd: Tensor,
        key_ring: Tensor,
        value_ring: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, C] after the layer, and its rings [B, G, S, D] rolled on."""
        B, T = position_BT.shape
        query, key, value = self.self_attn.project(self.input_layernorm(x_NC), B, T)
        query, key = self.self_attn.place(query, key, position_BT, cos_BTd, sin_BTd)
        key_ring = write_ring(key_ring, key, position_BT, valid_BT)
        value_ring = write_ring(value_ring, value, position_BT, valid_BT)
        held_BS = slot_positions(start_B, count_B, key_ring.shape[2])
        visible = visible_pairs(position_BT, held_BS, self.window)
        x_NC = x_NC + self.self_attn.combine(attend(query, key_ring, value_ring, visible, self.self_attn.scale))
        normed_NC = self.post_attention_layernorm(x_NC)
        x_NC = x_NC + (self.moe.forward_dense(normed_NC) if self.is_moe else self.mlp(normed_NC))
        return x_NC, key_ring, value_ring


class Step(Decoder):
    """Feeds up to T tokens a row and rolls the rings on.

    A ring must hold window + T − 1 positions, since the chunk is written before it is attended to: the chunk's first
    token still needs the window − 1 tokens before it when the chunk's last one is already in place.
    """

    layer_class = RingLayer

    def forward(
        self,
        input_ids_BT: Tensor,
        start_B: Tensor,
        count_B: Tensor,
        logit_position_BR: Tensor,
        rings: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, R, V] and the rings, key and value [B, G, S, D] for each layer.

        logit_position_BR: int64, the tokens t of each row's chunk, 0 <= t < T, whose logits are wanted; those of
        padding mean nothing. The final norm and the head see no other token.
        """
        B, T = input_ids_BT.shape
        offset_1T = torch.arange(T, device=input_ids_BT.device)[None]
        position_BT, valid_BT = start_B[:, None] + offset_1T, offset_1T < count_B[:, None]
        x_NC = self.embed_tokens(input_ids_BT).view(B * T, -1)
        cos_BTd, sin_BTd = self.rotary(position_BT, x_NC.dtype)
        rolled = []
        for layer, (key_ring, value_ring) in zip(self.layers, rings, strict=True):
            x_NC, key_ring, value_ring = layer(
                x_NC, start_B, count_B, position_BT, valid_BT, cos_BTd, sin_BTd, key_ring, value_ring
            )
            rolled.append((key_ring, value_ring))
        R = logit_position_BR.shape[1]
        return self.logits(states_at(x_NC, logit_position_BR)).view(B, R, self.config.vocab_size), rolled
