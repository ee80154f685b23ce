"""Ids that begin and end a text, in the manifest of bundles from Mistral's own layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.text_ends import with_text_ends
from reference.checkpoint import open_checkpoint
from runtime.errors import ConfigError
from tests.support.checkpoints import make_checkpoint
from tests.support.mistral_files import tekken_document, write_tekken
from tests.support.native import as_native


def native(folder: Path, vocab_size: int = 303) -> Path:
    return as_native(make_checkpoint(folder / "hugging-face", vocab_size=vocab_size), folder / "native")


def put_tekken(folder: Path, first: list[str]) -> Path:
    """A tekken.json whose control tokens begin with these."""
    document = tekken_document()
    names = [token["token_str"] for token in document["special_tokens"]]
    names = [*first, *(name for name in names if name not in first)]
    document["special_tokens"] = [
        {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
    ]
    return write_tekken(folder, document)


def ids_of(folder: Path, tokenizer: list[Path]) -> tuple[int | None, tuple[int, ...]]:
    config = with_text_ends(open_checkpoint(folder), tokenizer).config
    return config.bos_token_id, config.eos_token_ids


def test_params_json_names_none_and_all_published_tokenizers_have_these(tmp_path: Path) -> None:
    folder = native(tmp_path)
    assert ids_of(folder, []) == (1, (2,))
    assert ids_of(folder, [put_tekken(folder, ["<unk>", "<s>", "</s>"])]) == (1, (2,))


def test_the_tokenizer_says_which(tmp_path: Path) -> None:
    folder = native(tmp_path)
    assert ids_of(folder, [put_tekken(folder, ["</s>", "<unk>", "[INST]", "<s>"])]) == (3, (0,))


def test_a_config_json_is_believed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "hugging-face", vocab_size=303)
    assert ids_of(folder, [put_tekken(folder, ["</s>", "<unk>", "[INST]", "<s>"])]) == (1, (2,))


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = native(tmp_path, vocab_size=2)
    with pytest.raises(ConfigError, match="vocabulary of 2"):
        ids_of(folder, [put_tekken(folder, ["[INST]", "<unk>", "<s>", "</s>"])])
