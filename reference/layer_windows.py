"""How config.json says which layers slide: the rules of the config classes of transformers, one for each habit.

A rule goes by what that package masks, not by what its cache reads. Keys that a class accepts and then ignores may
stand there as long as they say what happens anyway.

Symbols: L layers, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reference.config_reader import ConfigReader

Windows = tuple[int | None, ...]
"""W or None (full causal attention) for each layer."""

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class WindowRule:
    """One way to read the windows.

    keys: those that `read` consumes.
    read: of a config.json, the name of its architecture, the W that its class gives an absent sliding_window, and L.
        Raises ConfigError where the keys contradict each other.
    """

    keys: frozenset[str]
    read: Callable[[ConfigReader, str, int | None, int], Windows]


def _no_window(reader: ConfigReader, architecture: str, default: int | None, num_layers: int) -> Windows:
    """Llama masks nothing by distance; its cache would drop keys by a sliding_window all the same."""
    if reader.optional_integer("sliding_window") is not None:
        reader.refuse(
            "sliding_window", f"{architecture} has no sliding window", "Set it to null, or use a checkpoint that has."
        )
    kinds = _layer_types(reader, num_layers) or (FULL,) * num_layers
    _refuse_idle_layer_types(reader, architecture, kinds, (FULL,) * num_layers, None)
    _refuse_idle_switch(reader, architecture, kinds, None)
    return (None,) * num_layers


def _one_window(reader: ConfigReader, architecture: str, default: int | None, num_layers: int) -> Windows:
    """Mistral, Mixtral, Phi-3, Ministral 3: sliding_window holds for all layers."""
    window = reader.optional_integer("sliding_window", default)
    by_window = (FULL if window is None else SLIDING,) * num_layers
    kinds = _layer_types(reader, num_layers) or by_window
    _refuse_idle_layer_types(reader, architecture, kinds, by_window, window)
    _refuse_idle_switch(reader, architecture, kinds, window)
    return (window,) * num_layers


def _by_layer(reader: ConfigReader, architecture: str, default: int | None, num_layers: int) -> Windows:
    """Ministral: layer_types says which layers slide, all of them when it is absent."""
    window = reader.optional_integer("sliding_window", default)
    kinds = _layer_types(reader, num_layers) or (FULL if window is None else SLIDING,) * num_layers
    if window is None and SLIDING in kinds:
        reader.refuse("layer_types", "sliding_window is null", "Write the window of the layers that slide.")
    _refuse_idle_switch(reader, architecture, kinds, window)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _last_layers(reader: ConfigReader, architecture: str, default: int | None, num_layers: int) -> Windows:
    """Qwen 2 and 3: with use_sliding_window those that layer_types says, or else all from max_window_layers on."""
    window = _switched(reader, default)
    first = reader.integer("max_window_layers", 28, least=0)
    derived = tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(num_layers))
    kinds = _layer_types(reader, num_layers) or derived
    if window is None and SLIDING in kinds:
        reader.refuse(
            "layer_types",
            "use_sliding_window is false or sliding_window is null, and then no layer slides",
            "Write true and the window, or full_attention for every layer.",
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _one_switched(reader: ConfigReader, architecture: str, default: int | None, num_layers: int) -> Windows:
    """Qwen3-MoE: with use_sliding_window, sliding_window holds for all layers."""
    window = _switched(reader, default)
    by_window = (FULL if window is None else SLIDING,) * num_layers
    kinds = _layer_types(reader, num_layers) or by_window
    _refuse_idle_layer_types(reader, architecture, kinds, by_window, window)
    return (window,) * num_layers


def _switched(reader: ConfigReader, default: int | None) -> int | None:
    window = reader.optional_integer("sliding_window", default)
    return window if reader.boolean("use_sliding_window", False) else None


def _layer_types(reader: ConfigReader, num_layers: int) -> tuple[str, ...] | None:
    kinds = reader.optional_strings("layer_types") or None
    if kinds is not None and len(kinds) != num_layers:
        reader.refuse(
            "layer_types", f"it has {len(kinds)} entries for {num_layers} layers", "Write one for each layer."
        )
    if any(kind not in (SLIDING, FULL) for kind in kinds or ()):
        reader.refuse("layer_types", f"Cierzo knows {SLIDING} and {FULL} only", "Use a checkpoint with these.")
    return kinds


def _refuse_idle_layer_types(
    reader: ConfigReader, architecture: str, kinds: Sequence[str], due: Sequence[str], window: int | None
) -> None:
    if tuple(kinds) != tuple(due):
        reader.refuse(
            "layer_types",
            f"{architecture} has one sliding_window for all layers, here {window}, and would mask by that alone",
            "If the layers really differ, the model_type of these weights is another one, such as ministral.",
        )


def _refuse_idle_switch(reader: ConfigReader, architecture: str, kinds: Sequence[str], window: int | None) -> None:
    key = "use_sliding_window"
    if key in reader.mapping and reader.boolean(key, True) != (SLIDING in kinds):
        reader.refuse(
            key,
            f"{architecture} does not read this key and goes by sliding_window, which is {window}",
            "Set sliding_window to null for full attention, or to the window, and delete this key.",
        )


_KEYS = frozenset({"layer_types", "sliding_window", "use_sliding_window"})
NO_WINDOW = WindowRule(_KEYS, _no_window)
ONE_WINDOW = WindowRule(_KEYS, _one_window)
BY_LAYER = WindowRule(_KEYS, _by_layer)
LAST_LAYERS = WindowRule(_KEYS | {"max_window_layers"}, _last_layers)
ONE_SWITCHED = WindowRule(_KEYS, _one_switched)
