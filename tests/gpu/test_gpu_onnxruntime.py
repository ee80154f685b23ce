"""The section onnxruntime of the script for a GPU: what it prepares, and what it finds of sessions on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.errors import BackendError
from runtime.loading import load
from tests.gpu import ort_parity, ort_prepare, ort_rival, ort_speed, report
from tests.gpu.bench import COPY, READ, Bench, HostClock
from tests.gpu.findings import Check, Notebook, Skip, Timing
from tests.gpu.kernel_trace import summary
from tests.gpu.ort_models import (
    FOLDER,
    HEADER,
    TWINS,
    Large,
    Twin,
    kv_bytes_of_a_token,
    read_texts,
    text_file,
    weight_bytes_of_a_token,
)
from tests.gpu.ort_speed import DECODE, DENSE, MIXTURE, Loaded, figure_name
from tests.gpu.ort_weights import made, read_shape
from tests.support.cuda_cpu import LIMITS, CpuLauncher
from tests.support.onnxruntime_gpu import run_python

TINY: dict[str, Any] = {
    **ort_prepare.LARGE[DENSE].config,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "sliding_window": 5,
    "vocab_size": 64,
}
"""The sizes of `make_checkpoint`, as in most tests: they share a trace."""
SHAPES = {
    DENSE: Large(TINY, {"chunk": 8, "max_batch": 1}, "bfloat16", target=0.8),
    MIXTURE: Large(
        {
            **ort_prepare.LARGE[MIXTURE].config,
            **{key: TINY[key] for key in TINY if key.endswith("_size") or key.startswith("num_")},
            "hidden_size": 64,  # quantised experts: multiples of 64
            "intermediate_size": 64,
            "num_local_experts": 4,
        },
        {"chunk": 8, "max_batch": 1, "context": 64, "weights": "int4", "quantizer": "rtn"},
        "float16",
    ),
}
TWIN = Twin({"vocab_size": 64}, window=5, chunk=8, arithmetic=("bfloat16",))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin and both shapes, with their engines."""
    folder = tmp_path_factory.mktemp("prepared")
    ort_prepare.prepare_onnxruntime(folder, lambda line: None, {"twin": TWIN}, SHAPES)
    return folder


@pytest.fixture
def bench() -> Bench:
    book = Notebook("onnxruntime", seed=3, say=lambda line: None)
    return Bench(torch, "cpu", HostClock(), book, CpuLauncher, LIMITS, 1 << 16, small=True)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions on the CPU in the place of engines."""
    for module in (ort_parity, ort_speed):
        monkeypatch.setattr(module, "load", lambda bundle, backend, engine=None: load(bundle, threads=1))


def failed(book: Notebook) -> list[Check]:
    return [finding for finding in book.findings if isinstance(finding, Check) and not finding.held]


def unexpected(book: Notebook) -> list[str]:
    return [finding.name for finding in book.findings if isinstance(finding, Skip) and not finding.expected]


# -- twins --


@pytest.mark.usefixtures("on_cpu")
def test_twins_are_held_against_reference_and_transformers(prepared: Path) -> None:
    book = Notebook("onnxruntime", seed=1, say=lambda line: None)
    ort_parity.check_twins(book, prepared)
    checks = [finding for finding in book.findings if isinstance(finding, Check)]
    assert not failed(book)
    assert len(checks) == 5 + 3 + 2 + 3, "lengths, rows, ways of feeding; loading, repeating, generating"
    assert sum(check.worst is not None and check.worst > 0 for check in checks) == 10


@pytest.mark.parametrize("side", ["truth", "transformers"])
def test_logits_that_are_others_are_seen(prepared: Path, side: str) -> None:
    path = prepared / FOLDER / "twins"
    text = read_texts(text_file(path, "twin", "bfloat16"))[-1]
    session = load(path / "twin", threads=1)
    assert ort_parity.share_of_budget(session, text) < 1
    rows = [row.copy() for row in getattr(text, side)]
    rows[0][-1, 3] += 1.5 * text.allowed
    other = replace(text, truth=rows) if side == "truth" else replace(text, transformers=rows)
    assert ort_parity.share_of_budget(session, other) > 1


def test_sessions_that_go_on_badly_are_seen(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such that choose another token than the highest logit says, and such that do not repeat themselves."""
    path = prepared / FOLDER / "twins"
    text = read_texts(text_file(path, "twin", "bfloat16"))[-1]
    session = load(path / "twin", threads=1)
    ort_parity._check_repeat(lambda: session, text)
    with monkeypatch.context() as patched:
        patched.setattr(session, "generate", lambda prompt, max_new_tokens, **_: iter([5] * max_new_tokens))
        with pytest.raises(AssertionError, match="below the highest logit"):
            ort_parity._check_generation(lambda: session, text)
    forward, fed = session.forward, iter(range(1000))
    monkeypatch.setattr(session, "forward", lambda rows: forward(rows) + np.float32(1e-6 * next(fed)))
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        ort_parity._check_repeat(lambda: session, text)


