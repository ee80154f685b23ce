"""Rotary embedding: products of x with cosines and sines, added up and joined again, become one node.

However it is written (rotated halves, neighbouring pairs, complex numbers, before or after the heads are turned to the
front), a rotation is made of rearrangements, signs, sums and products. So the walk goes back from the node that ends
it through these alone, and takes for x the nearest value of the result's shape in which the result is linear: every
sum has it in all its terms and every product in one factor. The other factors lead, through rearrangements, to the
tables [B, T, D/2]. What lies between is then a bilinear form in x and the tables, and two such forms that agree on
random inputs are equal with probability one: one run of the region tells which table is the cosine, whether pairs are
neighbours, and whether it is a rotation at all; the driver's proof then holds the node to it.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graph_passes.driver_types import Adapted, Match, Operand, Rule, as_fed, shape_of, source_of
from graph_passes.fuse.layouts import heads_first
from graph_passes.fuse.walk import REARRANGEMENTS, cone, data_inputs, uniform
from graph_passes.graph import Refusal, constant, dims, integer_attribute, is_made_by, scalar
from graph_passes.ops.rotary_embedding import ROTARY_EMBEDDING
from graph_passes.region import Region

_FORM = REARRANGEMENTS | {"Add", "Sub", "Mul", "Div", "Neg"}
_WIDEST = 60
"""Values behind an anchor within which a rotation lies; the longest spelling, by complex numbers, has 30."""

_TABLE = REARRANGEMENTS | {"Neg"}
_SAME = 1e-5
"""Largest difference of two float32 spellings of a sum of two products of numbers about one."""

Products = dict[ir.Node, ir.Value]
Floats = npt.NDArray[np.float32]


def match(model: ir.Model, anchor: ir.Node) -> Match:
    """From the node that ends a rotation back to x, cosine and sine."""
    y = anchor.outputs[0]
    shape = dims(y)
    if len(shape) != 4 or not isinstance(shape[3], int):
        raise Refusal("the result is not [B, H, T, D] with a fixed head dim", anchor)
    if shape[3] % 2:
        raise Refusal(f"the head dim {shape[3]} is odd, so that its elements do not pair", anchor)
    x, products = _neck(anchor)
    _refuse_part_of_a_head(x, y)
    tables = _tables(products, shape[3])
    Match("rope", ROTARY_EMBEDDING, anchor, (x, *tables), {"interleaved": 0}, (y,))  # refuses what has other shapes
    try:
        cos, sin, interleaved = _reading(model, y, x, tables)
    except Refusal as refusal:
        raise Refusal(refusal.reason, next(iter(products))) from refusal
    return Match("rope", ROTARY_EMBEDDING, anchor, (x, cos, sin), {"interleaved": interleaved}, (y,))


def _neck(anchor: ir.Node) -> tuple[Operand, Products]:
    """(x, the products that it is in) of the nearest x of the result's shape in which the result is linear."""
    y = anchor.outputs[0]
    near = itertools.count()
    behind = cone(y, _FORM, stop=lambda value: next(near) > _WIDEST or _looked_up(value))
    inner = set(behind.values) - set(behind.ends)
    if not any(is_made_by(value, "Mul") for value in inner):
        raise Refusal("nothing is multiplied behind it, so that nothing turns", anchor)
    if not any(is_made_by(value, "Add", "Sub") for value in inner):
        raise Refusal("no products are added behind it, so that nothing turns", anchor)
    broken: Refusal | None = None
    for value in behind.values[1:]:
        x = _as_result(value, dims(y)) if value.shape is not None else None
        if x is None:
            continue
        form = _Linear(value, inner)
        try:
            if form.depends(y) and form.products and form.added:
                return _unturned(x, dims(y)), form.products
        except Refusal as refusal:
            broken = refusal  # of the farthest candidate: the nearer ones are but pieces of the rotation
    raise _cut(behind.ends) or broken or _no_neck(anchor, behind.ends)


def _cut(ends: tuple[ir.Value, ...]) -> Refusal | None:
    """The refusal of a walk that a rearrangement ended, since its bounds are not the same at every size."""
    for end in ends:
        node = end.producer()
        if node is not None and is_made_by(end, *REARRANGEMENTS) and not uniform(node):
            return Refusal(f"what {node.op_type} takes for {end.name!r} depends on sizes or bounds left open", node)
    return None


def _looked_up(value: ir.Value) -> bool:
    """Whether `value` is read from a table by position, which is no rearrangement."""
    node = value.producer()
    return is_made_by(value, "Gather", "GatherElements") and node is not None and constant(node.inputs[1]) is None


