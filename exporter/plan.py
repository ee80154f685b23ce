"""What will be built: every decision of an export, made once and before anything is traced."""

from __future__ import annotations

from dataclasses import dataclass, replace

from exporter.defaults import DEFAULT_CHUNK, DEFAULT_CONTEXT, DEFAULT_MAX_BATCH, KV_KINDS, LEAST_CHUNK
from graph_passes.ops.moe import MOST_NUMBERS
from reference.config import ModelConfig
from runtime.errors import ExportError

_TWIN_SIZES = (31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83)
"""Primes, so that none is a product of other sizes; the smallest that are free keep a twin of many experts small."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Sizes and layer kinds of one engine.

    kinds: the distinct windows of the layers, in order of first use; None is full causal attention. Layers of one
        kind have the same graph and are traced once.
    kind_of_layer: index into `kinds` for each layer.
    chunk: C, the most tokens of a row that one step takes.
    context: positions that a full-attention buffer holds; None when every layer slides.
    max_batch: the most rows that a session may have.
    kv: type of the KV buffers, one of `exporter.defaults.KV_KINDS`.
    """

    config: ModelConfig
    kinds: tuple[int | None, ...]
    kind_of_layer: tuple[int, ...]
    chunk: int
    context: int | None
    max_batch: int
    kv: str = KV_KINDS[0]

    def capacity(self, kind: int) -> int:
        """Ring slots of a layer kind: W + C − 1, since a chunk is written before it is attended to; or the context."""
        window = self.kinds[kind]
        if window is not None:
            return window + self.chunk - 1
        assert self.context is not None
        return self.context

    @property
    def template(self) -> ModelConfig:
        """The model that is traced: one layer of each kind."""
        return replace(self.config, num_layers=len(self.kinds), layer_windows=self.kinds)

    @property
    def twin(self) -> ExportPlan | None:
        """The same plan with small experts, where the plan's own are too large to be run in a proof; else None.

        The twin's hidden and intermediate size are no other size of the model: each stands for one size only.
        """
        config = self.config
        if config.moe is None or config.moe.num_experts * config.hidden_size * config.intermediate_size <= MOST_NUMBERS:
            return None
        heads = {config.num_heads, config.num_kv_heads, config.num_heads // config.num_kv_heads}
        taken = {config.vocab_size, config.moe.num_experts, config.moe.top_k, *heads, *filter(None, self.kinds)}
        taken |= {self.capacity(kind) for kind in range(len(self.kinds))}
        taken |= {width * n for n in {1, *heads} for width in (config.head_dim, config.head_dim // 2)}
        hidden, intermediate = [n for n in _TWIN_SIZES if not taken & {n, 2 * n}][:2]
        return replace(self, config=replace(config, hidden_size=hidden, intermediate_size=intermediate))


def make_plan(
    config: ModelConfig,
    *,
    chunk: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    context: int | None = None,
    kv: str = KV_KINDS[0],
) -> ExportPlan:
    """Fill in the defaults; raises ExportError for a number that is none or below 1, or a context past the model's end.

    chunk defaults to 256 tokens, but not more than the smallest window (nor less than 16): the ring holds W + C − 1
    positions, and a chunk far larger than the window would make it mostly slack. It is never more than the context,
    since no step can have more tokens. context defaults to the checkpoint's max_position_embeddings, at most 4096;
    where every layer slides it has no meaning, as any length runs in the same memory, and the plan has None.
    """
    for name, number in (("chunk", chunk), ("max_batch", max_batch), ("context", context)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ExportError(f"{name} is {number!r}, but must be a whole number of at least 1.")
    limit = config.position_limit
    if context is not None and limit is not None and context > limit:
        raise ExportError(
            f"context is {context:,}, but with RoPE of type {config.rope.type} this model is a fixed function of its "
            f"tokens up to position {limit:,} only. Ask for no more than that."
        )
    kinds = tuple(dict.fromkeys(config.layer_windows))
    windows = [window for window in kinds if window is not None]
    context = (context or min(config.max_position_embeddings, DEFAULT_CONTEXT)) if None in kinds else None
    if chunk is None:
        chunk = min(DEFAULT_CHUNK, max(LEAST_CHUNK, min(windows, default=DEFAULT_CHUNK)))
    if context is not None:
        chunk = min(chunk, context)
    kind_of_layer = tuple(kinds.index(window) for window in config.layer_windows)
    if kv not in KV_KINDS:
        raise ExportError(f"kv = {kv!r} is no type that KV buffers can have ({', '.join(KV_KINDS)}).")
    return ExportPlan(config, kinds, kind_of_layer, chunk, context, max_batch, kv)
