"""Two tiny tokenizers of the kinds that Mistral checkpoints use, trained on a few sentences in milliseconds."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
SENTENCEPIECE_PIECES = 60
"""Pieces of `sentencepiece_like` before its 256 bytes begin."""
TEXT = [
    "the wind of the valley blows cold and dry",
    "a window slides over the text, and the text forgets",
    "café déjà vu über allem, señor: naïve coöperation",
] * 4
CHAT_TEMPLATE = (
    "{{ bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {%- if message['role'] == 'user' %}\n"
    "        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}\n"
    "    {%- elif message['role'] == 'assistant' %}\n"
    "        {{- ' ' + message['content'] + eos_token }}\n"
    "    {%- else %}\n"
    "        {{- raise_exception('Only user and assistant roles are supported') }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}"
)


def byte_level() -> str:
    """tokenizer.json of a byte-level BPE (as Mistral Nemo's): every byte has a piece."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def sentencepiece_normalised() -> str:
    """The same vocabulary with ▁ from a normalizer, which runs on every stretch between control tokens (as older
    conversions of Mistral 7B and Mixtral do it)."""
    tokenizer = Tokenizer.from_str(sentencepiece_like())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    document = json.loads(tokenizer.to_str())
    document["pre_tokenizer"] = None
    return json.dumps(document)


def sentencepiece_like() -> str:
    """tokenizer.json of a BPE with ▁ for spaces and bytes as a last resort (as Mistral 7B's)."""
    trainer = trainers.BpeTrainer(vocab_size=SENTENCEPIECE_PIECES, special_tokens=SPECIAL, show_progress=False)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer.train_from_iterator(TEXT[:2], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    document = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    assert len(vocabulary) == SENTENCEPIECE_PIECES
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    document["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return json.dumps(document)


KINDS = {
    "byte-level": byte_level,
    "sentencepiece-like": sentencepiece_like,
    "sentencepiece-normalised": sentencepiece_normalised,
}


def with_added_tokens(tokenizer_json: str, *tokens: str, special: bool = False) -> str:
    """The same tokenizer with more added tokens at the end of its vocabulary."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return str(tokenizer.to_str())


def config_json(**extra: object) -> str:
    """tokenizer_config.json with the roles of the special tokens."""
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    return json.dumps({**roles, **extra})
