"""The pages under docs/ that describe code say what the code says."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from tests.layout.imports import ROOT

DOCS = ROOT / "docs"


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ops.md", "pipeline.md"])
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    page = reference().PAGES[name]()
    assert (DOCS / name).read_text(encoding="utf-8") == page, "run python docs/reference.py"


def test_the_worked_example_quotes_the_files_it_names() -> None:
    text = (DOCS / "write_a_fusion.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:graph_passes|exporter)/[\w/]+\.py)`", text)
    sources = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in dict.fromkeys(named))
    blocks = re.findall(r"```(?:python|text)\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        assert block in sources, block


def test_files_and_pages_that_the_docs_point_to_are_there() -> None:
    pages = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    missing = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]*)?\)", text):
            if not (page.parent / target).exists():
                missing.append(f"{page.name}: {target}")
    assert missing == []
