"""Which kernels a built plan runs: the list in the library's log, read and sorted by what they do.

A plan can be inspected on its GPU only, but while it is built the library logs what it will run, with the nodes of the
graph that went into each kernel. So what fused can be told, and tested, without a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graph_passes.ops.stored_matmul import STORED_MATMUL

HEADING = "Layers:"
"""How the log message begins that lists the kernels."""

PLUGIN, PRODUCT, ATTENTION, COPY, OTHER, HOST = "plugin", "product", "attention", "copy", "other", "host"
KINDS = (PRODUCT, ATTENTION, PLUGIN, COPY, OTHER)
"""What a kernel does for the most part; COPY moves or converts numbers and computes nothing. HOST is none at all."""

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>\w+)(?P<rest>,.*)", re.DOTALL)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: (?P<dims>\[[-\d,]*\]).*?Datatype: (?P<type>\w+)"
)
_PROFILE = re.compile(r" \[profile (\d+)\]")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_INNER = re.compile(r"(\d+) \| (.*) \((\w+)\)")
_WORD = re.compile(r"[A-Z][a-z0-9]*")
_GENERATED = re.compile(r"__myl_(?P<words>\w+?)_myl\d+_\d+")
_MOVING = frozenset({"Move", "Resh", "Tran", "Repl", "Copy", "Cast", "Slic", "Conc", "Sque", "Unsq"})
_PRODUCT_FUNCTION = f"({STORED_MATMUL.name})"


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One kernel of a plan. profile: the one that runs it. kind: one of KINDS, or HOST. type: the library's word.

    inputs, outputs: "name type[extents]". nodes: of the lowered graph, that it computes at least a part of; those in
    functions as "name (Function)".
    """

    profile: int
    name: str
    kind: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "name": self.name,
            "kind": self.kind,
            "type": self.type,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "nodes": list(self.nodes),
        }


def read_kernels(text: str) -> tuple[KernelCall, ...]:
    """The kernels of a log message that begins with HEADING, in the order in which they run, profile by profile."""
    found: list[KernelCall] = []
    profile = 0
    for line in text.splitlines()[1:]:
        if (match := _LINE.match(line)) is not None:
            # Only what has a name in the graph is marked, and that is always the first kernel of a profile.
            profile = max([profile, *(int(number) for number in _PROFILE.findall(line))])
            found.append(_kernel(profile, match))
    return tuple(found)


def summary(kernels: Sequence[KernelCall], profiles: int) -> tuple[Mapping[str, int], ...]:
    """How many kernels there are of each kind, by profile; nothing but zeros where the library listed none."""
    return tuple(
        {kind: sum((kernel.profile, kernel.kind) == (profile, kind) for kernel in kernels) for kind in KINDS}
        for profile in range(profiles)
    )


def _kernel(profile: int, match: re.Match[str]) -> KernelCall:
    name, rest = (_PROFILE.sub("", match[group]) for group in ("name", "rest"))
    before, _, after = rest.partition(", Outputs: ")
    nodes = tuple(dict.fromkeys(_node(told) for told in _NODE.findall(rest)))
    inputs, outputs = (_tensors(part.partition("Constants: ")[0]) for part in (before, after))
    return KernelCall(profile, name, _kind(name, match["type"], nodes), match["type"], inputs, outputs, nodes)


def _tensors(text: str) -> tuple[str, ...]:
    return tuple(f"{tensor['name']} {tensor['type']}{tensor['dims']}" for tensor in _TENSOR.finditer(text))


def _node(told: str) -> str:
    """A node's name; "2 | name (Function)" is the node `name` that calls a function, of which 2 is a node."""
    inner = _INNER.fullmatch(told)
    return told if inner is None else f"{inner[2]} ({inner[3]})"


def _kind(name: str, layer: str, nodes: Sequence[str]) -> str:
    if layer in ("PluginV3", "custom_layer"):
        return PLUGIN
    if layer in ("shape_call", "NoOp") or layer.startswith("ShapeHost"):
        return HOST
    if "_mha_" in name:
        return ATTENTION
    if layer == "Reformat":
        return COPY
    generated = _GENERATED.fullmatch(name)
    words = [] if generated is None else _WORD.findall(generated["words"])
    if layer == "gemm" or "Fc" in words:
        return PRODUCT
    if words and all(word in _MOVING for word in words):
        return COPY
    # Small products of one row are written out as a multiplication and a sum.
    multiplies = {"Mul", "Sum"}.issubset(words) and any(node.endswith(_PRODUCT_FUNCTION) for node in nodes)
    return PRODUCT if multiplies else OTHER
