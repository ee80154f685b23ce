"""What a parameter is made of, and what making it takes: the plan that `exporter.recipes` turns into nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graph_passes.lower.formats import TYPES, packed_name, scale_name, zero_name


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Where a piece of a parameter lies: `nbytes` bytes of type `dtype` (a key of TYPES) in the file `location`."""

    location: str
    offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a parameter of shape `shape` is made of: pieces of equal shape, one after the other along axis 0.

    pairs_of_head: see `WeightSource`. widened: whether it is float32 for the graph, whatever the pieces are.
    """

    parameter: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]
    pairs_of_head: int | None = None
    widened: bool = False

    @property
    def dtype(self) -> str:
        """The type in which the graph has the parameter, a key of TYPES.

        A matrix that is stored in one type throughout has that one; norms, biases and mixtures of types are float32.
        """
        types = {"F32"} if self.widened else {piece.dtype for piece in self.pieces}
        return types.pop() if len(types) == 1 and (len(self.shape) > 1 or types == {"U8"}) else "F32"

    @property
    def is_plain(self) -> bool:
        """Whether the parameter lies in one piece and in the graph's type: an initializer, which needs no nodes."""
        return len(self.pieces) == 1 and self.pieces[0].dtype == self.dtype and self.pairs_of_head is None

    @property
    def made_bytes(self) -> int:
        """What the recipe's result takes in memory when an engine makes it once and keeps it; 0 for a plain one."""
        return 0 if self.is_plain else int(math.prod(self.shape) * TYPES[self.dtype].itemsize)

    @property
    def making_bytes(self) -> int:
        """What all of the recipe's steps give out together, which engines hold until the whole graph is folded."""
        types = {piece.dtype for piece in self.pieces}
        steps = (len(self.pieces) > 1) + (self.pairs_of_head is not None)
        if len(types) > 1:  # every piece is widened first
            return (steps + 1) * self.made_bytes
        stored = sum(piece.nbytes for piece in self.pieces)
        return steps * stored + (self.made_bytes if types != {self.dtype} else 0)

    @property
    def folded_bytes(self) -> int:
        """What the parameter takes in memory where function bodies run, which widen every matrix to float32."""
        if self.dtype == "U8":
            return math.prod(self.shape)  # put in another order for the kernels of MatMulNBits
        return 0 if self.is_plain and self.dtype == "F32" else 4 * math.prod(self.shape)

    @property
    def folding_bytes(self) -> int:
        """As `making_bytes`, where function bodies run.

        The body of MixtureOfExperts multiplies with its matrices turned around, which is one more step.
        """
        stored = sum(piece.nbytes for piece in self.pieces)
        before = (len(self.pieces) > 1) + (self.pairs_of_head is not None)
        turned = 4 * math.prod(self.shape) if len(self.shape) == 3 and self.dtype != "U8" else 0
        return before * stored + self.folded_bytes + turned


def with_equal_experts(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes, with the three stacks of a layer's experts widened where their types differ: one node reads them."""
    types: dict[str, set[str]] = {}
    for recipe in recipes:
        if (layer := _experts_of(recipe)) is not None:
            types.setdefault(layer, set()).add(recipe.dtype)
    unequal = {layer for layer, found in types.items() if len(found) > 1}
    return [replace(recipe, widened=True) if _experts_of(recipe) in unequal else recipe for recipe in recipes]


def _experts_of(recipe: Recipe) -> str | None:
    """The layer's `moe` of a stack of matrices; None for all else, and for the parts of a quantised stack."""
    parts = tuple(name("") for name in (packed_name, scale_name, zero_name))
    if len(recipe.shape) != 3 or recipe.parameter.endswith(parts):
        return None
    return recipe.parameter.rpartition(".")[0]
