"""Checkpoints and bundles that tests share, made once per process.

Tracing takes seconds and depends only on the shape of the model: not on chunk, context, number of layers or weights.
So traces are shared as well, between all bundles of one template and front end. A test of the exporter holds a bundle
made this way equal, byte for byte, to one made without.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch

import exporter.compile
from exporter.frontends import REFERENCE, Frontend, trace
from exporter.plan import ExportPlan
from exporter.trace import INVERSE_FREQUENCIES
from reference.checkpoint import Checkpoint, open_checkpoint
from reference.config import ModelConfig, RopeConfig
from reference.rope import inverse_frequencies
from reference.weights import EMBEDDING, LM_HEAD
from runtime import Session, load
from tests.support.checkpoints import make_checkpoint

torch.set_num_threads(1)
logging.getLogger("torch.__trace").propagate = False  # thousands of records per trace, which pytest would collect

_ROOT = tempfile.TemporaryDirectory(prefix="cierzo-bundles-")
_traces: dict[tuple[str, str | None, ModelConfig], ir.Model] = {}
_made: dict[str, Path] = {}


@dataclass(frozen=True, slots=True)
class Exported:
    """A checkpoint and the bundle that was made from it. Tests read both and change neither."""

    checkpoint: Path
    bundle: Path

    def opened(self) -> Checkpoint:
        """The checkpoint, open."""
        return open_checkpoint(self.checkpoint, text_only=True)

    def session(self) -> Session:
        """A fresh session on one thread."""
        return load(self.bundle, threads=1)


def checkpoint(**settings: Any) -> Path:
    """`make_checkpoint(**settings)`, once."""
    return _once(f"checkpoint {sorted(settings.items())}", lambda folder: make_checkpoint(folder, **settings))


def exported(
    *,
    chunk: int = 4,
    context: int | None = None,
    max_batch: int = 4,
    frontend: str = "reference",
    attention: str | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Exported:
    """The bundle of `checkpoint(**settings)` with these options, once; every fusion in it was proved.

    options: further ones of `exporter.export`, for example of quantised weights.
    """
    source = checkpoint(**settings)

    def make(folder: Path) -> None:
        with shared_traces():
            exporter.compile.export(
                source,
                folder,
                chunk=chunk,
                context=context,
                max_batch=max_batch,
                frontend=frontend,
                attention=attention,
                **(options or {}),
            )

    more = sorted((options or {}).items())
    key = f"bundle {source.name} {chunk} {context} {max_batch} {frontend} {attention} {more}"
    return Exported(source, _once(key, make))


@contextlib.contextmanager
def shared_traces() -> Iterator[None]:
    """Within this block an export traces only those templates that no export before it has traced."""
    with mock.patch.object(exporter.compile, "trace", trace_once):
        yield


def trace_once(plan: ExportPlan, frontend: Frontend = REFERENCE) -> ir.Model:
    """A copy of the trace of the plan's template.

    Two spellings of one config.json share it, since they are one template: see test_frontend_transformers.py.
    """
    config = replace(plan.template, dtype="float32")  # how the weights are stored is no matter of the graph
    if frontend != REFERENCE:
        return _traced((frontend.name, frontend.attention, config), plan, frontend)
    # Nor are names and ids, and of RoPE only the factor is. Its frequencies, and that the head reads the embedding, are
    # filled in after the tracing. test_shared_traces.py holds the result equal to what is traced at once.
    config = replace(
        config,
        architecture="mistral" if config.moe is None else "mixtral",
        tie_word_embeddings=False,
        rope=RopeConfig(theta=1e4, attention_factor=config.rope.attention_factor),
        max_position_embeddings=1,
        position_limit=None,
        bos_token_id=None,
        eos_token_ids=(),
    )
    untied = replace(plan, config=replace(plan.config, tie_word_embeddings=False))
    model = _traced((frontend.name, frontend.attention, config), untied, frontend)
    if plan.config.tie_word_embeddings:
        head = model.graph.initializers.pop(LM_HEAD)
        ir.convenience.replace_all_uses_with(head, model.graph.initializers[EMBEDDING])
    frequencies = inverse_frequencies(plan.config.rope, plan.config.head_dim).numpy()
    model.graph.initializers[INVERSE_FREQUENCIES].const_value = ir.tensor(frequencies, name=INVERSE_FREQUENCIES)
    return model


def _traced(key: tuple[str, str | None, ModelConfig], plan: ExportPlan, frontend: Frontend) -> ir.Model:
    if key not in _traces:
        _traces[key] = trace(plan, frontend)
    return _traces[key].clone()


def _once(key: str, make: Callable[[Path], object]) -> Path:
    if key not in _made:
        folder = Path(_ROOT.name) / str(len(_made))
        make(folder)
        _made[key] = folder
    return _made[key]
