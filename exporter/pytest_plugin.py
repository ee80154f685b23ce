"""The pytest plugin: the fixture `cierzo_parity` holds an engine against its reference on a team's own prompts.

    def test_support_questions(cierzo_parity):
        cierzo_parity.check(["How do I reset my password?", "Where is my parcel?"], max_new_tokens=64)

    def test_greeting(cierzo_parity):
        cierzo_parity.golden("greeting", "One windy morning,")

pytest loads this file in every run where Cierzo is installed, so that nothing but pytest is imported until a test asks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from exporter.prompt_parity import HeldPrompt, Prompt, PromptParity

GOLDEN_FOLDER = "golden"
"""Beside the test's file."""

MOST_NAME = 200
"""Bytes of a golden file's name: a file system takes 255, with the ending."""

_SETTINGS = {
    "bundle": "The bundle that the fixture cierzo_parity runs.",
    "checkpoint": "The checkpoint that it is held against, by default the one that the bundle was made from.",
    "backend": "What runs the bundle, by default the first that Cierzo has.",
    "engine": "Which engine that `cierzo build` made, for a backend that runs those.",
    "weights-folder": "Where the checkpoint's files are, if they were moved after the export.",
}
_PATHS = ("bundle", "checkpoint", "weights-folder")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Every setting is an option and a line of pytest's configuration; a path in that is relative to its folder."""
    group = parser.getgroup("cierzo", "parity of engines (Cierzo)")
    for name, text in _SETTINGS.items():
        group.addoption(f"--cierzo-{name}", metavar=name.split("-")[-1].upper(), help=text)
        parser.addini(f"cierzo_{name.replace('-', '_')}", text, type="string", default="")
    group.addoption(
        "--cierzo-update-golden",
        action="store_true",
        help="Write the golden files anew, from an engine that is found right on their prompts.",
    )


class CierzoParity:
    """What a test gets."""

    def __init__(self, parity: PromptParity, node: pytest.Item, *, update: bool) -> None:
        self._parity, self._node, self._update = parity, node, update

    def check(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 32) -> tuple[HeldPrompt, ...]:
        """Hold prompts, and what the engine writes after them, against the reference by the error budget.

        A prompt is text, token ids, or the messages of a chat. Fails the test where a logit is beyond the budget.
        """
        __tracebackhide__ = True
        return self._run(self._parity.check, prompts, max_new_tokens=max_new_tokens)  # type: ignore[no-any-return]

    def golden(self, name: str, prompt: Prompt, *, max_new_tokens: int = 32) -> None:
        """Hold the greedy continuation against golden/NAME.json beside the test; fails unless a near-tie explains it.

        An accepted near-tie is recorded among the test's properties, which JUnit reports show.
        """
        __tracebackhide__ = True
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*", name) or len(name.encode()) > MOST_NAME:
            pytest.fail(
                f"{name!r} cannot name a golden file: letters, digits, `_`, `-` and `.` only, {MOST_NAME} bytes at "
                "most.",
                pytrace=False,
            )
        file = self._node.path.parent / GOLDEN_FOLDER / f"{name}.json"
        tied = self._run(self._parity.golden, file, prompt, max_new_tokens=max_new_tokens, update=self._update)
        if tied is not None:
            self._node.user_properties.append(("cierzo near-tie", f"{name}: new token {tied}"))

    def _run(self, work: Any, *arguments: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        from runtime.errors import CierzoError

        try:
            return work(*arguments, **options)
        except CierzoError as error:
            message = str(error)
        return pytest.fail(message, pytrace=False)


@pytest.fixture(scope="session")
def cierzo_prompt_parity(pytestconfig: pytest.Config) -> PromptParity:
    """The bundle and its reference, once for all tests."""
    found = {name: _setting(pytestconfig, name) for name in _SETTINGS}
    if found["bundle"] is None:
        pytest.fail("The fixture cierzo_parity needs a bundle: --cierzo-bundle BUNDLE, or cierzo_bundle in pytest's "
                    "configuration.", pytrace=False)  # fmt: skip
    from exporter.prompt_parity import PromptParity
    from runtime.errors import CierzoError

    folder = found["weights-folder"]
    try:
        return PromptParity(
            found["bundle"],
            found["checkpoint"],
            backend=found["backend"],
            engine=found["engine"],
            weights_folder=None if folder is None else Path(folder),
        )
    except CierzoError as error:
        message = str(error)
    return pytest.fail(message, pytrace=False)


@pytest.fixture
def cierzo_parity(request: pytest.FixtureRequest, cierzo_prompt_parity: PromptParity) -> CierzoParity:
    """Holds the bundle of --cierzo-bundle against its reference model on prompts of the test's."""
    return CierzoParity(cierzo_prompt_parity, request.node, update=request.config.getoption("--cierzo-update-golden"))


def _setting(config: pytest.Config, name: str) -> str | None:
    given = config.getoption(f"--cierzo-{name}")
    if given is not None:
        return str(given)
    stored = str(config.getini(f"cierzo_{name.replace('-', '_')}"))
    if not stored:
        return None
    root = config.inipath.parent if config.inipath is not None else config.rootpath
    return str(root / stored) if name in _PATHS else stored
