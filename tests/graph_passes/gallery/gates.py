"""What the spellings of a mixture's gate share: sizes, shapes, and the renormalisation."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

E, K = 8, 3
Gate = Callable[..., tuple[Tensor, Tensor]]
"""From logits to weights and expert numbers."""

Shape = tuple[str | int, ...]
FLAT: Shape = ("N", E)
ROWS: Shape = ("B", "T", E)


def share(best: Tensor) -> Tensor:
    """Divided by their sum."""
    return best / best.sum(-1, keepdim=True)