def test_what_was_not_prepared_is_said(tmp_path: Path) -> None:
    book = Notebook("onnxruntime", seed=1, say=lambda line: None)
    ort_parity.check_twins(book, None)
    ort_parity.check_twins(book, tmp_path)
    reasons = [finding.reason for finding in book.findings if isinstance(finding, Skip) and not finding.expected]
    assert [reason.partition(";")[0] for reason in reasons] == [
        "no bundles were given (--bundle)",
        f"{tmp_path} holds none for onnxruntime-cuda",
    ]


def test_the_twins_are_those_that_are_to_be_shown() -> None:
    settings = [twin.settings for twin in TWINS.values()]
    nemo = TWINS["nemo"].settings
    assert nemo["head_dim"] * nemo["num_heads"] != nemo["hidden_size"]
    for architecture in ("mistral", "mixtral"):
        own = [twin for twin in TWINS.values() if twin.settings.get("architecture", "mistral") == architecture]
        assert {twin.window is None for twin in own} == {True, False}
        assert {"bfloat16", "float16"} == {each for twin in own for each in twin.arithmetic}
    assert any("int4" in str(each) and "mixtral" in str(each) for each in settings)
    windows = [(twin.window, twin.chunk) for twin in TWINS.values() if twin.window is not None]
    assert {window < chunk for window, chunk in windows} == {True, False}


# -- weights --


def test_weights_are_made_where_they_are_needed(bench: Bench, prepared: Path, tmp_path: Path) -> None:
    large = prepared / FOLDER / "large"
    shape = read_shape(large, DENSE)
    assert not list(large.glob("*/*.safetensors")), "weights are not carried"
    bundle = made(bench, large, shape, tmp_path)
    tensors = load_file(bundle / "model.safetensors")
    assert not list(bundle.glob(f"*{HEADER}"))
    assert 0.8 < float(tensors["model.norm.weight"].mean()) < 1.2
    matrix = tensors["model.layers.1.mlp.up_proj.weight"].float()
    assert 0.018 < float(matrix.std()) < 0.022
    assert not torch.equal(matrix, tensors["model.layers.0.mlp.up_proj.weight"].float())
    before = (bundle / "model.safetensors").stat().st_mtime_ns
    assert made(bench, large, shape, tmp_path) == bundle
    assert (bundle / "model.safetensors").stat().st_mtime_ns == before, "they are there already"
    other = made(bench, large, read_shape(large, MIXTURE), tmp_path)
    assert not bundle.exists(), "there may not be room for both"
    packed = {name: tensor for name, tensor in load_file(other / "weights.safetensors").items() if "packed" in name}
    assert all(len(set(tensor.flatten().tolist())) > 200 for tensor in packed.values())
    again = load_file(made(bench, large, shape, tmp_path) / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items()), "they are those of the seed"


def test_bytes_that_a_token_reads(bench: Bench, prepared: Path, tmp_path: Path) -> None:
    large = prepared / FOLDER / "large"
    for name, own in ((DENSE, 1.0), (MIXTURE, 2 / 4)):
        shape = read_shape(large, name)
        (path,) = [made(bench, large, shape, tmp_path) / file for file in shape.files]
        tensors = load_file(path)
        read = {key: tensor.nbytes for key, tensor in tensors.items() if tensor.ndim > 1 and "embed" not in key}
        counted = sum(nbytes * (own if ".moe." in key and "router" not in key else 1) for key, nbytes in read.items())
        assert weight_bytes_of_a_token(shape.config, shape.bits) == counted
    assert kv_bytes_of_a_token(TINY, 2) == 2 * 2 * 2 * 2 * 8 * 3, "bytes, layers, both, heads, head dim, tokens"
    assert kv_bytes_of_a_token(TINY, 500) == kv_bytes_of_a_token(TINY, 4), "no more than the window"


# -- speed and memory --


@pytest.mark.usefixtures("on_cpu")
def test_published_shapes_from_the_first_token_to_the_comparison(bench: Bench, prepared: Path, tmp_path: Path) -> None:
    large, book = prepared / FOLDER / "large", bench.book
    for ceiling in (COPY, READ):
        book.fact(ceiling, 20.0)
    ort_speed.measure_dense(bench, large, read_shape(large, DENSE), tmp_path)
    ort_rival.compare(bench, large, read_shape(large, DENSE), tmp_path)
    ort_speed.measure_mixture(bench, large, read_shape(large, MIXTURE), tmp_path)
    assert not failed(book)
    assert not unexpected(book)
    timings = {(finding.name, finding.against): finding for finding in book.findings if isinstance(finding, Timing)}
    assert all(timing.figure > 0 for timing in timings.values())
    targets = {(name, against): timing.target for (name, against), timing in timings.items() if timing.target}
    assert targets == {
        (f"{DENSE}, bfloat16, decode at batch 1", "the copy's bandwidth"): 0.8,
        (f"{DENSE}, bfloat16, decode at batch 1", "the read bandwidth"): 0.8,
        (f"{DENSE}, decode beside transformers", "transformers, static cache and torch.compile"): 1.2,
        (f"{DENSE}, prefill beside transformers", "transformers' sdpa"): 1.0,
    }
    beside = timings[f"{DENSE}, decode beside transformers", "transformers, static cache and torch.compile"]
    theirs = timings[f"{DENSE}, transformers, static cache and torch.compile", ""]
    assert beside.share == pytest.approx(beside.figure / theirs.figure)
    assert beside.figure == book.known[figure_name(DENSE, DECODE)]
    assert book.known[f"{DENSE}: KV bytes after {96 + 6} tokens"] > 0
    held = {finding.name for finding in book.findings if isinstance(finding, Check) and finding.held}
    assert f"{DENSE}: the last logits of a text behind the window, within the budget of transformers" in held


