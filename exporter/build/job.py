"""What the process that builds is told, and what it tells: JSON both ways.

The library that builds is large, keeps what it allocates, and may end its process (`std::terminate`) where others raise
an exception. So it runs in a process of its own, which reads one job and writes one message a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runtime.engine_info import EngineWeight, PlanProfile
from runtime.manifest_section import Section
from runtime.weight_expression import parse_expression

PROGRESS, DONE, REFUSED = "progress", "done", "refused"
"""Keys of a message: [plan, percent]; the results by plan; the text of a CierzoError."""


@dataclass(frozen=True, slots=True)
class BuildJob:
    """Engines to build, by one flavour for one compute capability.

    plugins, plugin_nodes: plugins by name, and how many nodes of the graph are for them.
    onnx, folder: path of the lowered graph; where the plans go.
    plans: their profiles, by name.
    inputs: the graph's dynamic inputs, and what each axis is: a letter B, T or R, or an extent.
    weights: the graph's other inputs. embedded: whether plans hold them.
    orders, files: what expressions of weights name, and paths of the files that they name.
    """

    flavor: str
    compute_capability: str
    plugins: tuple[str, ...]
    plugin_nodes: int
    onnx: str
    folder: str
    plans: Mapping[str, tuple[PlanProfile, ...]]
    inputs: Mapping[str, tuple[str | int, ...]]
    weights: tuple[EngineWeight, ...]
    embedded: bool
    orders: Mapping[str, tuple[int, ...]]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The document that `read_job` reads back to the same BuildJob."""
        return {
            "flavor": self.flavor,
            "compute_capability": self.compute_capability,
            "plugins": list(self.plugins),
            "plugin_nodes": self.plugin_nodes,
            "onnx": self.onnx,
            "folder": self.folder,
            "plans": {name: [asdict(profile) for profile in profiles] for name, profiles in self.plans.items()},
            "inputs": {name: list(axes) for name, axes in self.inputs.items()},
            "weights": [
                {
                    "name": weight.name,
                    "dtype": weight.dtype,
                    "shape": list(weight.shape),
                    "role": weight.role,
                    "expression": weight.expression.to_json(),
                }
                for weight in self.weights
            ],
            "embedded": self.embedded,
            "orders": {name: list(order) for name, order in self.orders.items()},
            "files": dict(self.files),
        }


def read_job(document: Mapping[str, Any]) -> BuildJob:
    """The job that `BuildJob.to_json` wrote."""
    return BuildJob(
        flavor=document["flavor"],
        compute_capability=document["compute_capability"],
        plugins=tuple(document["plugins"]),
        plugin_nodes=document["plugin_nodes"],
        onnx=document["onnx"],
        folder=document["folder"],
        plans={
            name: tuple(PlanProfile(**profile) for profile in profiles) for name, profiles in document["plans"].items()
        },
        inputs={name: tuple(axes) for name, axes in document["inputs"].items()},
        weights=tuple(
            EngineWeight(
                name=weight["name"],
                dtype=weight["dtype"],
                shape=tuple(weight["shape"]),
                role=weight["role"],
                expression=parse_expression(Section(weight["expression"], f"{weight['name']}.")),
            )
            for weight in document["weights"]
        ),
        embedded=document["embedded"],
        orders={name: tuple(order) for name, order in document["orders"].items()},
        files=document["files"],
    )
