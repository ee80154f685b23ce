"""The weights of an engine out of the bundle's files, by their expressions: bytes in order, no more and no fewer than
their shapes and types take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from runtime.bundle import Bundle
from runtime.engine_info import EngineWeight
from runtime.errors import BundleError
from runtime.weight_expression import Bytes, Files, pieces

LOADING = "weights to the GPU"
"""The stage that is reported while weights are brought there, in bytes."""

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "U8": 8, "I8": 8, "I4": 4, "I64": 64}
"""Of a number of each type that engines read."""


class WeightsOf(Protocol):
    """What is read of an engine.json, whatever backend it is for."""

    @property
    def name(self) -> str: ...

    @property
    def orders(self) -> Mapping[str, tuple[int, ...]]: ...


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; numbers of 4 bits lie two in a byte."""
    return -(-math.prod(shape) * BITS[dtype] // 8)


def weight_bytes(info: WeightsOf, weight: EngineWeight) -> int:
    """Bytes of a weight. Raises BundleError for a type that is not known."""
    if weight.dtype not in BITS:
        raise BundleError(
            f"The weight {weight.name} of the engine {info.name} is of the type {weight.dtype!r}, which this Cierzo "
            "does not know. Build the engine again with `cierzo build`."
        )
    return nbytes_of(weight.dtype, weight.shape)


def whole_weight(bundle: Bundle, info: WeightsOf, weight: EngineWeight) -> Bytes:
    """All bytes of a weight; mapped, not copied, where they lie in a file as they are. Raises as `whole_pieces`."""
    found = list(whole_pieces(bundle, info, weight))
    return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint8), *found])


def whole_pieces(bundle: Bundle, info: WeightsOf, weight: EngineWeight) -> Iterator[Bytes]:
    """The bytes of a weight in order, each piece done with before the next is asked for.

    Raises BundleError, at the latest behind the last, if they are not as many as its shape and type take, and for files
    that are none of the bundle's, too short or gone.
    """
    expected, found = weight_bytes(info, weight), 0
    for piece in pieces(weight.expression, _files(bundle, info), info.orders):
        found += piece.nbytes
        if found > expected:
            break
        yield piece
    if found != expected:
        raise BundleError(
            f"The weight {weight.name} of the engine {info.name} takes {expected} bytes, and what it is made of has "
            f"{'more' if found > expected else found}: the engine was built of another bundle. Build it again with "
            "`cierzo build`."
        )


def _files(bundle: Bundle, info: WeightsOf) -> Files:
    def place(name: str) -> Path:
        if name not in bundle.manifest.weights.files and name not in bundle.manifest.files:
            raise BundleError(
                f"The engine {info.name} reads its weights from {name!r}, which is no file of the bundle "
                f"{bundle.path}. Build it again with `cierzo build`."
            )
        return bundle.file(name)

    return place
