"""The models that every engine runs: random weights in the Hugging Face layout, with a tokenizer for the converters.

`config.json` says `sliding_window` and nothing else about windows, as Mistral's own checkpoints do.
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks.checkpoints import Shape, write_checkpoint


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to make up, and the text lengths in tokens at which it is measured.

    short: the context of a decode that a window does not reach. prefills: prompt lengths; the last is also the long
    context. near, far: the two contexts between which decode time must not grow.
    """

    name: str
    title: str
    shape: Shape
    short: int
    prefills: tuple[int, ...]
    near: int
    far: int

    @property
    def long(self) -> int:
        """Four windows."""
        return self.prefills[-1]


_DENSE = Shape(
    hidden=2048, layers=16, heads=16, kv_heads=4, head_dim=128, ffn=7168, vocabulary=32000, window=1024,
    dtype="bfloat16",
)  # fmt: skip
_MIXTURE = Shape(
    hidden=1024, layers=4, heads=8, kv_heads=4, head_dim=128, ffn=3584, vocabulary=32000, window=1024, experts=8,
    dtype="bfloat16",
)  # fmt: skip
_SMALL = Shape(
    hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, ffn=1024, vocabulary=2048, window=64, dtype="bfloat16",
)  # fmt: skip
_SMALL_MIXTURE = Shape(
    hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=512, vocabulary=2048, window=64, experts=8,
    dtype="bfloat16",
)  # fmt: skip

WINDOW_CHECK = Shape(
    hidden=256, layers=2, heads=4, kv_heads=2, head_dim=64, ffn=512, vocabulary=2048, window=32, dtype="float32",
)  # fmt: skip
"""Small enough for every engine to run in float32; a layer sees 32 tokens, so two layers see 63."""

FULL = (
    Model("mistral-1b", "Mistral, 1.0B", _DENSE, 128, (512, 4096), 2048, 32768),
    Model("mixtral-0.4b", "Mixtral, 8 experts, top-2", _MIXTURE, 128, (512, 4096), 2048, 32768),
)
QUICK = (
    Model("mistral-small", "Mistral, small", _SMALL, 32, (64, 256), 128, 2048),
    Model("mixtral-small", "Mixtral, small", _SMALL_MIXTURE, 32, (64, 256), 128, 2048),
)


def checkpoint(folder: Path, name: str, shape: Shape) -> Path:
    """`folder`/`name`, written unless it is there: the same random numbers every time."""
    target = folder / name
    if not target.exists():
        draft = folder / f"{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(draft, shape)
        _write_tokenizer(draft, shape.vocabulary)
        draft.rename(target)
    return target


def _pieces(vocabulary: int) -> list[str]:
    """<unk>, <s>, </s>, 256 bytes, and made-up words."""
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return [*fixed, *(f"▁w{index}" for index in range(vocabulary - len(fixed)))]


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """tokenizer.json, tokenizer_config.json and tokenizer.model with the same pieces.

    Nothing measured here is text, but most converters refuse a checkpoint that has no tokenizer.
    """
    pieces = _pieces(vocabulary)
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model(pieces))


def _sentencepiece_model(pieces: list[str]) -> bytes:
    """The same vocabulary as a SentencePiece BPE model."""
    schema = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = schema.ModelProto()
    model.trainer_spec.model_type = schema.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    kinds = schema.ModelProto.SentencePiece
    for index, piece in enumerate(pieces):
        if index == 0:
            kind = kinds.UNKNOWN
        elif index < 3:
            kind = kinds.CONTROL
        else:
            kind = kinds.BYTE if piece.startswith("<0x") else kinds.NORMAL
        model.pieces.add(piece=piece, score=-float(index), type=kind)
    return bytes(model.SerializeToString())
