"""How far a quantised engine is from the original, in figures that are worked out here by another way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from exporter import quality
from exporter.cli import cli
from exporter.quality import MOST_KL, divergence, measure_quality, quality_check
from exporter.validation_report import Quality
from reference.oracle import Oracle
from runtime.errors import InputError, TokenizerError
from tests.support.bundles import Exported, exported
from tests.support.checkpoints import load_oracle, oracle_logits

TEXT = "A wind from the north-west, dry and cold, which comes down the valley of the Ebro."


@pytest.fixture(scope="module")
def quantised() -> Exported:
    return exported(options={"weights": "int4"}, tokenizer=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def run(*arguments: str | Path | float) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def by_definition(p_logits: list[float], q_logits: list[float]) -> float:
    p_sum, q_sum = (math.fsum(math.exp(x) for x in logits) for logits in (p_logits, q_logits))
    pairs = zip(p_logits, q_logits, strict=True)
    return math.fsum(
        math.exp(a) / p_sum * (math.log(math.exp(a) / p_sum) - math.log(math.exp(b) / q_sum)) for a, b in pairs
    )


def test_the_divergence_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    p, q = (3 * rng.standard_normal((70, 9)).astype(np.float32) for _ in range(2))
    want = [by_definition(a.tolist(), b.tolist()) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(divergence(p, q), want, rtol=1e-9)
    assert not divergence(p, p).any()
    assert np.isfinite(divergence(p + 1e4, q - 1e4)).all(), "large logits do not overflow"


def test_the_engines_own_text(quantised: Exported) -> None:
    """As long as the constant says, from the beginning of a text, and the same one for the same seed."""
    original = Oracle(quantised.opened())
    session = quantised.session()
    found = measure_quality(session, original, text=None, seed=3)
    assert (found.source, found.tokens) == ("the engine's own", quality.MOST_TOKENS)
    assert found.perplexity_ratio is None
    assert 0 < found.kl < MOST_KL["int4"]
    assert 0.5 < found.agreement < 1
    assert measure_quality(session, original, text=None, seed=3) == found
    assert measure_quality(session, original, text=None, seed=4) != found


def test_a_users_text(quantised: Exported, text: Path) -> None:
    """Against transformers for the original, and a plain computation of every figure."""
    session = quantised.session()
    found = measure_quality(session, Oracle(quantised.opened()), text=text, seed=0)
    row = list(session.tokenizer.encode(TEXT))
    assert (found.source, found.tokens) == ("text.txt", len(row))
    theirs = oracle_logits(load_oracle(quantised.checkpoint), torch.tensor([row]))[0].double()
    session.reset()
    ours = torch.from_numpy(session.forward([row])[0].copy()).double()
    log_p, log_q = theirs.log_softmax(-1), ours.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(kl), rel=1e-3)
    assert found.agreement == float((theirs.argmax(-1) == ours.argmax(-1)).double().mean())
    following = torch.tensor(row[1:])[:, None]
    better = (log_p[:-1].gather(1, following) - log_q[:-1].gather(1, following)).mean().exp()
    assert found.perplexity_ratio == pytest.approx(float(better), rel=1e-4)


def test_a_long_text_is_cut(quantised: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MOST_READ", 20)
    (tmp_path / "long.txt").write_text(TEXT * 3, encoding="utf-8")
    found = measure_quality(quantised.session(), Oracle(quantised.opened()), text=tmp_path / "long.txt", seed=0)
    assert found.tokens == 20


def test_a_text_ends_where_the_rings_end(tmp_path: Path) -> None:
    case = exported(options={"weights": "int8"}, tokenizer=True, window=None, context=30)
    (tmp_path / "long.txt").write_text(TEXT, encoding="utf-8")
    for text in (tmp_path / "long.txt", None):
        found = measure_quality(case.session(), Oracle(case.opened()), text=text, seed=0)
        assert found.tokens == 30
        assert found.kl < MOST_KL["int8"]


def test_weights_that_are_the_originals_cost_nothing() -> None:
    case = exported(tokenizer=True)
    found = measure_quality(case.session(), Oracle(case.opened()), text=None, seed=0)
    assert found.kl < 1e-9
    assert found.agreement == 1.0


@pytest.mark.parametrize(
    ("kind", "max_kl", "kl", "passed"),
    [
        ("int4", None, 0.49, True),
        ("int4", None, 0.51, False),
        ("int8", None, 0.06, False),
        ("stored", None, 0.49, True),
        ("int4", 0.01, 0.02, False),
        ("int8", 0.2, 0.1, True),
        ("int4", 0.0, 0.0, True),
        ("int4", None, float("nan"), False),
    ],
)
def test_the_limit(kind: str, max_kl: float | None, kl: float, passed: bool) -> None:
    check = quality_check(Quality("text.txt", 100, kl, 0.9, 1.02), kind, max_kl)
    assert check.passed is passed
    assert "the same best token at 90.0% of 100 positions, perplexity × 1.020, on this text: text.txt" in check.detail
    assert "perplexity" not in quality_check(Quality("own", 100, kl, 0.9, None), kind, max_kl).detail


def test_what_cannot_be_read_is_refused(quantised: Exported, tmp_path: Path, text: Path) -> None:
    original = Oracle(quantised.opened())
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty").write_text("")
    for name, said in (("latin", "cannot be read"), ("gone", "cannot be read"), ("empty", "at least 2")):
        with pytest.raises(InputError, match=said):
            measure_quality(quantised.session(), original, text=tmp_path / name, seed=0)
    silent = exported(options={"weights": "int4"})
    with pytest.raises(TokenizerError):
        measure_quality(silent.session(), Oracle(silent.opened()), text=text, seed=0)


def test_the_commands_options(quantised: Exported, text: Path, tmp_path: Path) -> None:
    """A limit that the weights keep, one that they do not, and texts that there are none of."""
    right = run("validate", quantised.bundle, "--text", text, "--max-kl", 0.5, "--json", "--no-receipt")
    assert right.exit_code == 0, right.output
    found: dict[str, Any] = json.loads(right.stdout)
    assert found["quality"]["source"] == "text.txt"
    assert found["quality"]["perplexity_ratio"] > 0
    half = found["quality"]["kl"] / 2
    wrong = run("validate", quantised.bundle, "--text", text, "--max-kl", half, "--json", "--no-receipt")
    assert wrong.exit_code == 1
    failed = [check["name"] for check in json.loads(wrong.stdout)["checks"] if check["status"] == "failed"]
    assert failed == ["quality against the original"]
    assert run("validate", quantised.bundle, "--max-kl", -1).exit_code == 2
    assert run("validate", quantised.bundle, "--text", tmp_path / "gone").exit_code == 2


def test_without_quantised_weights_a_text_is_refused(text: Path) -> None:
    """Silently not looking at it would look like an approval."""
    case = exported(tokenizer=True)
    for options in (("--text", text), ("--max-kl", 0.1)):
        result = run("validate", case.bundle, *options)
        assert result.exit_code == 2
        assert "are for quantised weights" in result.stderr