def _no_neck(anchor: ir.Node, ends: tuple[ir.Value, ...]) -> Refusal:
    wide = [end for end in ends if end.shape is not None and len(end.shape) >= 4 and end.producer() is not None]
    node = wide[0].producer() if wide else None
    if node is not None:
        return Refusal(f"{wide[0].name!r} comes from {node.op_type}, which is no part of a rotation", node)
    return Refusal("no value of the result's shape is turned into it", anchor)


def _as_result(value: ir.Value, shape: tuple[int | str, ...]) -> Operand | None:
    """`value` as an operand of the result's shape, as it is or with tokens and heads exchanged; None if neither."""
    found = dims(value)
    if len(found) != 4 or found[3] != shape[3]:
        return None
    return next((operand for operand in heads_first(value, found) if shape_of(operand) == shape), None)


def _unturned(x: Operand, shape: tuple[int | str, ...]) -> Operand:
    """What a Transpose made x from, when that has the result's layout already."""
    source = source_of(x)
    if isinstance(x, ir.Value) or not is_made_by(source, "Transpose"):
        return x
    before = next(data_inputs(source.producer()))  # type: ignore[arg-type]
    return before if dims(before) == shape else x


class _Linear:
    """Whether the values of a form are linear in `x`: asked of the result, it asks all that lies between.

    products: the nodes that multiply x by what is not constant, the farthest first, and by what they do. added: whether
    anything is added.
    """

    def __init__(self, x: ir.Value, inner: set[ir.Value]) -> None:
        self._depends: dict[ir.Value, bool] = {x: True}
        self._inner = inner
        self.products: Products = {}
        self.added = False

    def depends(self, value: ir.Value) -> bool:
        """Whether `value` is made of x; raises Refusal where it is so otherwise than linearly."""
        if value not in self._depends:
            self._depends[value] = self._ask(value) if value in self._inner else False
        return self._depends[value]

    def _ask(self, value: ir.Value) -> bool:
        node = value.producer()
        assert node is not None
        parts = list(data_inputs(node))
        made_of_x = [self.depends(part) for part in parts]
        if not any(made_of_x):
            return False
        stranger = parts[made_of_x.index(False)] if False in made_of_x else None
        if node.op_type in ("Mul", "Div"):
            if stranger is None or (node.op_type == "Div" and scalar(parts[1]) is None):
                raise Refusal("x is multiplied or divided by what is itself made of x", node)
            if constant(stranger) is None:
                self.products[node] = stranger
        elif stranger is not None and not is_made_by(value, "Gather", "GatherElements"):
            raise Refusal(f"{stranger.name!r} is joined or added to it, but is not made of the same x", node)
        self.added = self.added or node.op_type in ("Add", "Sub")
        return True


def _refuse_part_of_a_head(x: Operand, y: ir.Value) -> None:
    """Refuses x that is cut from wider heads when the result is joined with the rest of them."""
    source = source_of(x)
    if not is_made_by(source, "Slice", "Split"):
        return
    maker = source.producer()
    assert maker is not None
    whole = dims(next(data_inputs(maker)))
    for use in y.uses():
        joined = use.node.op_type == "Concat" and integer_attribute(use.node, "axis", 0) in (3, -1)
        if joined and len(whole) == 4 and dims(use.node.outputs[0])[3] == whole[3]:
            reason = f"only {dims(source)[3]} of the {whole[3]} elements of a head are turned by these angles"
            raise Refusal(f"{reason} (partial or two-dimensional rotation)", use.node)


def _tables(products: Products, head_dim: int) -> tuple[Operand, Operand]:
    """The two values [B, T, D/2] of which all factors are rearrangements."""
    found = dict.fromkeys(table for factor in products.values() for table in _half_tables(factor, head_dim))
    if len(found) == 2:
        first, second = map(_as_table, found)
        return first, second
    names = ", ".join(repr(table.name) for table in found)
    if len(found) > 2:
        reason = f"x is turned by {len(found)} tables ({names}): its parts turn by different angles"
    else:
        reason = f"cosine and sine are not two tables, but one ({names})"
    raise Refusal(reason, next(iter(products)))


def _half_tables(value: ir.Value, head_dim: int) -> list[ir.Value]:
    """The values [B, T, D/2], perhaps with further axes of one, that `value` rearranges: the farthest on each path."""
    half, shape = head_dim // 2, dims(value) if value.shape is not None else ()
    if len(shape) == 3 and shape[2] == half and not is_made_by(value, "Neg"):
        return [value]
    node = value.producer()
    try:
        if node is None or not is_made_by(value, *_TABLE) or not uniform(node) or _looked_up(value):
            raise _no_half(value, head_dim)
        parts = [part for part in data_inputs(node) if constant(part) is None]
        return [table for part in dict.fromkeys(parts) for table in _half_tables(part, head_dim)]
    except Refusal:
        kept = [extent for extent in shape if extent != 1]
        if len(kept) == 3 and kept[2] == half:
            return [value]
        raise


