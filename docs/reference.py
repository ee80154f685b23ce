"""Writes docs/ops.md and docs/pipeline.md from the code that they describe: python docs/reference.py

A test runs the same functions and fails when a page is not what the code says.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from graph_passes.canonical import canonicalise  # noqa: E402
from graph_passes.lower.kv import lower_kv  # noqa: E402
from graph_passes.lower.linears import lower_linears  # noqa: E402
from graph_passes.lower.rounding import allow_rounding  # noqa: E402
from graph_passes.ops import DOMAIN, OPS, OPSET, VERSION, PluginOp  # noqa: E402
from graph_passes.ops.activations import ACTIVATIONS  # noqa: E402
from graph_passes.pipeline import CANONICALISE_REASON, PIPELINE  # noqa: E402

_SAMPLE: dict[str, int | float | str] = {"int": 1, "float": 1.0, "string": "silu"}
"""Attribute values with which a body is shown."""

_LOWERING = "[lowering](pipeline.md#after-the-passes)"

_NOTE = "<!-- Written by docs/reference.py from the code; change the code and run it again. -->\n"


def ops_page() -> str:
    """The reference of the plugin ops: schema, attributes, body, what the proof feeds."""
    parts = [
        "# Plugin ops",
        _NOTE,
        f"All ops live in the domain `{DOMAIN}`, version {VERSION}. Each node carries `plugin_namespace` and "
        "`plugin_version`, and each file carries a function body of standard operators (opset "
        f"{OPSET}), which any ONNX runtime runs where no kernel is registered under the op's name. Names end in their "
        "shapes: B rows, T new tokens of a row, N = B·T, S ring slots, H query heads, G key and value heads, D head "
        "dim, d = D/2, E experts, K experts per token, C hidden size, I intermediate size; 1 is an axis of one. A "
        "weight has N rows and K columns (R rows where there are several of them), and a quantised one B blocks of b "
        "bytes in a row, and Z bytes of zero points.",
        "\n".join(f"- [{name}](#{name.lower()})" for name in OPS),
    ]
    parts += [_op_section(op) for op in OPS.values()]
    return "\n\n".join(parts) + "\n"


def _op_section(op: PluginOp) -> str:
    module = inspect.getmodule(op.examples)
    assert module is not None
    source = Path(str(module.__file__)).relative_to(DOCS.parent)
    head = inspect.getdoc(module) or ""
    rows = [f"| `{name}` | {kind} |" for name, kind in op.attributes.items()]
    attributes = "\n".join(["| attribute | type |", "| --- | --- |", *rows]) if rows else "It has no attributes."
    if "activation" in op.attributes:
        attributes += f"\n\n`activation` is one of {', '.join(f'`{name}`' for name in ACTIVATIONS)}."
    body = textwrap.dedent(op.body({name: _SAMPLE[kind] for name, kind in op.attributes.items()})).strip()
    statements = "\n".join(line.strip() for line in body.splitlines())
    fires = [f"`{rule.name}`" for rule, _ in PIPELINE if rule.op is op]
    maker = f"made by the rule {' and '.join(fires)}" if fires else f"made by {_LOWERING}"
    if op.calls:
        maker += f"; its body calls those of {', '.join(f'[{c.name}](#{c.name.lower()})' for c in op.calls)}"
    if op.optional:
        maker += f"; the last {'input' if op.optional == 1 else f'{op.optional} inputs'} may be left out"
    return "\n\n".join(
        [
            f"## {op.name}",
            head,
            _constant_doc(module, op),
            f"`({', '.join(op.inputs)}) → ({', '.join(op.outputs)})`, {maker}; source: [`{source}`](../{source}).",
            attributes,
            f"**What the {'proof feeds' if fires else 'tests feed'}.** {_required_doc(op)}",
            f"<details><summary>Function body</summary>\n\n```\n{statements}\n```\n\n</details>",
        ]
    )


def _required_doc(op: PluginOp) -> str:
    text = inspect.getdoc(op.examples)
    if text is None:
        raise LookupError(f"the examples of {op.name} have no text")
    return text


def _constant_doc(module: ModuleType, op: PluginOp) -> str:
    """The string under the constant that holds the op; Python keeps none of these at run time."""
    nodes = ast.parse(inspect.getsource(module)).body
    for node, after in pairwise(nodes):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and getattr(module, node.targets[0].id) is op
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            return inspect.cleandoc(str(after.value.value))
    raise LookupError(f"{op.name} has no text under its constant in {module.__name__}")


def pipeline_page() -> str:
    """The passes in their order with the reason for each one's place, and what each file says of itself."""
    rows = [f"| 1 | `canonicalise` | | {CANONICALISE_REASON} |"]
    rows += [
        f"| {number} | `{rule.name}` | [{rule.op.name}](ops.md#{rule.op.name.lower()}) | {reason} |"
        for number, (rule, reason) in enumerate(PIPELINE, start=2)
    ]
    parts = [
        "# The pipeline",
        _NOTE,
        (DOCS / "pipeline_head.md").read_text(encoding="utf-8").strip(),
        "## The passes, in order",
        "\n".join(["| | pass | makes | why here |", "| --- | --- | --- | --- |", *rows]),
        f"### canonicalise\n\n{inspect.getdoc(inspect.getmodule(canonicalise))}",
    ]
    for rule, _ in PIPELINE:
        module = inspect.getmodule(rule.match)
        assert module is not None
        source = Path(str(module.__file__)).relative_to(DOCS.parent)
        anchors = ", ".join(sorted(f"`{op}`" for _, op in rule.anchors))
        parts.append(
            f"### {rule.name}\n\n{inspect.getdoc(module)}\n\nStarts from: {anchors}. Source: [`{source}`](../{source})."
        )
    parts.append((DOCS / "pipeline_tail.md").read_text(encoding="utf-8").strip())
    for lower in (lower_linears, lower_kv, allow_rounding):
        module = inspect.getmodule(lower)
        assert module is not None
        source = Path(str(module.__file__)).relative_to(DOCS.parent)
        parts.append(f"### {lower.__name__}\n\n{inspect.getdoc(module)}\n\nSource: [`{source}`](../{source}).")
    return "\n\n".join(parts) + "\n"


PAGES = {"ops.md": ops_page, "pipeline.md": pipeline_page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
