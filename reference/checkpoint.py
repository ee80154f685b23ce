"""Checkpoint folders, opened without loading any weights: a config and safetensors, in either published layout.

Tensors are memory mapped one at a time and only while somebody holds them, so a checkpoint of any size can be read
with the memory of its largest tensor. Pickled checkpoints are refused: unpickling runs code from the file.
Which files belong together is in `reference.layouts`, and how a hub cache keeps them in `reference.hub_cache`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import mmap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from reference.config import ModelConfig
from reference.hub_cache import require_target, snapshot_of
from reference.layouts import HUGGING_FACE, LAYOUTS, NATIVE, find_tensors, layout_of
from reference.messages import some
from reference.native_config import read_params
from reference.native_keys import PARAMS_FILE
from reference.safetensors_header import TensorEntry
from runtime.errors import CheckpointError, ConfigError
from runtime.json_files import brief, read_json_object

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONFIG_FILE",
    "HUGGING_FACE",
    "INDEX_FILE",
    "LAYOUTS",
    "NATIVE",
    "SINGLE_FILE",
    "Checkpoint",
    "Description",
    "describe",
    "open_checkpoint",
    "read_config",
    "some",
    "torch_dtype",
]

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tekken.json", "tokenizer.model*")
"""Patterns of the names of files that say how text becomes tokens; SentencePiece's have versions (.v1 to .v7)."""

_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: what it is, and where its tensors lie.

    path: the folder with the files, as the user gave it (of a hub cache's `models--org--name`, the snapshot in it).
    tensors: every tensor of the layout's safetensors files by its name in the file, sorted by name.
    tokenizer_files: the files in the folder that TOKENIZER_FILES matches, in the order of its patterns.
    layout: one of LAYOUTS, which decides the names of the tensors.
    config_file: what `config` was read from, config.json or params.json.
    text_only: the model also takes images, and only its language model was asked for.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    tokenizer_files: tuple[Path, ...]
    layout: str
    config_file: Path
    text_only: bool = False
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
                f"{self.path} has no tensor {name!r}. Its {self.config_file.name} may belong to another model."
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


def open_checkpoint(
    path: str | Path, *, ignore_config_keys: Collection[str] = (), layout: str | None = None, text_only: bool = False
) -> Checkpoint:
    """Open a folder with a config and its safetensors, or a hub cache's folder of a model.

    ignore_config_keys: see `ModelConfig.from_hf` and `reference.native_config.read_params`.
    layout: one of LAYOUTS; None reads a folder that holds both as Hugging Face's. Only its tensors count.
    text_only: take the language model out of one that reads images as well; nothing changes for any other.
    Raises ConfigError for the config, CheckpointError for missing, damaged, surplus or pickled tensor files.
    """
    with _readable(path):
        folder = _folder(Path(path))
        files = layout_of(folder, layout)
        config_file = folder / files.config
        config = read_config(config_file, ignore_keys=ignore_config_keys, text_only=text_only, layout=files.name)
        tensors = find_tensors(folder, files)
        if files.name == NATIVE:
            config = replace(config, dtype=_stored_dtype(tensors) or config.dtype)
        return Checkpoint(
            path=folder,
            config=config,
            tensors=MappingProxyType(dict(sorted(tensors.items()))),
            tokenizer_files=_tokenizer_files(folder),
            layout=files.name,
            config_file=config_file,
            text_only=text_only,
        )


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """What the system says of a path (no right to list it, too long, no such user) is said as CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(
            f"{brief(str(path))} cannot be opened: {reason}. Check the path and its rights."
        ) from error


@dataclass(frozen=True, slots=True)
class Description:
    """What a path says of a model: its config, and its open checkpoint where there are tensors."""

    config: ModelConfig
    config_file: Path
    layout: str
    checkpoint: Checkpoint | None


def describe(
    path: str | Path, *, ignore_config_keys: Collection[str] = (), layout: str | None = None, text_only: bool = False
) -> Description:
    """`open_checkpoint`, also for a folder that has no tensors yet, and for a single config file of either layout.

    Raises as `open_checkpoint` does; that tensors are there but missing, damaged or pickled in part is refused.
    """
    with _readable(path):
        file = Path(path).expanduser().absolute()
        require_target(file)
        if not file.is_file():
            folder = _folder(file)
            files = layout_of(folder, layout)
            if files.has_tensors(folder):
                opened = open_checkpoint(
                    path, ignore_config_keys=ignore_config_keys, layout=files.name, text_only=text_only
                )
                return Description(opened.config, opened.config_file, opened.layout, opened)
            file, layout = folder / files.config, files.name
        layout = layout or _layout_of_config(file)
    config = read_config(file, ignore_keys=ignore_config_keys, text_only=text_only, layout=layout)
    return Description(config, file, layout, None)


def read_config(
    file: Path, *, ignore_keys: Collection[str] = (), text_only: bool = False, layout: str | None = None
) -> ModelConfig:
    """The config in `file`, of the layout that it looks like if none is given.

    Raises CheckpointError when the file is not there, ConfigError when it is no JSON object or is refused.
    """
    require_target(file)
    if not file.is_file():
        raise CheckpointError(f"{file.parent} has no {file.name}. Check the path, or download the checkpoint again.")
    mapping = read_json_object(file, ConfigError)
    if (layout or _layout_of_config(file)) == NATIVE:
        return read_params(mapping, ignore_keys=ignore_keys, text_only=text_only)
    return ModelConfig.from_hf(mapping, ignore_keys=ignore_keys, text_only=text_only)


def _layout_of_config(file: Path) -> str:
    """By name, and by content for a config that was renamed: Mistral writes dim where Hugging Face has hidden_size."""
    if file.name in (CONFIG_FILE, PARAMS_FILE):
        return NATIVE if file.name == PARAMS_FILE else HUGGING_FACE
    mapping = read_json_object(file, ConfigError)
    return NATIVE if {"dim", "n_layers"} & mapping.keys() and "hidden_size" not in mapping else HUGGING_FACE


def _folder(path: Path) -> Path:
    folder = path.expanduser().absolute()
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {state}, but a checkpoint is a folder with {CONFIG_FILE} and {SINGLE_FILE}, or with "
            f"{PARAMS_FILE} and consolidated.safetensors."
        )
    return snapshot_of(folder)


def _stored_dtype(tensors: Mapping[str, TensorEntry]) -> str | None:
    """The type in which most bytes are stored, of those that a config can name."""
    sizes = dict.fromkeys(_DTYPE_NAMES, 0)
    for entry in tensors.values():
        if entry.dtype in sizes:
            sizes[entry.dtype] += entry.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return _DTYPE_NAMES[most] if sizes[most] else None


def _tokenizer_files(folder: Path) -> tuple[Path, ...]:
    listed = sorted(entry.name for entry in folder.iterdir())
    found = [folder / name for pattern in TOKENIZER_FILES for name in fnmatch.filter(listed, pattern)]
    for file in found:
        require_target(file)
    return tuple(file for file in found if file.is_file())


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
