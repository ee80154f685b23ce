"""The prompt lengths at which engines go wrong."""

from __future__ import annotations

from runtime.session import Session


def boundary_lengths(session: Session, windows: tuple[int | None, ...]) -> list[int]:
    """Prompt lengths on every border: W − 1, W, W + 1, 2W + 1, 3W + C for each window; C ± 1 and the context's end."""
    kv = session.manifest.kv
    lengths = {1, 2, kv.chunk - 1, kv.chunk, kv.chunk + 1, 2 * kv.chunk + 1}
    for window in windows:
        if window is not None:
            lengths |= {window - 1, window, window + 1, 2 * window + 1, 3 * window + kv.chunk}
    end = last_position(session)
    if end is not None:
        lengths = {min(length, end) for length in (*lengths, end)}
    return sorted(length for length in lengths if length >= 1)


def last_position(session: Session) -> int | None:
    """How many tokens a row may hold at most, for its buffers or for its RoPE; None: any number."""
    kv = session.manifest.kv
    return min((end for end in (kv.context, kv.position_limit) if end is not None), default=None)