@pytest.mark.usefixtures("on_cpu")
def test_logits_of_the_comparison_that_are_others(bench: Bench, prepared: Path, tmp_path: Path) -> None:
    """Those of a model without a window, as its session would leave them, exceed the budget by far."""
    large, shape = prepared / FOLDER / "large", read_shape(prepared / FOLDER / "large", DENSE)
    rival = ort_rival.Rival(bench, shape, lambda: model)
    model = ort_rival._load(bench, made(bench, large, shape, tmp_path), shape)
    lengths = ort_speed.lengths_of(bench)
    assert shape.config["sliding_window"] < lengths.crossing - lengths.compared
    unlimited = ort_rival._last_logits(bench, model, shape, lengths)
    assert unlimited.shape == (lengths.compared, shape.config["vocab_size"])
    assert ort_rival._share_of_budget(rival, unlimited) > 1


def test_speeds_and_logits_that_are_not_known(bench: Bench, prepared: Path, tmp_path: Path) -> None:
    large = prepared / FOLDER / "large"
    ort_rival.compare(bench, large, read_shape(large, DENSE), tmp_path)
    assert unexpected(bench.book) == [
        f"{DENSE}: prefill beside transformers",
        f"{DENSE}: the last logits of a text behind the window, within the budget of transformers",
        f"{DENSE}: decode beside transformers",
    ]
    assert not failed(bench.book)


@pytest.mark.usefixtures("on_cpu")
def test_memory_that_grows_is_seen(
    bench: Bench, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = prepared / FOLDER / "large"
    loaded = Loaded(bench, large, read_shape(large, DENSE), tmp_path)
    growing = iter(range(1000))
    monkeypatch.setattr(type(loaded.session()), "kv_bytes", property(lambda session: next(growing)))
    with pytest.raises(AssertionError, match=r"KV bytes were \[0, 1, 2"):
        ort_speed._watch_memory(bench, loaded)


def test_a_session_that_does_not_load(bench: Bench, prepared: Path, tmp_path: Path) -> None:
    """There is no GPU here. A process that ended while it loaded is not followed by another one that tries."""
    large = prepared / FOLDER / "large"
    ort_speed.measure_dense(bench, large, read_shape(large, DENSE), tmp_path)
    (check,) = [finding for finding in bench.book.findings if isinstance(finding, Check)]
    assert not check.held
    assert "BackendError" in check.said
    (tmp_path / f"{DENSE}.loading").touch()
    with pytest.raises(BackendError, match="ended a process before this one"):
        Loaded(bench, large, read_shape(large, DENSE), tmp_path).session()


def test_kernels_are_counted_for_one_run() -> None:
    events = [("gemm", 30.0, True), ("gemm", 50.0, True), ("norm", 4.0, True), ("cudaGraphLaunch", 9.0, False)] * 2
    assert summary([*events, ("aten::mm", 5.0, False)], rounds=2) == (
        "3 on the device in 84 µs; launches: 1 cudaGraphLaunch; 2 × gemm 80.0 µs; 1 × norm 4.0 µs"
    )


# -- the whole section, with the library itself --


def test_the_section_runs_to_its_end_on_a_stand_in_for_a_gpu(prepared: Path, tmp_path: Path) -> None:
    """Its kernels compute nothing, so checks must fail; the report has all of them and says so."""
    job = ["--rehearsal", "--only", "onnxruntime", "--bundle", str(prepared), "--out", str(tmp_path), "--seed", "5"]
    ran = run_python("from tests.gpu.script import main\nanswer = main(job)", job)
    assert ran.answer == report.FAILED
    document = json.loads((tmp_path / "onnxruntime_cuda.json").read_text())
    checks = {check["name"]: check for check in document["checks"]}
    for name in ("twin, bfloat16: loads", f"{DENSE}: loads", f"{MIXTURE}: loads"):
        assert checks[name]["held"], checks[name]["said"]
    assert not checks[f"{DENSE}: computes"]["held"]
    assert "process" not in " ".join(check["said"] for check in document["checks"]), "none ended before its time"
    assert {timing["target"] for timing in document["timings"]} >= {0.8, 1.0, 1.2}
    assert "1.31" in document["facts"]["onnxruntime"]
    assert "# ONNX Runtime engines on a GPU" in (tmp_path / "onnxruntime_cuda.md").read_text()
