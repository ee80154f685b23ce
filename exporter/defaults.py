"""What an export takes when nobody says otherwise. Without imports, so that `cierzo --help` can show it at once."""

from __future__ import annotations

DEFAULT_CHUNK = 256
"""Most tokens of a step, where no window is smaller."""

LEAST_CHUNK = 16
"""A chunk is not made smaller than this for the sake of a small window."""

DEFAULT_CONTEXT = 4096
"""Most positions of a full-attention buffer, where the checkpoint was trained for more."""

DEFAULT_MAX_BATCH = 8
"""Most rows of a session."""

WEIGHT_KINDS = ("stored", "fp32")
"""As what an export leaves the weights: the types that the checkpoint has, or converted; the first is the default."""

LAYOUTS = ("huggingface", "native")
"""Layouts of checkpoints that can be asked for; without asking, it is the one that the folder has."""

TRACING, FUSING, WRITING, HASHING, VERIFYING = "tracing", "fusing", "writing weights", "hashing", "verifying"
BYTE_STAGES = (WRITING, HASHING, VERIFYING)
"""Stages whose progress counts bytes."""

FRONTENDS = ("reference", "transformers")
"""Where the traced model comes from; the first one is the default."""

ATTENTIONS = ("sdpa", "eager")
"""How the front end transformers spells attention; the first one is the default."""
