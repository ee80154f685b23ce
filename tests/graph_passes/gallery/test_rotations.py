"""The gallery of rotary embeddings: one node whatever the spelling, or a reason that a person understands."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from graph_passes.driver import apply
from graph_passes.fuse import rope
from tests.graph_passes.gallery.rotations import LONGEST, REFUSED, SPELLINGS, Program, angles, rotate_half
from tests.graph_passes.gallery.tracing import trace
from tests.support.graphs import op_types, run, serialised

INPUTS: dict[str, tuple[str | int, ...]] = {"x": ("B", 4, "T", 6), "position": ("B", "T")}
Record = Callable[[str, object], None]


def traced(program: Program) -> ir.Model:
    return trace(program, INPUTS, ["turned"], ("position",))


@pytest.mark.parametrize("name", SPELLINGS)
def test_is_one_node(name: str, record_property: Record) -> None:
    program, interleaved = SPELLINGS[name]
    record_property("spelling", ("rotary embedding", "fused"))
    model = traced(program)
    fused, refused = apply(model, rope.RULE)
    assert len(fused) == 1, [str(record) for record in refused]
    assert fused[0].attributes == {"interleaved": interleaved}
    assert op_types(model).count("RotaryEmbedding") == 1
    left = [node for node in model.graph if node.outputs[0].shape is not None and len(node.outputs[0].shape) >= 4]
    assert {node.op_type for node in left} <= {"RotaryEmbedding", "Transpose"}, "x is still turned by hand"
    rng = np.random.default_rng(0)
    for rows, tokens, first in ((1, 1, 0), (2, 7, 3), (3, 5, LONGEST - 5)):
        x = rng.standard_normal((rows, 4, tokens, 6), dtype=np.float32)
        position = first - np.arange(rows)[:, None].clip(0, first) + np.arange(tokens)[None]
        want = program(torch.from_numpy(x), torch.from_numpy(position)).numpy()
        got = run(model, {"x": x, "position": position})["turned"]
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str, record_property: Record) -> None:
    program, reason = REFUSED[name]
    record_property("spelling", ("rotary embedding", "refused"))
    model = traced(program)
    untouched = serialised(model)
    fused, refused = apply(model, rope.RULE)
    assert fused == []
    assert any(re.search(reason, record.reason) for record in refused), "\n".join(map(str, refused))
    assert serialised(model) == untouched


def test_wide_tables_from_outside_are_refused(record_property: Record) -> None:
    record_property("spelling", ("rotary embedding", "refused"))
    inputs: dict[str, tuple[str | int, ...]] = {"x": ("B", 4, "T", 6), "cos": ("B", "T", 6), "sin": ("B", "T", 6)}
    model = trace(lambda x, cos, sin: x * cos[:, None] + rotate_half(x) * sin[:, None], inputs, ["turned"])
    fused, refused = apply(model, rope.RULE)
    assert fused == []
    assert any("nothing says that their halves are equal" in record.reason for record in refused)


def test_query_and_key_share_their_tables() -> None:
    """The usual layer: two rotations by one pair of tables, which stays shared."""

    def both(query: torch.Tensor, key: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = angles(position)
        wide = torch.cat((angle, angle), -1)
        cos, sin = wide.cos()[:, None], wide.sin()[:, None]
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin

    inputs: dict[str, tuple[str | int, ...]] = {"query": ("B", 4, "T", 6), "key": ("B", 2, "T", 6)}
    model = trace(both, {**inputs, "position": ("B", "T")}, ["q", "k"], ("position",))
    assert len(apply(model, rope.RULE)[0]) == 2
    turned = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert turned[0].inputs[1:] == turned[1].inputs[1:]
    assert op_types(model).count("Cos") == op_types(model).count("Sin") == 1
