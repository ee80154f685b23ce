"""Which ids begin and end a text, where the checkpoint's configuration does not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reference.checkpoint import NATIVE, Checkpoint
from runtime.tokenizer import special_ids


def with_text_ends(checkpoint: Checkpoint, tokenizer: Sequence[Path]) -> Checkpoint:
    """`checkpoint` with the BOS and EOS ids of its tokenizer if it is in Mistral's layout: params.json names neither.

    tokenizer: its files, or none; then the ids stay those of all published ones, 1 and 2. What the tokenizer leaves
    unsaid stays as well. Raises TokenizerError for a damaged file, ConfigError for an id outside the vocabulary.
    """
    if checkpoint.layout != NATIVE or not tokenizer:
        return checkpoint
    bos, eos = special_ids(tokenizer)
    config = checkpoint.config
    return replace(
        checkpoint,
        config=replace(
            config,
            bos_token_id=config.bos_token_id if bos is None else bos,
            eos_token_ids=eos or config.eos_token_ids,
        ),
    )
