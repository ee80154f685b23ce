"""MixtureOfExperts for many tokens: sorted by expert, multiplied on tensor cores, added up again.

Very many go one slice after the other, through the same workspace. A slice is large enough that reading the matrices
once for each is little beside its products, and a row's bits do not depend on the slice that it is in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

from runtime.kernels.cuda.launch import DeviceLimits, Kernel, Launcher
from runtime.kernels.cuda.mixture_decode import GATE_PARTS, UP_PARTS
from runtime.kernels.cuda.mixture_problem import ELEMENTS, MixtureProblem, MixtureTensors

TILES = (32, 64, 128)
"""Tokens in a tile. A row's bits do not depend on the tile."""
_TILE_WEIGHTS = 128
_DEPTH = 32
_TOGETHER = 16
_ALIGNMENT = 256
MOST_WORKSPACE = 256 << 20
"""Bytes, unless the least slice needs more."""
_LEAST_SLICE = 1024
_NO_MATRIX = (None, None, None)


class _RouteParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("expert", "weight", "list", "count")),
        *((name, ctypes.c_uint32) for name in ("assignments", "tokens")),
    ]


class _GemmParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source", *GATE_PARTS, *UP_PARTS, "result", "list", "count")),
        *((name, ctypes.c_uint32) for name in ("tokens", "experts", "per_row", "depth", "width")),
        *((name, ctypes.c_uint32) for name in ("together", "column_tiles", "block")),
    ]


