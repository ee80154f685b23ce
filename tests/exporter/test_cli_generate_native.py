"""`cierzo generate` on a bundle whose only tokenizer file is one of Mistral's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from exporter.cli import cli
from tests.support.mistral_files import native_bundle


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_text_and_chats(tmp_path: Path, name: str) -> None:
    bundle = str(native_bundle(tmp_path, name))
    lengths = {}
    for options in ([], ["--chat"]):
        command = ["generate", bundle, "the wind", "--max-new-tokens", "4", "--json", "--threads", "1", *options]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert 1 <= len(result["token_ids"]) <= 4
        lengths[bool(options)] = result["prompt_tokens"]
    assert lengths[True] == lengths[False] + 2, "[INST] and [/INST]"
