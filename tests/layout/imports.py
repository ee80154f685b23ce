"""Which package may import which: the table, and the reader of a source's imports that checks it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("exporter", "graph_passes", "runtime", "reference")

# What each package may import besides the standard library and itself. Imports inside functions count too.
# Two modules of the runtime are open to all: one page holds the whole exception tree, and one reader takes apart all
# JSON that strangers wrote (configs, indices and headers in reference, manifests in runtime).
ALLOWED: dict[str, frozenset[str]] = {
    "reference": frozenset({"torch", "safetensors", "numpy"}),
    "graph_passes": frozenset({"onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy"}),
    "runtime": frozenset(
        {"numpy", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda"}
        | {"tokenizers", "jinja2", "mistral_common", "sentencepiece"}
    ),
    "exporter": frozenset(
        {"reference", "graph_passes", "runtime"}
        | {"torch", "safetensors", "numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tokenizers"}
        | {"click", "rich", "polygraphy"}
    ),
}
EVERYBODY = frozenset({"runtime.errors", "runtime.json_files"})
# Four files may use what the others may not: the second front end's only touch with the package that it traces, which
# is an optional extra; what trains the demo's checkpoints and writes them in the customary layout, which is kept as the
# record of how they were made; the plugin that pytest loads; and what makes and checks signatures, with an optional
# extra too.
EXTRA: dict[str, frozenset[str]] = {
    "exporter/frontends/transformers_model.py": frozenset({"transformers"}),
    "exporter/demo_data/train.py": frozenset({"transformers"}),
    "exporter/pytest_plugin.py": frozenset({"pytest"}),
    "runtime/signing.py": frozenset({"cryptography"}),
}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: its dotted name and the line that imports it."""

    module: str
    line: int


def imports(source: str, package: str) -> Iterator[Import]:
    """Every module that `source` imports, anywhere in it; `package` is the dotted package that the file lies in.

    `from a import b` gives `a.b`, since b may be a module; import_module and __import__ count when they name their
    module in a literal.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            literal = first.value if isinstance(first, ast.Constant) else None
            if name in ("import_module", "__import__") and isinstance(literal, str):
                yield Import(literal, node.lineno)


def violations(path: str, source: str) -> list[str]:
    """What the file `path` (relative to the repository) imports against the table, one sentence each."""
    parts = Path(path).with_suffix("").parts
    owner = parts[0]
    allowed = ALLOWED[owner] | EXTRA.get(path, frozenset())
    found = []
    for item in imports(source, ".".join(parts[:-1])):
        top = item.module.split(".")[0]
        within = any(item.module == module or item.module.startswith(f"{module}.") for module in EVERYBODY)
        if top != owner and top not in allowed and not within and top not in sys.stdlib_module_names:
            found.append(f"{path}:{item.line} imports {item.module}, which {owner} may not")
    return found


def product_files() -> list[str]:
    """Every Python file of the four packages, relative to the repository."""
    return [str(path.relative_to(ROOT)) for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]
