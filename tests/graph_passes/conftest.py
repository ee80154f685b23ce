"""The traced templates: made once for all tests of this folder, since a trace takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from exporter.compile import expected_fusions
from exporter.plan import ExportPlan, make_plan
from exporter.trace import trace
from reference.config import ModelConfig
from tests.support.graphs import Arrays

BASE = {
    "vocab_size": 29,
    "hidden_size": 20,
    "intermediate_size": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "sliding_window": 5,
}
TOKENS = 4


@dataclass(frozen=True, slots=True)
class Template:
    """A traced template; `model()` is a copy that a test may change."""

    plan: ExportPlan
    traced: ir.Model

    def model(self) -> ir.Model:
        return self.traced.clone()

    @property
    def expected(self) -> Mapping[str, int]:
        """How often each rule must fire."""
        return expected_fusions(self.plan, len(self.plan.kinds))

    def feeds(self) -> Arrays:
        """A row that begins, one that is partly padding, one far behind the window: past the third wrap of its ring."""
        rng = np.random.default_rng(0)
        config, sizes = self.plan.config, {None: 48, 5: 5 + TOKENS - 1}
        feeds: Arrays = {
            "input_ids": rng.integers(0, config.vocab_size, (3, TOKENS)),
            "start_positions": np.array([0, 3, 29], np.int64),
            "token_counts": np.array([4, 2, 4], np.int64),
            "logit_positions": np.tile(np.arange(TOKENS), (3, 1)),
        }
        for kind, window in enumerate(self.plan.kinds):
            shape = (3, config.num_kv_heads, sizes[window], config.head_dim)
            for name in ("key", "value"):
                feeds[f"past.{kind}.{name}"] = rng.standard_normal(shape, dtype=np.float32)
        return feeds


def _template(config: ModelConfig) -> Template:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        plan = make_plan(config, chunk=TOKENS)
        return Template(plan, trace(plan))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def dense() -> Template:
    """Two kinds of layers, one with a window of 5 and one with full attention."""
    config = ModelConfig.from_hf({**BASE, "model_type": "mistral", "num_hidden_layers": 2})
    return _template(replace(config, layer_windows=(5, None)))


@pytest.fixture(scope="session")
def mixture() -> Template:
    """One kind of layer, with 4 experts of which a token visits 2."""
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _template(ModelConfig.from_hf({**BASE, **moe, "model_type": "mixtral", "num_hidden_layers": 3}))


@pytest.fixture(params=["dense", "mixture"])
def template(request: pytest.FixtureRequest) -> Template:
    """Each of the two in turn."""
    made: Template = request.getfixturevalue(request.param)
    return made