def _as_table(value: ir.Value) -> Operand:
    """A table without its axes of one."""
    shape = dims(value)
    if len(shape) == 3:
        return value
    axes = [axis for axis, extent in enumerate(shape) if extent == 1]

    def build(source: ir.Value) -> list[ir.Node]:
        operand = ir.node("Constant", [], {"value_ints": axes})
        return [operand, ir.node("Squeeze", [source, operand.outputs[0]])]

    kept = tuple(extent for extent in shape if extent != 1)
    dtype = value.dtype or ir.DataType.FLOAT
    return Adapted(value, dtype, kept, build, lambda array: np.expand_dims(array, axes), "without axes of one")


def _no_half(value: ir.Value, head_dim: int) -> Refusal:
    """Why an angle table ends in `value`, which is not [B, T, D/2]."""
    node, shape = value.producer(), dims(value)
    where = f"comes from {node.op_type}" if node is not None else "comes from outside"
    if shape[-1:] == (head_dim,):
        reason = f"the angles {value.name!r} are as wide as the head and nothing says that their halves are equal"
        return Refusal(f"{reason} (it {where})", node)
    shown = ", ".join(map(str, shape))
    narrow = isinstance(shape[-1], int) and shape[-1] < head_dim // 2 if shape else False
    hint = "; only a part of the head turns" if narrow else ""
    return Refusal(f"the angles {value.name!r} are [{shown}] where [B, T, {head_dim // 2}] is needed{hint}", node)


def _reading(model: ir.Model, y: ir.Value, x: Operand, tables: tuple[Operand, Operand]) -> tuple[Operand, Operand, int]:
    """(cosine, sine, interleaved) as one run of the region shows them."""
    rng = np.random.default_rng(0)
    examples = ROTARY_EMBEDDING.examples(rng, {"interleaved": 0}, [shape_of(v) for v in (x, *tables)])
    *_, (x_BHTD, *angles) = examples
    operands, arrays = (x, *tables), (x_BHTD, *angles)
    region = Region(model, [source_of(operand) for operand in operands], [y])
    fed = [as_fed(operand, array) for operand, array in zip(operands, arrays, strict=True)]
    try:
        got = region.run(fed)[0]
    except Refusal as refusal:
        raise Refusal("x and its tables do not lie along the same rows and tokens", None) from refusal
    if got.shape != x_BHTD.shape:
        raise Refusal(f"the result has shape {list(got.shape)} for x {list(x_BHTD.shape)}", None)
    for (cos, sin), interleaved, sign in itertools.product(((0, 1), (1, 0)), (0, 1), (1, -1)):
        expected = _rotated(x_BHTD, angles[cos], np.float32(sign) * angles[sin], interleaved)
        if not np.abs(got - expected).max() <= _SAME * np.abs(expected).max():  # nor is what is not a number
            continue
        if sign < 0:
            reason = "it turns in the other direction, by the angle whose sine is negative"
            raise Refusal(f"{reason}: [low·cos + high·sin, high·cos − low·sin]", None)
        return tables[cos], tables[sin], interleaved
    kept = [i for i in range(x_BHTD.shape[3]) if np.array_equal(got[..., i], x_BHTD[..., i])]
    hint = f"; elements {kept[0]} to {kept[-1]} are not turned at all" if kept else ""
    raise Refusal(f"it is a bilinear form of x and two tables, but not the rotation by their angles{hint}", None)


def _rotated(x_BHTD: Floats, cos_BTd: Floats, sin_BTd: Floats, interleaved: int) -> Floats:
    """The op in numpy."""
    half = x_BHTD.shape[3] // 2
    low, high = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
    cos, sin = cos_BTd[:, None], sin_BTd[:, None]
    out = np.empty_like(x_BHTD)
    out[..., low] = x_BHTD[..., low] * cos - x_BHTD[..., high] * sin
    out[..., high] = x_BHTD[..., high] * cos + x_BHTD[..., low] * sin
    return out


_ENDS = ("Add", "Sub", "Concat", "Reshape", "Transpose")
"""The last step of a rotation: rotated halves are added, pairs joined or flattened, tokens and heads exchanged."""

RULE = Rule("rope", ROTARY_EMBEDDING, frozenset(("", op_type) for op_type in _ENDS), match)