class _CombineParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("product", "weight", "expert", "y")),
        *((name, ctypes.c_uint32) for name in ("top_k", "experts", "hidden_size")),
    ]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where in the workspace each intermediate begins, and its end."""

    list: int
    count: int
    hidden: int
    product: int
    end: int


def _places(problem: MixtureProblem) -> _Places:
    sizes = (
        problem.experts * problem.tokens * 4,
        problem.experts * 4,
        problem.assignments * problem.intermediate * 2,
        problem.assignments * problem.hidden * 4,
    )
    starts = [0]
    for size in sizes:
        starts.append(-(-(starts[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
    return _Places(*starts)


def _most_of_slice(problem: MixtureProblem) -> int:
    """Tokens for which MOST_WORKSPACE bytes are enough."""
    of_token = problem.experts * 4 + problem.top_k * (problem.intermediate * 2 + problem.hidden * 4)
    return max(_LEAST_SLICE, (MOST_WORKSPACE - problem.experts * 4 - 4 * _ALIGNMENT) // of_token)


def _slice_sizes(problem: MixtureProblem) -> list[int]:
    """Of how many tokens each slice is: alike, but for the last one."""
    slices = -(-problem.tokens // _most_of_slice(problem))
    each = -(-problem.tokens // slices)
    return [min(each, problem.tokens - begin) for begin in range(0, problem.tokens, each)]


def _slices(problem: MixtureProblem, tensors: MixtureTensors) -> Iterator[tuple[MixtureProblem, MixtureTensors]]:
    begin = 0
    for tokens in _slice_sizes(problem):
        chosen, row = begin * problem.top_k, begin * problem.hidden * 2
        yield (
            replace(problem, tokens=tokens),
            replace(
                tensors,
                x=tensors.x + row,
                weight=tensors.weight + 4 * chosen,
                expert=tensors.expert + 8 * chosen,
                y=tensors.y + row,
            ),
        )
        begin += tokens


def prefill_workspace_bytes(problem: MixtureProblem) -> int:
    """For a slice of n of the N tokens: lists int32 [E, n] with their lengths [E], hidden [n, K, I], products float32
    [n, K, C].

    Products are not rounded to the type of y before they are added: their traffic is small beside the weights', and
    the sum of K rounded ones would be off by K roundings.
    """
    return _places(replace(problem, tokens=min(problem.tokens, _most_of_slice(problem)))).end


def prefill_kernels(problem: MixtureProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """What `launch_prefill` launches, in order, each once."""
    sizes = _slice_sizes(problem)
    kernels = (_kernels(problem, limits, _tile(replace(problem, tokens=tokens))) for tokens in sizes)
    return tuple(dict.fromkeys(kernel for each in kernels for kernel in each))


def every_prefill_kernel(problem: MixtureProblem, limits: DeviceLimits) -> tuple[Kernel, ...]:
    """Those of any number of tokens."""
    return tuple(dict.fromkeys(kernel for tile in TILES for kernel in _kernels(problem, limits, tile)))


def _kernels(problem: MixtureProblem, limits: DeviceLimits, tile: int) -> tuple[Kernel, Kernel, Kernel, Kernel]:
    element = ELEMENTS[problem.element]
    common: dict[str, str | int] = {
        **problem.definitions,
        "TILE_ROWS": tile,
        "STAGES": _stages(problem, limits, tile),
    }
    return (
        Kernel("moe_route.cu", "moe_route"),
        Kernel("moe_gemm.cu", "moe_gemm", {**common, "GATED": 1, "GATED_BY": problem.activation}),
        Kernel("moe_gemm.cu", "moe_gemm", {**common, "GATED": 0}),
        Kernel("moe_combine.cu", "moe_combine", {"ELEMENT": element}),
    )


def _tile(problem: MixtureProblem) -> int:
    """The smallest that most experts fit into if tokens are spread evenly over them."""
    return next((tile for tile in TILES if 4 * problem.assignments <= 3 * tile * problem.experts), TILES[-1])


def _stage_bytes(problem: MixtureProblem, tile: int) -> int:
    bits = problem.packed.bits if problem.packed else 16
    return tile * _DEPTH * 2 + _TILE_WEIGHTS * _DEPTH * bits // 8


def _other_bytes(problem: MixtureProblem, tile: int) -> int:
    """A tile of unpacked weights, and which tokens the tile has."""
    return (_TILE_WEIGHTS * _DEPTH * 2 if problem.packed else 0) + 16 + 4 * tile


def _stages(problem: MixtureProblem, limits: DeviceLimits, tile: int) -> int:
    """Four, or three where two blocks would not fit beside each other; each takes 1 KiB more than it asks for."""
    half = (limits.shared_bytes + 1024) // 2 - 1024 - _other_bytes(problem, tile)
    return max(3, min(4, half // _stage_bytes(problem, tile)))


def launch_prefill(launcher: Launcher, problem: MixtureProblem, tensors: MixtureTensors) -> None:
    """Four launches for each slice."""
    for part, parts_tensors in _slices(problem, tensors):
        _launch_slice(launcher, part, parts_tensors)


def _launch_slice(launcher: Launcher, problem: MixtureProblem, tensors: MixtureTensors) -> None:
    """The grids are those of the worst routing: blocks without work leave at once."""
    tile = _tile(problem)
    places = _places(problem)
    lists, counts, hidden, product = (
        tensors.workspace + place for place in (places.list, places.count, places.hidden, places.product)
    )
    route, up, down, combine = _kernels(problem, launcher.limits, tile)
    launcher.launch(
        route,
        grid=(problem.experts, 1, 1),
        threads=256,
        shared_bytes=4 * 8,
        params=_RouteParams(tensors.expert, tensors.weight, lists, counts, problem.assignments, problem.tokens),
    )
    row_tiles = problem.assignments // tile + min(problem.experts, problem.assignments)
    together = min(_TOGETHER, row_tiles)
    row_tiles = -(-row_tiles // together) * together
    shared_bytes = _stages(problem, launcher.limits, tile) * _stage_bytes(problem, tile)
    shared_bytes += _other_bytes(problem, tile)
    gated_columns = -(-problem.intermediate // (_TILE_WEIGHTS // 2))
    launcher.launch(
        up,
        grid=(row_tiles * gated_columns, 1, 1),
        threads=128,
        shared_bytes=shared_bytes,
        params=_GemmParams(
            *(tensors.x, *tensors.gate_parts, *tensors.up_parts, hidden, lists, counts),
            *(problem.tokens, problem.experts, problem.top_k, problem.hidden, problem.intermediate),
            *(together, gated_columns, problem.block),
        ),
    )
    down_columns = -(-problem.hidden // _TILE_WEIGHTS)
    launcher.launch(
        down,
        grid=(row_tiles * down_columns, 1, 1),
        threads=128,
        shared_bytes=shared_bytes,
        params=_GemmParams(
            *(hidden, *tensors.down_parts, *_NO_MATRIX, product, lists, counts),
            *(problem.tokens, problem.experts, 1, problem.intermediate, problem.hidden),
            *(together, down_columns, problem.block),
        ),
    )
    launcher.launch(
        combine,
        grid=(problem.tokens, -(-problem.hidden // (8 * 128)), 1),
        threads=128,
        shared_bytes=0,
        params=_CombineParams(
            product, tensors.weight, tensors.expert, tensors.y, problem.top_k, problem.experts, problem.hidden
        ),
    )
