"""What a built engine says of itself: `engines/NAME/engine.json` in a bundle.

An engine is made for one version of one library and one kind of GPU, from one graph. All of that is written here, and
whatever loads an engine compares it first. The bundle's manifest holds the size and the hash of this file.

Letters: B batch rows, T tokens of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from runtime.errors import BundleError
from runtime.json_files import MOST_KEY_CHARACTERS, brief, parse_json_object
from runtime.manifest_section import Document, Section
from runtime.weight_expression import Expression, dtype_of, orders_of, parse_expression, parse_shape

ENGINES_FOLDER = "engines"
ENGINE_FILE = "engine.json"
ENGINE = Document(f"The {ENGINE_FILE}", "Build the engine again")
SCHEMA_VERSION = 1
PREFILL, DECODE = "prefill", "decode"
INPUT, REFIT = "input", "refit"
WEIGHTLESS, EMBEDDED = "weightless", "embedded"


@dataclass(frozen=True, slots=True)
class PlanProfile:
    """Shapes that one optimisation profile of a plan takes: 1 <= min_batch <= B <= max_batch, and T likewise."""

    min_batch: int
    max_batch: int
    min_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """A serialized engine: its file beside engine.json, size, SHA-256, and its profiles in their order."""

    file: str
    bytes: int
    sha256: str
    profiles: tuple[PlanProfile, ...]


@dataclass(frozen=True, slots=True)
class EngineWeight:
    """A weight that a plan does not hold: what it is called there, and how it is made of the bundle's files.

    dtype: as safetensors spells it, and "I4" for two numbers in a byte. role: INPUT is a network input, which all plans
    read from one place; REFIT is filled into each plan.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: str
    expression: Expression


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """A whole engine.json. name: the folder's. version: of the library that built it. compute_capability: as "8.9".

    arithmetic, kv: types, as "bfloat16". plugins: ops that plugins run; the others' bodies were inlined. weights:
    WEIGHTLESS or EMBEDDED. graph_sha256: of the bundle's ONNX file. orders: index lists that expressions name.
    """

    name: str
    backend: str
    flavor: str
    version: str
    compute_capability: str
    arithmetic: str
    kv: str
    plugins: tuple[str, ...]
    weights: str
    max_batch: int
    chunk: int
    graph_sha256: str
    plans: Mapping[str, PlanInfo]
    tensors: tuple[EngineWeight, ...]
    orders: Mapping[str, tuple[int, ...]]


def parse_engine(name: str, content: bytes) -> EngineInfo:
    """Parse the content of an engine.json. Raises BundleError for whatever is damaged, missing or of a newer schema."""
    root = Section(
        parse_json_object(
            content,
            lambda cause: BundleError(
                f"The engine {name} is not described by readable JSON ({cause}). Build it again."
            ),
        ),
        f"engine {name}: ",
        ENGINE,
    )
    version = root.integer("schema_version", minimum=1)
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"The engine {name} was written with schema {version}, but this Cierzo reads schema {SCHEMA_VERSION}. "
            "Build it again with `cierzo build`."
        )
    orders = parse_orders(name, root.section("orders"))
    plans = root.section("plans")
    return EngineInfo(
        name=name,
        **{
            key: parse_name(root, key)
            for key in ("backend", "flavor", "version", "compute_capability", "arithmetic", "kv")
        },
        plugins=tuple(root.strings("plugins")),
        weights=root.one_of("weights", (WEIGHTLESS, EMBEDDED)),
        max_batch=root.integer("max_batch", minimum=1),
        chunk=root.integer("chunk", minimum=1),
        graph_sha256=root.hash("graph_sha256"),
        plans=MappingProxyType({key: _plan(plans.section(key)) for key in (PREFILL, DECODE)}),
        tensors=tuple(parse_weight(tensor, orders, (INPUT, REFIT)) for tensor in root.sections("tensors")),
        orders=orders,
    )


def engine_to_json(engine: EngineInfo) -> dict[str, Any]:
    """The document that `parse_engine` reads back to the same EngineInfo."""
    return {
        "schema_version": SCHEMA_VERSION,
        **{
            key: getattr(engine, key)
            for key in (
                "backend",
                "flavor",
                "version",
                "compute_capability",
                "arithmetic",
                "kv",
                "weights",
                "max_batch",
                "chunk",
                "graph_sha256",
            )
        },
        "plugins": list(engine.plugins),
        "plans": {
            key: {
                "file": plan.file,
                "bytes": plan.bytes,
                "sha256": plan.sha256,
                "profiles": [
                    {field: getattr(profile, field) for field in PlanProfile.__slots__} for profile in plan.profiles
                ],
            }
            for key, plan in engine.plans.items()
        },
        "orders": {key: list(order) for key, order in engine.orders.items()},
        "tensors": [weight_to_json(tensor) for tensor in engine.tensors],
    }


def weight_to_json(weight: EngineWeight) -> dict[str, Any]:
    """What `parse_weight` reads back."""
    return {
        "name": weight.name,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
        "role": weight.role,
        "expression": weight.expression.to_json(),
    }


def parse_name(section: Section, key: str) -> str:
    """A string that messages may hold."""
    value = section.string(key)
    if not value.isprintable() or len(value) > MOST_KEY_CHARACTERS:
        raise BundleError(f"{section.path}{key} is {brief(value)}, which is no name. Build the engine again.")
    return value


def parse_orders(name: str, section: Section) -> Mapping[str, tuple[int, ...]]:
    """Index lists by name, which expressions refer to."""
    orders = {key: tuple(section.items(key)) for key in section.data}
    for key, order in orders.items():
        if not all(type(index) is int and 0 <= index < 1 << 31 for index in order):
            raise BundleError(f"The order {brief(key)} of the engine {name} is damaged. Build the engine again.")
    return MappingProxyType(orders)


def _plan(section: Section) -> PlanInfo:
    profiles = []
    for profile in section.sections("profiles"):
        found = PlanProfile(**{key: profile.integer(key, minimum=1) for key in PlanProfile.__slots__})
        if found.min_batch > found.max_batch or found.min_tokens > found.max_tokens:
            raise BundleError(f"{profile.path[:-1]} takes no shape at all. Build the engine again.")
        profiles.append(found)
    file = parse_name(section, "file")
    if "/" in file or "\\" in file or file in ("", ".", ".."):
        raise BundleError(f"The plan {file!r} of {section.path[:-2]} lies outside the engine's folder. Build it again.")
    return PlanInfo(file, section.integer("bytes", minimum=1), section.hash("sha256"), tuple(profiles))


def parse_weight(section: Section, orders: Mapping[str, tuple[int, ...]], roles: tuple[str, ...]) -> EngineWeight:
    """A weight, whose role must be one of `roles`. Raises BundleError for one that contradicts itself."""
    shape = parse_shape(section)
    expression = parse_expression(section.section("expression"))
    if (dtype := dtype_of(expression)) != section.string("dtype"):
        raise BundleError(
            f"{section.path[:-1]} is of {brief(section.string('dtype'))}, and what it is made of is {dtype}. Build the "
            "engine again."
        )
    if unknown := orders_of(expression) - orders.keys():
        raise BundleError(
            f"{section.path[:-1]} has its rows in the order {brief(unknown.pop())}, which is not there. Build the "
            "engine again."
        )
    return EngineWeight(
        name=parse_name(section, "name"),
        dtype=section.string("dtype"),
        shape=shape,
        role=section.one_of("role", roles),
        expression=expression,
    )
