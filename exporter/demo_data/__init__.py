"""Two small trained checkpoints in the Hugging Face layout, and the text on which their perplexity is measured."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: The checkpoints that the package carries.
DEMO_CHECKPOINTS = ("mistral", "mixtral")

#: Stories that took no part in training: UTF-8, one paragraph a line.
HELDOUT_FILE = _HERE / "heldout.txt"


def demo_checkpoint(name: str) -> Path:
    """The folder of a demo checkpoint, "mistral" (dense) or "mixtral" (experts). Raises ValueError for other names."""
    if name not in DEMO_CHECKPOINTS:
        raise ValueError(f"There is no demo checkpoint named {name!r}; there are {', '.join(DEMO_CHECKPOINTS)}.")
    return _HERE / name
