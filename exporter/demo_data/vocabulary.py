"""The demo's tokenizers: byte-pair encoding as SentencePiece does it, written as a `tokenizer.json`.

The layout is Mistral's: <unk>, <s>, </s>, then the 256 bytes, then the merged pieces, then single characters. A space
becomes U+2581; what the vocabulary lacks is spelled in bytes, which is so for accented letters and line ends here, in
order that streaming meets characters that arrive in parts.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
END_ID = 2
CHAT_OPEN, CHAT_SHUT = "[INST]", "[/INST]"
SPACE = "\u2581"
_KEPT = string.ascii_letters + string.punctuation + "“”’" + SPACE

#: Jinja source: the turns of a user between [INST] and [/INST], the answers closed with the end-of-sequence token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    f"{{{{ '{CHAT_OPEN} ' + message['content'] + ' {CHAT_SHUT}' }}}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ raise_exception('Only the roles user and assistant are known.') }}"
    "{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Iterable[str], size: int, *, prepend_everywhere: bool) -> Tokenizer:
    """A tokenizer of `size` pieces for `texts`; encodes with <s> in front.

    `prepend_everywhere`: a space goes in front of every stretch of text, also behind a special token (a normalizer, the
    older form of Mistral's file); otherwise in front of the whole text only (the newer form, a pre-tokenizer).
    """
    learned = _learn_merges(texts, size - 3 - 256)
    merges: list[tuple[str, str]] = [(left, right) for left, right in learned["merges"]]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    merged = ["".join(pair) for pair in merges]
    characters = [piece for piece in learned["vocab"] if len(piece) == 1]
    pieces = list(dict.fromkeys([UNKNOWN, BEGIN, END, *bytes_, *merged, *characters]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if prepend_everywhere:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (UNKNOWN, BEGIN, END)])
    return tokenizer


def _learn_merges(texts: Iterable[str], size: int) -> dict[str, Any]:
    """The vocabulary and merges of a plain BPE of `size` pieces, whose merges stay within words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # SentencePiece merges neither across a space nor letters with punctuation; and what is left to the bytes
            # must not glue its neighbours.
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(f"[^A-Za-z{SPACE}]"), behavior="isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=list(_KEPT), limit_alphabet=len(_KEPT), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
