"""A Hugging Face checkpoint folder: config.json and safetensors, opened without loading any weights.

Tensors are memory mapped one at a time and only while somebody holds them, so a checkpoint of any size can be read
with the memory of its largest tensor. Pickled checkpoints (.bin, .pt) are refused: unpickling runs code from the file.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from reference.config import ModelConfig
from reference.safetensors_header import TensorEntry, read_header
from runtime.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUGGING_FACE, NATIVE = "huggingface", "native"
LAYOUTS = (HUGGING_FACE, NATIVE)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: what it is, and where its tensors lie.

    tensors: every tensor of the safetensors files by its name in the file, sorted by name.
    tokenizer_files: those of TOKENIZER_FILES that the folder has.
    layout: one of LAYOUTS, which decides the names of the tensors.
    config_file: what `config` was read from, config.json or params.json.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    tokenizer_files: tuple[Path, ...]
    layout: str
    config_file: Path
    # A file stays mapped while any tensor read from it is alive: its pages count as this process's memory until then.
    _mapped: WeakValueDictionary[Path, mmap.mmap] = field(
        default_factory=WeakValueDictionary, init=False, repr=False, compare=False
    )

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, zero copy, with its stored shape and dtype.

        The tensor keeps its mapping alive by itself. Writing to it changes this process's copy of the touched pages
        and never the file. Raises CheckpointError for an unknown name and for a file that shrank since it was opened.
        """
        import torch

        entry = self._entry(name)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        flat = torch.frombuffer(self._map(entry), dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        return flat.view(torch_dtype(entry.dtype)).view(entry.shape)

    def read_bytes(self, name: str) -> memoryview:
        """The stored bytes of the tensor `name`, zero copy. Raises CheckpointError as `read` does."""
        entry = self._entry(name)
        if entry.nbytes == 0:
            return memoryview(b"")
        return memoryview(self._map(entry))[entry.offset : entry.offset + entry.nbytes]

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}. Its config.json may belong to another model."
            ) from None

    def _map(self, entry: TensorEntry) -> mmap.mmap:
        mapped = self._mapped.get(entry.file)
        if mapped is None:
            try:
                mapped = _map_privately(entry.file)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{entry.file} cannot be mapped into memory: {error}.") from error
            self._mapped[entry.file] = mapped
        if len(mapped) < entry.offset + entry.nbytes:
            raise CheckpointError(
                f"{entry.file} became shorter after it was opened. Let its writer finish and try again."
            )
        return mapped


def open_checkpoint(path: str | Path, *, ignore_config_keys: Collection[str] = ()) -> Checkpoint:
    """Open a folder with config.json and model.safetensors, or shards and their model.safetensors.index.json.

    ignore_config_keys: see `ModelConfig.from_hf`.
    Raises ConfigError for the config, CheckpointError for missing, damaged, surplus or pickled tensor files.
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {state}, but a checkpoint is a folder with {CONFIG_FILE} and {SINGLE_FILE}.")
    config = read_config(folder / CONFIG_FILE, ignore_keys=ignore_config_keys)
    tensors = _find_tensors(folder)
    return Checkpoint(
        path=folder,
        config=config,
        tensors=MappingProxyType(dict(sorted(tensors.items()))),
        tokenizer_files=tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file()),
        layout=HUGGING_FACE,
        config_file=folder / CONFIG_FILE,
    )


def read_config(file: Path, *, ignore_keys: Collection[str] = ()) -> ModelConfig:
    """`ModelConfig.from_hf` of the content of `file`.

    Raises CheckpointError when the file is not there, ConfigError when it is no JSON object or is refused.
    """
    if not file.is_file():
        native = file.with_name("params.json").is_file()
        raise CheckpointError(
            f"{file.parent} has no {file.name}"
            + (", only the params.json of Mistral's own format" if native else "")
            + ". Use the checkpoint in the Hugging Face layout."
        )
    return ModelConfig.from_hf(_read_json_object(file, ConfigError), ignore_keys=ignore_keys)


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype, such as torch.bfloat16 of "BF16"."""
    import torch

    names = {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "U16": "uint16",
        "I16": "int16",
        "F16": "float16",
        "BF16": "bfloat16",
        "U32": "uint32",
        "I32": "int32",
        "F32": "float32",
        "U64": "uint64",
        "I64": "int64",
        "F64": "float64",
    }
    found: torch.dtype = getattr(torch, names[dtype])
    return found


def _map_privately(file: Path) -> mmap.mmap:
    """Map a whole file copy-on-write.

    torch takes writable buffers only (a read-only one would crash the process on a write). Where the system has
    MAP_NORESERVE the pages are not promised any swap, so a file larger than the memory can be mapped as well.
    """
    with file.open("rb") as stream:
        if hasattr(mmap, "MAP_NORESERVE"):
            return mmap.mmap(
                stream.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | mmap.MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def _find_tensors(folder: Path) -> dict[str, TensorEntry]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.is_file():
        return _read_shards(folder, index)
    if single.is_file():
        return read_header(single)
    pickled = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise CheckpointError(
            f"{folder} has pickled weights only ({pickled[0]}), and unpickling can run code from the file. "
            "Load it where you trust it and write it again with save_pretrained(..., safe_serialization=True)."
        )
    others = sorted(entry.name for entry in folder.glob("*.safetensors"))
    found = f"only {', '.join(others[:3])}" if others else "no safetensors file at all"
    raise CheckpointError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, {found}. Use the checkpoint in the Hugging Face layout."
    )


def _read_shards(folder: Path, index: Path) -> dict[str, TensorEntry]:
    """Entries of all shards, after checking that index and shards agree about every tensor."""
    weight_map = _read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names. Download it again.")
    shards = sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in shards:
        raise CheckpointError(
            f"{folder} has both {SINGLE_FILE} and an {INDEX_FILE} that names other files. "
            "Delete the one that does not belong to this checkpoint."
        )
    outside = [shard for shard in shards if Path(shard).name != shard or shard in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{index} names the shard {outside[0]!r}, which is no file name inside the folder.")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(shards)} shards that its index names: {some(missing)}. "
            "Download them."
        )
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        entries = read_header(folder / shard)
        listed = {name for name, where in weight_map.items() if where == shard}
        for names, complaint in (
            (listed - entries.keys(), f"does not hold {{}} that {INDEX_FILE} places there"),
            (entries.keys() - listed, f"holds {{}} that {INDEX_FILE} does not place there"),
        ):
            if names:
                raise CheckpointError(
                    f"{folder / shard} {complaint.format(f'{len(names)} tensors')}: {some(sorted(names))}. "
                    "Index and shards are of different versions: download both again."
                )
        tensors |= entries
    return tensors


def some(names: Collection[str], most: int = 5) -> str:
    """The first few names of a long list, with the number of those left out."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest


def _read_json_object(file: Path, error_class: type[CheckpointError] | type[ConfigError]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise error_class(f"{file} is not readable JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise error_class(
            f"{file} holds a JSON {type(content).__name__}, but an object belongs there. Download it again."
        )
    return content
