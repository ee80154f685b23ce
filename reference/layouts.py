"""The two layouts in which checkpoints are published, and which files of a folder belong to each.

|              | Hugging Face                            | Mistral native                                |
|--------------|-----------------------------------------|-----------------------------------------------|
| model        | config.json                             | params.json                                   |
| one file     | model.safetensors                       | consolidated.safetensors                      |
| shards       | model-00001-of-00003.safetensors …      | consolidated-00001-of-00003.safetensors …     |
| their index  | model.safetensors.index.json            | consolidated.safetensors.index.json           |
| pickled      | *.bin, *.pt, *.ckpt                     | consolidated.*.pth, consolidated.*.pt         |

Most repositories of Mistral hold both, side by side: the same model twice. Only one of them is ever read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reference.hub_cache import is_listed, require_target, unfinished
from reference.messages import some
from reference.safetensors_header import TensorEntry, read_header
from runtime.errors import CheckpointError
from runtime.json_files import brief, read_json_object

HUGGING_FACE, NATIVE = "huggingface", "native"
LAYOUTS = (HUGGING_FACE, NATIVE)
"""In the order in which a folder that holds both is read when no layout is asked for."""

_ADAPTER = "adapter_config.json"
"""What peft writes beside the weights that it adds (LoRA)."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Layout:
    """File names of one layout. name: one of LAYOUTS. stem: what the names of all its tensor files begin with."""

    name: str
    config: str
    stem: str

    @property
    def single(self) -> str:
        """The file of a checkpoint that is not sharded."""
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        """The map from tensors to shards."""
        return f"{self.stem}.safetensors.index.json"

    def shards(self, folder: Path) -> dict[str, tuple[int, int]]:
        """Number and count, by their names, of the shards that `folder` lists."""
        pattern = re.compile(rf"{self.stem}-(\d{{5}})-of-(\d{{5}})\.safetensors")
        found = ((entry.name, pattern.fullmatch(entry.name)) for entry in sorted(folder.iterdir()))
        return {name: (int(match[1]), int(match[2])) for name, match in found if match}

    def has_tensors(self, folder: Path) -> bool:
        """Whether `folder` lists any safetensors file of this layout, or an index of some."""
        return any(is_listed(folder / name) for name in (self.single, self.index)) or bool(self.shards(folder))


_FILES = {
    HUGGING_FACE: Layout(HUGGING_FACE, "config.json", "model"),
    NATIVE: Layout(NATIVE, "params.json", "consolidated"),
}


def layout_of(folder: Path, asked: str | None = None) -> Layout:
    """The layout in which `folder` is to be read: the one that is asked for, else the first that is there whole.

    A folder with the config of one and the tensors of another is of the layout of its config; what it lacks is said
    by `find_tensors`. Raises CheckpointError when there is no config.
    """
    layouts = list(_FILES.values())
    if asked is not None:
        if asked not in _FILES:
            raise CheckpointError(f"layout = {asked!r} is not one that Cierzo reads ({', '.join(LAYOUTS)}).")
        chosen = _FILES[asked]
        if not is_listed(folder / chosen.config):
            others = [layout.name for layout in layouts if is_listed(folder / layout.config)]
            raise CheckpointError(
                f"{folder} has no {chosen.config}, which the layout {asked} begins with{unfinished(folder)}. "
                + (f"It is there in the layout {others[0]}: ask for that, or download" if others else "Download")
                + f" {chosen.config} and {chosen.stem}*.safetensors."
            )
        return chosen
    with_config = [layout for layout in layouts if is_listed(folder / layout.config)]
    if not with_config and is_listed(folder / _ADAPTER):
        raise CheckpointError(
            f"{folder} has no config.json but an {_ADAPTER}: it is what training added to a model (LoRA), and not the "
            "model. Merge it into its base (merge_and_unload of peft) and save the result with save_pretrained."
        )
    if not with_config:
        raise CheckpointError(
            f"{folder} has no config.json and no params.json{unfinished(folder)}, so it is a checkpoint neither in "
            "Hugging Face's layout nor in Mistral's own. Check the path, or download the checkpoint again."
        )
    return next((layout for layout in with_config if layout.has_tensors(folder)), with_config[0])


def find_tensors(folder: Path, layout: Layout) -> dict[str, TensorEntry]:
    """Every tensor of the safetensors files of `layout`, and of no other file.

    Raises CheckpointError for missing, damaged, contradictory or pickled files, and for an adapter beside them.
    """
    if layout.name == HUGGING_FACE and is_listed(folder / _ADAPTER):
        raise CheckpointError(
            f"{folder} has an {_ADAPTER} beside its {layout.config}, and transformers would add that adapter (LoRA) to "
            "the weights. Merge it (merge_and_unload of peft) and save the result into a folder of its own, or take "
            "the adapter's files out of this one if the weights are meant without it."
        )
    index, single = folder / layout.index, folder / layout.single
    if is_listed(index):
        require_target(index)
        return _read_indexed(folder, layout)
    shards = layout.shards(folder)
    if is_listed(single):
        if shards:
            raise CheckpointError(
                f"{folder} has both {layout.single} and shards ({some(list(shards), 2)}), and no {layout.index}. "
                "Delete what does not belong to this checkpoint."
            )
        require_target(single)
        return read_header(single)
    if shards:
        return _read_unindexed(folder, layout, shards)
    raise _no_tensors(folder, layout)


