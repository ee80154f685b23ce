"""One changed byte anywhere in a bundle, at seeded places and where a text has its structure, and it is not proved."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from runtime import UnprovenError
from runtime.errors import BundleError
from tests.support.receipts import ENGINE, PLAN, prove, proven_bundle, signed


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests copy it before they change it."""
    return proven_bundle(tmp_path_factory.mktemp("proven") / "bundle")


@pytest.fixture
def copy(proven: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(proven, tmp_path / "bundle"))


STRUCTURE = b'{}[]:,"\n '
FILES = (
    "model.onnx", "weights.bin", "manifest.json", "parity.json", "tokenizer.json", "tokenizer_config.json",
    f"engines/{ENGINE}/engine.json", f"engines/{ENGINE}/{PLAN}",
)  # fmt: skip


def places(content: bytes, random: Random, name: str) -> list[int]:
    """Both ends, 60 anywhere, and where a text has its structure 120 of these bytes; all of what is shorter."""
    chosen = {0, len(content) - 1, *random.sample(range(len(content)), min(60, len(content)))}
    if name.endswith(".json"):
        structure = [place for place, byte in enumerate(content) if byte in STRUCTURE]
        chosen |= set(random.sample(structure, min(120, len(structure))))
    return sorted(chosen)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_found(copy: Path, name: str) -> None:
    """One bit of it flipped, the byte gone, and one more beside it: nothing of this may pass."""
    random = Random(name)
    file = copy / name
    intact = file.read_bytes()
    engine = {"backend": "tensorrt", "engine": ENGINE}
    # The receipt of the graph says nothing of plans, which it does not run.
    runs = [engine] if name.endswith(PLAN) else [engine, {}]
    for place in places(intact, random, name):
        bit = 1 << random.randrange(8)
        for changed in (
            intact[:place] + bytes([intact[place] ^ bit]) + intact[place + 1 :],
            intact[:place] + intact[place + 1 :],
            intact[:place] + random.randbytes(1) + intact[place:],
        ):
            file.write_bytes(changed)
            for options in runs:
                with pytest.raises(BundleError):
                    prove(copy, **options)
    file.write_bytes(intact)
    for options in runs:
        assert prove(copy, **options).path == copy, "only the change was refused"


def test_one_changed_byte_of_a_signed_receipt_is_found(copy: Path, tmp_path: Path) -> None:
    public = signed(copy, tmp_path)
    file, random = copy / "parity.json", Random(0)
    intact = file.read_bytes()
    begin = intact.index(b'"signature"')
    for place in [*range(begin, begin + 220), *places(intact, random, file.name)]:
        file.write_bytes(intact[:place] + bytes([intact[place] ^ 1 << random.randrange(8)]) + intact[place + 1 :])
        for trust in (None, public):
            with pytest.raises(UnprovenError):
                prove(copy, trust=trust)
