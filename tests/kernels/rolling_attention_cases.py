"""Cases of RollingAttention and RollingAttentionInt8, for this process's level of instructions.

Truth is numpy in float64 over the positions that a token sees, each key and value looked up either among the step's own
tokens or in the ring as it was before the step. What the ring holds after it is compared bit by bit.
Where the node allows rounding, what differs from the node that does not is within the bound for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from reference.parity import budget, position_errors
from tests.kernels import rolling_attention_rounding as rounding
from tests.support.kernels import Array, Node, main

Floats = npt.NDArray[np.float32]
FLOAT, HALF, INT8 = "float32", "float16", "int8"
KINDS = (FLOAT, HALF, INT8)
RINGS = {"present_key": "past_key", "present_value": "past_value"}
SCALES = {"present_key_scale": "past_key_scale", "present_value_scale": "past_value_scale"}


@dataclass(frozen=True, slots=True)
class Case:
    """starts, steps: where each row begins, and the counts of the rows in each step, padded to `tokens`."""

    window: int
    starts: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    slots: int
    tokens: int
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    interleaved: int = 0
    in_place: bool = True
    threads: int = 1
    magnitude: float = 1.0
    rounds: int | None = None

    @property
    def attributes(self) -> dict[str, int | float]:
        rounds = {} if self.rounds is None else {"rounds": self.rounds}
        return {"scale": self.head_dim**-0.5, "window": self.window, "interleaved": self.interleaved, **rounds}


def inputs_of(case: Case, kind: str, rng: np.random.Generator) -> dict[str, Array | None]:
    """A step's inputs; the ring holds something everywhere."""
    B, T, H, G, D, S = len(case.starts), case.tokens, case.heads, case.kv_heads, case.head_dim, case.slots
    angle = rng.uniform(0, 2 * np.pi, (B, T, D // 2))
    ring = rng.standard_normal((2, B, G, S, D)).astype(np.float32)
    inputs: dict[str, Array | None] = {
        "query": case.magnitude * rng.standard_normal((B, T, H, D), dtype=np.float32),
        "key": case.magnitude * rng.standard_normal((B, T, G, D), dtype=np.float32),
        "value": rng.standard_normal((B, T, G, D), dtype=np.float32),
        "cos": np.cos(angle).astype(np.float32),
        "sin": np.sin(angle).astype(np.float32),
    }
    if kind == INT8:
        inputs["past_key"], inputs["past_value"] = rng.integers(-127, 128, (2, B, G, S, D), dtype=np.int8)
        inputs["past_key_scale"], inputs["past_value_scale"] = rng.random((2, B, G, S), dtype=np.float32) / 64
    else:
        inputs["past_key"], inputs["past_value"] = ring.astype(kind)
    inputs["start"] = np.array(case.starts, np.int64)
    inputs["count"] = np.zeros(B, np.int64)
    return inputs


def node_of(case: Case, kind: str, inputs: dict[str, Array | None]) -> Node:
    outputs: dict[str, npt.DTypeLike] = {"attended": np.float32, "present_key": kind, "present_value": kind}
    if kind == INT8:
        outputs |= {"present_key_scale": np.float32, "present_value_scale": np.float32}
    op = "RollingAttentionInt8" if kind == INT8 else "RollingAttention"
    return Node(op, inputs, outputs, case.attributes, threads=case.threads)


def rotated(case: Case, x_BTHD: Array, cos_BTd: Array, sin_BTd: Array, dtype: str = "float64") -> Array:
    """Rotary embedding in this precision."""
    wide, half = x_BTHD.astype(dtype), case.head_dim // 2
    low, high = (wide[..., 0::2], wide[..., 1::2]) if case.interleaved else (wide[..., :half], wide[..., half:])
    cos, sin = cos_BTd[:, :, None].astype(dtype), sin_BTd[:, :, None].astype(dtype)
    turned = (low * cos - high * sin, high * cos + low * sin)
    return np.stack(turned, -1).reshape(wide.shape) if case.interleaved else np.concatenate(turned, -1)


def stored(kind: str, x: Floats) -> tuple[Array, Floats | None]:
    """What a ring of this kind holds of float32 vectors, and its scales."""
    if kind != INT8:
        return x.astype(kind), None
    scale = (np.abs(x).max(-1) / np.float32(127)).astype(np.float32)
    divisor = np.where(scale == 0, np.float32(1), scale)[..., None]
    return np.rint(x / divisor).astype(np.int8), scale


def written(case: Case, past: Array, new_BTG: Array, start: Array, count: Array) -> Array:
    """The ring after the step."""
    ring = past.copy()
    for b in range(len(start)):
        for t in range(int(count[b])):
            ring[b, :, (int(start[b]) + t) % case.slots] = new_BTG[b, t]
    return ring


def seen(case: Case, position: int) -> Array:
    """The slots of the positions that the token at this one sees."""
    first = 0 if case.window == 0 else max(0, position - case.window + 1)
    return np.arange(first, position + 1) % case.slots


def attended(case: Case, query: Array, key: Array, value: Array, start: Array, count: Array, dtype: str) -> list[Array]:
    """[H, D] of every token that counts, from rings after the step, in this precision."""
    results = []
    for b in range(len(start)):
        for t in range(int(count[b])):
            position = int(start[b]) + t
            slots = seen(case, position)
            group = case.heads // case.kv_heads
            k = np.repeat(key[b][:, slots].astype(dtype), group, 0)
            v = np.repeat(value[b][:, slots].astype(dtype), group, 0)
            score = np.einsum("hd,hsd->hs", query[b, t].astype(dtype), k) * np.dtype(dtype).type(case.head_dim**-0.5)
            weight = np.exp(score - score.max(-1, keepdims=True))
            results.append(np.einsum("hs,hsd->hd", weight / weight.sum(-1, keepdims=True), v))
    return results


def check(case: Case, kind: str) -> None:
    """All steps of the case, on a ring that rolls on."""
    rng = np.random.default_rng(5)
    inputs = inputs_of(case, kind, rng)
    node = node_of(case, kind, inputs)
    turned = replace(case, steps=(), slots=max(case.slots, case.tokens), window=0, starts=(0,) * len(case.starts))
    for index, counts in enumerate(case.steps):
        fresh = inputs_of(case, kind, np.random.default_rng([7, index]))
        inputs |= {name: fresh[name] for name in ("query", "key", "value", "cos", "sin")}
        inputs["count"] = np.array(counts, np.int64)
        aliases = RINGS | (SCALES if kind == INT8 else {})
        outputs = node.run(inputs, in_place=aliases if case.in_place else None)
        if case.rounds:
            plain = node_of(replace(case, rounds=0), kind, inputs).run(inputs)
            _check_step(case, kind, turned, inputs, plain)
            _check_rounded(case, kind, inputs, outputs, plain)
        else:
            _check_step(case, kind, turned, inputs, outputs)
        inputs |= {past: outputs[present] for present, past in aliases.items()}
        start, count = inputs["start"], inputs["count"]
        assert start is not None
        assert count is not None
        inputs["start"] = start + count


def _check_step(
    case: Case, kind: str, turned: Case, inputs: dict[str, Array | None], outputs: dict[str, Array]
) -> None:
    present = {name: array for name, array in inputs.items() if array is not None}
    start, count = present["start"], present["count"]
    key64 = rotated(case, present["key"], present["cos"], present["sin"])
    key32 = _turned_by_kernel(turned, present)
    products = np.abs(present["key"]).max() * 2 * np.finfo(np.float32).eps
    assert np.abs(key64 - key32).max(initial=0.0) <= products, "rotated keys"
    for name, new in (("key", key32), ("value", present["value"].astype(np.float32))):
        numbers, scale = stored(kind, new)
        ring = written(case, present[f"past_{name}"], numbers, start, count)
        np.testing.assert_array_equal(outputs[f"present_{name}"], ring, f"ring of {name}s")
        if scale is not None:
            ring = written(case, present[f"past_{name}_scale"], scale, start, count)
            np.testing.assert_array_equal(outputs[f"present_{name}_scale"], ring, f"scales of {name}s")

    wide = _held(kind, outputs, np.float64)
    # Slots that the step overwrote are not among those that its tokens see, as the ring is large enough.
    query, query32 = (
        rotated(case, present["query"], present["cos"], present["sin"], dtype) for dtype in ("float64", "float32")
    )
    result = outputs["attended"]
    for b in range(len(start)):
        assert not result[b, int(count[b]) :].any(), "padding is attended with zeros"
    truth = attended(case, query, wide[0], wide[1], start, count, "float64")
    tokens = [result[b, t] for b in range(len(start)) for t in range(int(count[b]))]
    if tokens:
        allowed = _allowed_for_sums(case, truth, query32, wide, start, count)
        error = max(float(position_errors(a, b).max()) for a, b in zip(truth, tokens, strict=True))
        assert error <= allowed, f"attended is off by {error:.2e}, allowed are {allowed:.2e}"


def _held(kind: str, outputs: dict[str, Array], dtype: npt.DTypeLike) -> list[Array]:
    """The numbers that the rings of keys and values hold."""
    wide = [outputs[f"present_{name}"].astype(dtype) for name in ("key", "value")]
    if kind != INT8:
        return wide
    scales = [outputs[f"present_{name}_scale"].astype(dtype)[..., None] for name in ("key", "value")]
    return [x * scale for x, scale in zip(wide, scales, strict=True)]


def _allowed_for_sums(
    case: Case, truth: list[Array], query32: Array, wide: list[Array], start: Array, count: Array
) -> float:
    """Float32 sums depend on their order: the yardstick is the worst of three."""
    plain: list[Array] = []
    for shift in range(3):
        order = np.random.default_rng(shift).permutation(case.head_dim)
        plain += attended(case, query32[..., order], wide[0][..., order], wide[1], start, count, "float32")
    return budget(truth * 3, plain, "float32").allowed


def _check_rounded(
    case: Case, kind: str, inputs: dict[str, Array | None], outputs: dict[str, Array], plain: dict[str, Array]
) -> None:
    """A head of a token is what it is without rounding, bit by bit, or within the bound of the rounded numbers."""
    for name in plain.keys() - {"attended"}:
        np.testing.assert_array_equal(outputs[name], plain[name], f"{name}: what is stored is not rounded")
    present = {name: array for name, array in inputs.items() if array is not None}
    start, count, cos, sin = (present[name] for name in ("start", "count", "cos", "sin"))
    factor = float(np.float32(case.head_dim**-0.5)) * rounding.TO_BASE_2
    size, one = np.abs(present["query"]), np.ones_like(cos)
    largest = np.maximum(*(rotated(case, size, one, sign * one) for sign in (1, -1)))
    query, doubt = rounding.rounded_query(rotated(case, present["query"], cos, sin) * factor, largest * factor)
    key, value = (rounding.to_bfloat16(x) for x in _held(kind, outputs, np.float32))
    natural = query * (np.log(2) * case.head_dim**0.5)
    truth = attended(case, natural, key, value, start, count, "float64")
    at = [(b, t) for b in range(len(start)) for t in range(int(count[b]))]
    sums = _allowed_for_sums(case, truth, natural, [key, value], start, count) if at else 0.0
    for (b, t), due in zip(at, truth, strict=True):
        slots = seen(case, int(start[b]) + t)
        k, v = (np.repeat(x[b][:, slots], case.heads // case.kv_heads, 0) for x in (key, value))
        allowed = sums + rounding.allowed_for_weights(query[b, t], doubt[b, t], k, v)
        same = (outputs["attended"][b, t] == plain["attended"][b, t]).all(-1)
        within = (np.abs(outputs["attended"][b, t] - due) <= allowed).all(-1)
        assert (same if count[b] < rounding.TOKENS else same | within).all(), (
            f"token {t} of row {b} is rounded too much"
        )


def _turned_by_kernel(turned: Case, present: dict[str, Array]) -> Floats:
    """The keys after rotary embedding in float32, [B, T, G, D]: what the kernel puts into an empty float32 ring."""
    B, T = present["key"].shape[:2]
    inputs = dict(inputs_of(turned, FLOAT, np.random.default_rng(0)))
    inputs |= {name: present[name] for name in ("query", "key", "value", "cos", "sin")}
    inputs["count"] = np.full(B, T, np.int64)
    ring = node_of(turned, FLOAT, inputs).run(inputs)["present_key"]
    return np.asarray(ring[:, :, :T].transpose(0, 2, 1, 3), np.float32)


def one_row(window: int, chunk: int, total: int) -> Case:
    """A text of `total` tokens in chunks on the smallest ring, beside the same text one step later."""
    counts = [chunk] * (total // chunk) + ([total % chunk] if total % chunk else [])
    steps = [(counts[0], 0), *((count, before) for before, count in pairwise(counts))]
    slots = total if window == 0 else window + chunk - 1
    return Case(window, (0, 0), tuple(steps), slots, chunk)


def _boundaries() -> Iterator[Case]:
    for window in (1, 2, 3, 8, 33):
        for chunk in sorted({1, max(1, window // 2), window, window + 5}):
            totals = {window - 1, window, window + 1, 2 * window + 1, 3 * window + chunk}
            for total in sorted(total for total in totals if total > 0):
                if chunk > 1 or total <= 2 * window + 1:
                    yield one_row(window, chunk, total)
    for chunk in (1, 4, 20):
        yield one_row(0, chunk, 20)


def _sizes() -> Iterator[Case]:
    for head_dim in (2, 6, 8, 16, 64, 80, 96, 128, 256, 34, 1024):
        yield Case(8, (11, 30), ((1, 1), (5, 3), (1, 0)), 12, 5, head_dim=head_dim)
    for group in (1, 2, 3, 4, 8, 71):
        for tokens, counts in ((1, ((1, 1),)), (7, ((7, 2), (1, 7))), (33, ((33, 31),))):
            yield Case(9, (100, 3), counts, 41, tokens, heads=2 * group)
    for interleaved in (0, 1):
        yield Case(5, (3, 8), ((4, 2), (1, 1)), 8, 4, head_dim=6, interleaved=interleaved)
        yield Case(5, (3, 8), ((4, 2), (1, 1)), 8, 4, head_dim=32, interleaved=interleaved)


def _others() -> Iterator[Case]:
    far = 2**31 + 5
    yield Case(8, (far, 0, 7, 8, 9, far * 4), ((3, 3, 0, 1, 2, 3), (1, 1, 1, 1, 1, 0)), 10, 3)
    yield Case(8, (far, 2), ((6, 5), (1, 6)), 64, 6, in_place=False)
    yield Case(0, (0, 40), ((6, 5), (1, 6)), 64, 6, in_place=False)
    # Blocks of queries and of keys that are not full, in the middle of the ring and around its end.
    yield Case(150, (0, 400), ((40, 70), (70, 1), (1, 69)), 230, 70, threads=2, head_dim=16)
    yield Case(97, (1000,), ((50,), (47,), (1,)), 146, 50, heads=3, kv_heads=1, head_dim=20)
    yield Case(64, (500,), ((64,), (32,)), 127, 64, heads=2, kv_heads=2, head_dim=16)
    # Long enough for several threads to share a row's slots, which wrap.
    yield Case(3000, (7000, 10, 2900), ((1, 1, 1), (1, 0, 1)), 3001, 1, heads=8, kv_heads=2, head_dim=64, threads=2)
    yield Case(0, (4090,), ((1,), (2,)), 4096, 2, heads=3, kv_heads=1, head_dim=128, threads=2)
    # Peaked softmax: all weights but a few underflow.
    yield Case(40, (60, 5), ((9, 8), (1, 1)), 48, 9, head_dim=16, magnitude=12.0)


def _rounded() -> Iterator[Case]:
    """Chunks, next to rows that are none. Blocks are of 96 keys and 64 queries, of which more than half are there."""
    for window, chunk, total in ((1, 64, 70), (2, 40, 80), (33, 33, 130), (97, 64, 300), (0, 96, 97), (0, 50, 200)):
        yield one_row(window, chunk, total)
    for head_dim in (2, 6, 34, 80, 128, 1024):
        yield Case(30, (11, 60), ((17, 16), (15, 1)), 47, 17, head_dim=head_dim)
    for group in (1, 3, 8, 71):
        yield Case(29, (100, 3), ((33, 31), (16, 0)), 61, 33, heads=2 * group)
    yield Case(150, (0, 400), ((40, 70), (70, 1), (1, 69)), 230, 70, threads=2, head_dim=16)
    yield Case(97, (2**33,), ((50,), (47,)), 146, 50, heads=3, kv_heads=1, head_dim=20, in_place=False, interleaved=1)
    yield Case(40, (60, 5), ((39, 38),), 80, 39, head_dim=16, magnitude=12.0)


def cases() -> dict[str, Callable[[], None]]:
    """Name to case, for each kind of ring."""
    every = {f"boundary-{i}": case for i, case in enumerate(_boundaries())}
    every |= {f"size-{i}": case for i, case in enumerate(_sizes())}
    every |= {f"other-{i}": case for i, case in enumerate(_others())}
    every |= {f"rounded-{i}": replace(case, rounds=1) for i, case in enumerate(_rounded())}
    return {f"{name}-{kind}": partial(check, case, kind) for name, case in every.items() for kind in KINDS}


if __name__ == "__main__":
    main(cases())
