"""The arithmetic behind benchmarks/results/peers.md: no engine runs here."""

import math
from pathlib import Path

import pytest

from benchmarks.peers import tables
from benchmarks.peers.contestants import CHECKED, MEASURED, OURS
from benchmarks.peers.conversion import Conversion, last_words
from benchmarks.peers.figures import Samples, best_of, decode_figure, extent, log_probability, relative_difference
from benchmarks.peers.models import QUICK
from benchmarks.peers.window import Verdict, difference

MODEL = QUICK[0]
SHORT, LONG = decode_figure(MODEL.short), decode_figure(MODEL.long)


@pytest.fixture
def samples() -> dict[str, Samples]:
    """Cierzo at 30, 20 and 25 tokens/s, transformers at 5 in one round, and the others without a figure."""
    found = {one.name: Samples() for one in MEASURED}
    found[OURS].rates[SHORT] = [30.0, 20.0, 25.0]
    found["transformers fp32"].rates[SHORT] = [5.0]
    found["llama.cpp Q4_0"].rates[SHORT] = [10.0, 12.5, 50.0]
    return found


def test_medians_and_extent() -> None:
    one = Samples()
    one.rates["f"] = [4.0, 1.0, 2.0]
    assert one.medians() == {"f": 2.0}
    assert extent(one.rates["f"]) == "1 to 4 (3)"


def test_the_best_is_the_highest_of_those_who_have_the_figure() -> None:
    rates = {"a": {"f": 1.0}, "b": {"f": 3.0}, "c": {"g": 9.0}}
    assert best_of(rates, "f") == ("b", 3.0)
    assert best_of(rates, "h") is None


def test_ratios_are_ours_over_theirs(samples: dict[str, Samples]) -> None:
    rows = {row["engine"]: row for row in tables.ratios(MODEL, MEASURED, samples)}
    assert rows["transformers fp32"][SHORT] == 5.0
    assert rows["llama.cpp Q4_0"][SHORT] == 2.0
    assert rows[OURS][SHORT] == 1.0
    assert rows["Cierzo fp32"][SHORT] == "–"


def test_only_measured_figures_have_a_column(samples: dict[str, Samples]) -> None:
    rows = tables.speed(MODEL, MEASURED, samples)
    assert all(set(row) == {"engine", SHORT} for row in rows)
    assert [row[SHORT] for row in rows if row["engine"] == OURS] == [25.0]
    assert [row["engine"] for row in rows] == [one.name for one in MEASURED]


def test_the_sentence_names_the_best_peer_in_four_bits(samples: dict[str, Samples]) -> None:
    samples["transformers fp32"].rates[SHORT] = [1000.0]  # faster, but not in 4 bits
    (sentence,) = tables.sentences(MODEL, MEASURED, samples)
    assert "25.0 tokens/s, 2.00 × the best peer in 4 bits (llama.cpp Q4_0, 12.5)" in sentence


def test_failures_show_no_folder_of_this_machine(samples: dict[str, Samples]) -> None:
    work = Path("/somewhere/peers")
    made = {one.name: Conversion("", 0.0, 0, 0) for one in MEASURED}
    made[OURS] = Conversion("", 1.0, 1, 0, f"no such file | {work}/converted/x")
    samples["transformers fp32"].errors["256 tokens"] = "two\nlines"
    rows = tables.failures(MEASURED, samples, made, work)
    assert rows == [
        {"engine": OURS, "asked for": "conversion", "answer": "no such file / converted/x"},
        {"engine": "transformers fp32", "asked for": "256 tokens", "answer": "two lines"},
    ]


def test_memory_has_a_row_for_whoever_could_not_be_converted(samples: dict[str, Samples]) -> None:
    made = {one.name: Conversion("", 0.0, 0, 0, "refused") for one in MEASURED}
    made[OURS] = Conversion("somewhere", 12.0, 5 * 10**8, 10**9)
    samples[OURS].kv_bytes = {MODEL.long: 2 * 10**6, MODEL.far: 2 * 10**6}
    samples[OURS].load_seconds = [3.0, 1.0, 2.0]
    rows = {row["engine"]: row for row in tables.memory(MODEL, MEASURED, samples, made)}
    ours = rows.pop(OURS)
    assert (ours["convert s"], ours["convert peak MB"], ours["file MB"], ours["load s"]) == (12.0, 500.0, 1000.0, 2.0)
    assert ours[f"KV at {MODEL.far} MB"] == 2.0
    assert all(set(row.values()) == {row["engine"], "–"} for row in rows.values())


def test_differences_are_relative_to_the_largest_logit() -> None:
    assert relative_difference([1.0, -4.0], [1.0, -5.0]) == 0.2
    assert log_probability([math.log(3), 0.0], 0) == pytest.approx(math.log(0.75))


def test_an_engine_that_names_only_the_next_token_is_compared_by_its_log_probability() -> None:
    reference = {"logits": [math.log(3), 0.0]}
    named = {"token": 0, "logprob": 2 * math.log(0.75)}
    assert difference(named, reference) == pytest.approx(1.0)
    assert difference(named, named) == 0.0
    assert difference({"token": 1, "logprob": -1.0}, named) == 1.0


@pytest.mark.parametrize(
    "verdict, words",
    [
        (Verdict(1e-6, 1e-6, 0.0), "kept"),
        (Verdict(1e-6, 0.3, 0.0), "wrong"),
        (Verdict(1e-6, 1.5, 1.4), "ignored"),
        (Verdict(None, None, 0.001), "kept"),
        (Verdict(1e-6, error="no"), "fails past it"),
    ],
)
def test_verdicts(verdict: Verdict, words: str) -> None:
    assert verdict.words == words


def test_the_last_words_are_the_last_line_that_says_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n  the cause  \n\n", encoding="utf-8")
    assert last_words(log, 1) == "the cause"
    log.write_text("", encoding="utf-8")
    assert last_words(log, -9) == "ended with status -9"


def test_contestants_have_names_of_their_own_and_a_reference_first() -> None:
    for contestants in (MEASURED, CHECKED):
        assert len({one.name for one in contestants}) == len(contestants)
    assert OURS in {one.name for one in MEASURED}
    assert (CHECKED[0].worker, CHECKED[0].bits) == ("transformers", 32)
