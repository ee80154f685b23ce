"""What a runtime must bind for a graph whose attention was lowered, and the names that it knows things by.

`runtime.step_engine_info` says the same of a built engine; a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

PREFILL, DECODE = "prefill", "decode"
"""Steps of many tokens, and of a single one."""

PAGE = 256
"""Slots of a page of the scratch memory. FlashAttention reads pages of 256 at every head dim."""

BOUNDS = "attention_bounds"
"""Input int32 [2] in the host's memory: bounds of a row's new tokens T, and of its keys in the scratch memory, of which
there are min(start, W − 1) + T. PagedAttention sizes its launches by them; too much is harmless, too little is not."""


@dataclass(frozen=True, slots=True)
class Ring:
    """KV rings of a layer, [B, S, G·D] each, by the names of the graph's inputs and outputs: past and present are one.

    slots: S. window: None where the layer sees all positions; otherwise it is S.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    slots: int
    window: int | None


@dataclass(frozen=True, slots=True)
class ScratchMemory:
    """One buffer for keys and one for values, [B · slots / PAGE, PAGE, G, D] each.

    slots: of a row, a multiple of PAGE. keys, values: outputs of the graph that must all be bound to them.
    """

    slots: int
    keys: tuple[str, ...]
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """rings: in the order of the layers. scratch: what layers with a window use in turn in a step of many tokens."""

    rings: tuple[Ring, ...]
    scratch: ScratchMemory | None
