"""How far a text may go: past none of the limits of a bundle's buffers, of its model, and of float32."""

from __future__ import annotations

from runtime.errors import ContextError
from runtime.manifest import KVInfo

MAX_POSITION = 2**24
"""First position that RoPE in float32 cannot tell from its neighbours: float32 holds integers exactly up to 2**24."""


def check_end(kv: KVInfo, row: int, position: int, fed: int, new_tokens: int) -> None:
    """Raise ContextError when a row at `position` has no room for `fed` tokens and `new_tokens` after them."""
    context, end, limit = kv.context, position + fed + new_tokens, kv.position_limit
    wanted = f"{fed} more" + (f" and then {new_tokens} generated ones" if new_tokens else "")
    if context is not None and end > context:
        raise ContextError(
            f"Row {row} holds {position} tokens and {wanted} would make {end}, but the full-attention layers of "
            f"this bundle have room for {context}. Feed or generate fewer tokens, call reset(), or export the "
            f"checkpoint again with context={end}."
        )
    if limit is not None and end > limit:
        raise ContextError(
            f"Row {row} holds {position} tokens and {wanted} would make {end}, but this model has dynamic RoPE: "
            f"from position {limit} on its frequencies depend on the length of the whole text, so that keys in the "
            "buffers would have to be rotated again with every token. Feed or generate fewer tokens, or call "
            "reset() and start a new text."
        )
    if end > MAX_POSITION:
        raise ContextError(
            f"Row {row} holds {position} tokens and {wanted} would make {end}, but positions from {MAX_POSITION} "
            "on cannot be told apart by rotary embeddings in float32. Call reset() and start a new text."
        )
