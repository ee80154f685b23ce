"""The pytest plugin, in runs of its own: options, configuration, the fixture, golden files and their update."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.prompt_parity import PromptParity
from tests.layout.imports import ROOT
from tests.support.bundles import Exported, exported

pytest_plugins = ["pytester"]

TESTS = """
    def test_prompts(cierzo_parity):
        held = cierzo_parity.check([[5, 6, 7], [8, 9]], max_new_tokens=4)
        assert [one.prompt_ids for one in held] == [(5, 6, 7), (8, 9)]

    def test_golden(cierzo_parity):
        cierzo_parity.golden("numbers", [5, 6, 7], max_new_tokens=6)
"""


@pytest.fixture(scope="module")
def case() -> Exported:
    made = exported(num_layers=1, seed=5)
    PromptParity(made.bundle).check([[5]], max_new_tokens=1)  # what torch imports late must outlive the runs below
    return made


def run(pytester: pytest.Pytester, *options: str | Path) -> pytest.RunResult:
    # As the entry point would load it, whether or not this environment has it installed.
    plugin = ("-p", "no:cierzo", "-p", "exporter.pytest_plugin", "-p", "no:cacheprovider")
    return pytester.runpytest_inprocess(*plugin, *options)


def test_a_team_s_tests(case: Exported, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    first = run(pytester, "--cierzo-bundle", case.bundle)
    first.assert_outcomes(passed=1, failed=1)
    first.stdout.fnmatch_lines(["*There is no golden file *numbers.json yet*--cierzo-update-golden*"])
    assert "Traceback" not in first.stdout.str()
    run(pytester, "--cierzo-bundle", case.bundle, "--cierzo-update-golden").assert_outcomes(passed=2)
    golden = pytester.path / "golden" / "numbers.json"
    assert len(json.loads(golden.read_text())["new_ids"]) == 6
    run(pytester, "--cierzo-bundle", case.bundle).assert_outcomes(passed=2)

    document = json.loads(golden.read_text())
    document["new_ids"][1] = (document["new_ids"][1] + 1) % 64
    golden.write_text(json.dumps(document))
    changed = run(pytester, "--cierzo-bundle", case.bundle)
    changed.assert_outcomes(passed=1, failed=1)
    changed.stdout.fnmatch_lines(
        ["numbers.json and the engine differ from new token 1 on:", "*golden: *", "*engine: *"]
    )


def test_settings_come_from_the_configuration_too(case: Exported, pytester: pytest.Pytester) -> None:
    (pytester.path / "models").mkdir()
    (pytester.path / "models" / "here").symlink_to(case.bundle)
    (pytester.path / "models" / "checkpoint").symlink_to(case.checkpoint)
    pytester.makeini("[pytest]\ncierzo_bundle = models/here\ncierzo_checkpoint = models/checkpoint\n")
    pytester.makepyfile(TESTS.split("def test_golden")[0])
    run(pytester).assert_outcomes(passed=1)
    wrong = run(pytester, "--cierzo-checkpoint", pytester.path)
    wrong.assert_outcomes(failed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "*needs a bundle: --cierzo-bundle BUNDLE, or cierzo_bundle in pytest's configuration.*"),
        (("--cierzo-bundle", "nowhere"), "*nowhere*"),
        (("--cierzo-bundle", "{bundle}", "--cierzo-backend", "abacus"), "*abacus*"),
    ],
)
def test_what_cannot_be_run_says_so(
    case: Exported, pytester: pytest.Pytester, options: tuple[str, ...], message: str
) -> None:
    pytester.makepyfile(TESTS)
    result = run(pytester, *(option.format(bundle=case.bundle) for option in options))
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines([message])
    assert "Traceback" not in result.stdout.str()


@pytest.mark.parametrize("name", ["../elsewhere", "", ".hidden", "a\n", "é" * 101, None])
def test_a_golden_file_stays_in_its_folder(case: Exported, pytester: pytest.Pytester, name: str | None) -> None:
    pytester.makepyfile(f"""
        def test_golden(cierzo_parity):
            cierzo_parity.golden({name!r}, [5, 6, 7])
    """)
    result = run(pytester, "--cierzo-bundle", case.bundle)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["* cannot name a golden file*200 bytes at most*"])


def test_two_prompts_of_one_name_are_found(case: Exported, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("first", [5, 6])
        def test_golden(cierzo_parity, first):
            cierzo_parity.golden("same", [first, 7], max_new_tokens=2)
    """)
    result = run(pytester, "--cierzo-bundle", case.bundle, "--cierzo-update-golden")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["same.json is the golden file of another prompt already*"])


def test_a_near_tie_is_recorded(case: Exported, pytester: pytest.Pytester) -> None:
    pytester.makeconftest("import exporter.prompt_parity\nexporter.prompt_parity.NEAR_TIE = 1e9\n")
    pytester.makepyfile(TESTS)
    run(pytester, "--cierzo-bundle", case.bundle, "--cierzo-update-golden").assert_outcomes(passed=2)
    golden = pytester.path / "golden" / "numbers.json"
    document = json.loads(golden.read_text())
    document["new_ids"][1] = (document["new_ids"][1] + 1) % 64
    golden.write_text(json.dumps(document))
    run(pytester, "--cierzo-bundle", case.bundle, "--junit-xml", "junit.xml").assert_outcomes(passed=2)
    assert 'value="numbers: new token 1"' in (pytester.path / "junit.xml").read_text()


def test_the_plugin_imports_nothing_until_a_test_asks(tmp_path: Path) -> None:
    code = "import exporter.pytest_plugin, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=None)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "pytest" in loaded
    assert not loaded & {"numpy", "torch", "onnx", "onnxruntime", "click", "rich", "runtime", "reference"}


def test_the_plugin_is_an_entry_point() -> None:
    import tomllib

    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert document["project"]["entry-points"]["pytest11"] == {"cierzo": "exporter.pytest_plugin"}
