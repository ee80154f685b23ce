"""The front ends: where the graph of a template comes from.

Each traces a step of one model source and hands over the same thing: raw ONNX IR of one layer of each kind with the
names of `exporter.trace` for inputs, outputs and dims, the parameters of `reference.weights`, all unbound, and scopes
that begin with `layers.{i}`. What comes after does not know which one it was.

- `reference`: our own decoder (`reference.step`).
- `transformers`: the classes of that package as published, with eager or sdpa attention. The passes meet a program
  there that nobody wrote for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

import exporter.trace
from exporter.defaults import ATTENTIONS, FRONTENDS
from exporter.plan import ExportPlan
from reference.architectures import WRAPPERS
from reference.checkpoint import HUGGING_FACE, Checkpoint
from reference.config_keys import drop_ignored
from runtime.errors import ExportError


@dataclass(frozen=True, slots=True)
class Frontend:
    """One way to a template.

    name: one of `exporter.defaults.FRONTENDS`. attention: one of ATTENTIONS, None where there is no choice.
    tracer: raises TraceError when the traced graph is not what this module says, and ExportError for a plan that this
        front end cannot express.
    distributions: installed packages, beside those that every export uses, whose versions decide about the graph.
    """

    name: str
    attention: str | None
    tracer: Callable[[ExportPlan], ir.Model]
    distributions: tuple[str, ...] = ()


REFERENCE = Frontend("reference", None, exporter.trace.trace)


def open_frontend(
    name: str, attention: str | None, checkpoint: Checkpoint, ignore_config_keys: Collection[str] = ()
) -> Frontend:
    """The front end `name` for one checkpoint.

    attention: how the front end transformers spells attention, None for its default.
    ignore_config_keys: see `ModelConfig.from_hf`.
    Raises ExportError for unknown names, for an attention where there is no choice, for a checkpoint that the package's
    classes do not read, and when the package that is to be traced is not installed.
    """
    if name not in FRONTENDS:
        raise ExportError(f"frontend = {name!r} is not one that this version has ({', '.join(FRONTENDS)}).")
    if attention is not None and attention not in ATTENTIONS:
        raise ExportError(f"attention = {attention!r} is not one that this version traces ({', '.join(ATTENTIONS)}).")
    if name == REFERENCE.name:
        if attention is not None:
            raise ExportError(
                f"attention = {attention!r} chooses between two spellings in transformers, and the front end "
                "'reference' has one of its own. Leave it out, or choose the front end 'transformers'."
            )
        return REFERENCE
    from exporter.frontends.transformers_model import import_transformers

    import_transformers()
    published = _published(checkpoint)
    return transformers_frontend(without_ignored(published, ignore_config_keys), attention or ATTENTIONS[0])


def _published(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of the config.json; raises ExportError where there is none, or where it is of more than a decoder."""
    if checkpoint.layout != HUGGING_FACE:
        raise ExportError(
            "The front end 'transformers' traces the model that a config.json describes, and this checkpoint is in "
            f"Mistral's own layout ({checkpoint.config_file.name}). Leave the front end at 'reference'."
        )
    published: dict[str, Any] = json.loads(checkpoint.config_file.read_text(encoding="utf-8"))
    if published.get("model_type") in WRAPPERS:
        raise ExportError(
            f"The front end 'transformers' traces language models, and {published['model_type']} is one with a vision "
            "tower around it. Leave the front end at 'reference' for its text side."
        )
    return published


def transformers_frontend(published: Mapping[str, Any], attention: str) -> Frontend:
    """The front end transformers for the content of a config.json, `published`; its package is installed."""
    return Frontend(
        "transformers", attention, lambda plan: _trace_transformers(plan, published, attention), ("transformers",)
    )


def without_ignored(published: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """`published` without the keys that the user asked to ignore, "rope_scaling.KEY" among them."""
    kept = drop_ignored(published, ignored)
    for name, value in kept.items():
        if isinstance(value, dict):
            kept[name] = {key: inner for key, inner in value.items() if f"{name}.{key}" not in ignored}
    return kept


def trace(plan: ExportPlan, frontend: Frontend) -> ir.Model:
    """The template of `plan` as `frontend` traces it."""
    return frontend.tracer(plan)


def _trace_transformers(plan: ExportPlan, published: Mapping[str, Any], attention: str) -> ir.Model:
    from exporter.frontends.transformers_graph import flatten_products, rename, split_gate_and_up
    from exporter.frontends.transformers_model import make_template
    from exporter.frontends.transformers_step import TransformersStep

    template = make_template(plan, published, attention)
    step = TransformersStep(
        template.model, plan.kinds, additive=attention == "eager", layer_types=template.layer_types
    ).eval()
    model = exporter.trace.trace_step(step, plan)
    rename(model, experts=plan.config.moe is not None)
    exporter.trace.unbind(model, plan, template.inverse_frequency_d)
    split_gate_and_up(model)
    flatten_products(model)
    return model