def _no_tensors(folder: Path, layout: Layout) -> CheckpointError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        way_out = {
            HUGGING_FACE: "Load it where you trust it and write it again with "
            "save_pretrained(..., safe_serialization=True).",
            NATIVE: "Use the safetensors that Mistral publishes of the same model, or load it where you trust it and "
            "write its tensors with safetensors.torch.save_file.",
        }
        return CheckpointError(
            f"{folder} has pickled weights only ({pickled[0]}), and unpickling can run code from the file. "
            + way_out[layout.name]
        )
    missing = f"{folder} has {layout.config}, but neither {layout.single} nor {layout.index}"
    for other in _FILES.values():
        if other is not layout and other.has_tensors(folder):
            return CheckpointError(
                f"{missing}, only tensors that belong to a {other.config} ({other.stem}*.safetensors), "
                "and the two layouts name and order them differently. "
                + (
                    f"Ask for the layout {other.name}"
                    if is_listed(folder / other.config)
                    else f"Download {other.config}"
                )
                + f", or download {layout.stem}*.safetensors."
            )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"only {some(others, 3)}" if others else "no safetensors file at all"
    return CheckpointError(f"{missing}, {found}{unfinished(folder)}. Download {layout.stem}*.safetensors.")


def _read_indexed(folder: Path, layout: Layout) -> dict[str, TensorEntry]:
    """Entries of all shards, after checking that index and shards agree about every tensor."""
    index = folder / layout.index
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names. Download it again.")
    names_of: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, set()).add(name)
    shards = sorted(names_of)
    if is_listed(folder / layout.single) and layout.single not in shards:
        raise CheckpointError(
            f"{folder} has both {layout.single} and an {layout.index} that names other files. "
            "Delete the one that does not belong to this checkpoint."
        )
    outside = [shard for shard in shards if not _is_file_name(shard)]
    if outside:
        raise CheckpointError(f"{index} names the shard {brief(outside[0])}, which is no file name inside the folder.")
    _refuse_missing(folder, layout, shards, len(shards), "its index names")
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        entries = read_header(folder / shard)
        listed = names_of[shard]
        for names, complaint in (
            (listed - entries.keys(), f"does not hold {{}} that {layout.index} places there"),
            (entries.keys() - listed, f"holds {{}} that {layout.index} does not place there"),
        ):
            if names:
                raise CheckpointError(
                    f"{folder / shard} {complaint.format(f'{len(names)} tensors')}: {some(sorted(names))}. "
                    "Index and shards are of different versions: download both again."
                )
        tensors |= entries
    return tensors


def _is_file_name(shard: str) -> bool:
    """Whether a stranger's `shard` can only mean a file in the folder itself; no system has names above 255 bytes."""
    plain = shard not in ("", "..") and Path(shard).name == shard
    return plain and shard.isprintable() and len(shard.encode()) <= 255


def _read_unindexed(folder: Path, layout: Layout, shards: dict[str, tuple[int, int]]) -> dict[str, TensorEntry]:
    """Entries of all shards, of which the names say how many there must be, and no tensor twice."""
    counts = {count for _, count in shards.values()}
    if len(counts) > 1 or any(not 1 <= number <= count for number, count in shards.values()):
        raise CheckpointError(
            f"{folder} has no {layout.index}, and its shards are not of one set ({some(list(shards), 3)}). "
            "Delete those that do not belong to this checkpoint."
        )
    (count,) = counts
    due = [f"{layout.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    _refuse_missing(folder, layout, due, count, "their names say there are")
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        entries = read_header(folder / shard)
        twice = sorted(tensors.keys() & entries.keys())
        if twice:
            raise CheckpointError(
                f"{folder / shard} holds {len(twice)} tensors that {tensors[twice[0]].file.name} holds as well: "
                f"{some(twice)}, and there is no {layout.index}. Download index and shards again."
            )
        tensors |= entries
    return tensors


def _refuse_missing(folder: Path, layout: Layout, due: Iterable[str], count: int, who_says: str) -> None:
    """Raise CheckpointError when a shard is not there, or is a link that leads nowhere."""
    missing = [shard for shard in due if not (folder / shard).is_file()]
    for shard in missing:
        require_target(folder / shard)
    if missing:
        whole = [
            other
            for other in _FILES.values()
            if other is not layout and is_listed(folder / other.config) and other.has_tensors(folder)
        ]
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {count} shards that {who_says}: {some(missing)}"
            f"{unfinished(folder)}. Download them"
            + (f", or ask for the layout {whole[0].name}, which the folder has as well." if whole else ".")
        )
