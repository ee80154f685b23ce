"""Decoders of `transformers` as they are published: the one file that imports that package, and only when asked.

The model that is traced is built by the package's own classes from the checkpoint's config.json, read by the package's
own rules. An engine made this way therefore checks our reading of config.json as well when it is validated.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from exporter.plan import ExportPlan
from reference.architectures import ARCHITECTURES
from reference.config_keys import CONSUMED
from runtime.errors import ExportError

MODEL_CLASSES = {
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "ministral": ("MinistralConfig", "MinistralForCausalLM"),
}
"""Config class and model class of each architecture."""

_LEFT_OUT = ("architectures", "model_type", "dtype", "torch_dtype", "layer_types", "use_sliding_window")
"""What the class says itself, how weights are stored, and what is written anew for the template's layers."""

_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class Template:
    """A model of `transformers` with one layer of each kind, on the meta device.

    layer_types: the names of its layers' kinds where masks are looked up by them, else None.
    inverse_frequency_d: RoPE's frequencies float32 [D/2], as `transformers` computes them.
    """

    model: nn.Module
    layer_types: tuple[str, ...] | None
    inverse_frequency_d: torch.Tensor


def import_transformers() -> Any:
    """The package; raises ExportError when it is not installed, or cannot be imported."""
    try:
        import transformers
    except ImportError as error:
        raise ExportError(
            f"The front end 'transformers' traces the models of that package, which cannot be imported ({error}). "
            "Install it with pip install 'cierzo[transformers]', or leave the front end at 'reference'."
        ) from error
    return transformers


def make_template(plan: ExportPlan, published: Mapping[str, Any], attention: str) -> Template:
    """The plan's template as the architecture's own class; nothing is downloaded and no weight is allocated.

    published: the content of config.json. attention: "eager" or "sdpa".
    Raises ExportError when the installed package lacks the class, does not take the config, or cannot give each layer
    the window that the plan says.
    """
    transformers = import_transformers()
    architecture = plan.config.architecture
    names = MODEL_CLASSES.get(architecture)
    if names is None:
        raise ExportError(
            f"The front end 'transformers' traces {', '.join(MODEL_CLASSES)} and this is {architecture}. "
            "Leave the front end at 'reference'."
        )
    config_class, model_class = (getattr(transformers, name, None) for name in names)
    if config_class is None or model_class is None:
        raise ExportError(
            f"transformers {version('transformers')} has no {names[1]}. "
            "Install the version that Cierzo is tested with: pip install --upgrade 'cierzo[transformers]'."
        )
    if plan.config.rope.type == "dynamic":
        raise ExportError(
            "RoPE of type dynamic looks at the data for the length of the sequence in transformers, which cannot be "
            "traced. Leave the front end at 'reference'."
        )
    settings = _settings(plan, published, attention)
    try:
        with _unadvised(), torch.device("meta"):
            model = model_class(config_class(**settings)).eval()
        with _unadvised(), torch.device("cpu"):  # the one part whose values do not come from the checkpoint
            rotary = type(model.model.rotary_emb)(model.config)
    except Exception as error:  # a dozen kinds, some of them of the libraries below
        said = " ".join(str(error).split())
        raise ExportError(
            f"transformers {version('transformers')} does not take this config.json: {type(error).__name__}: {said}. "
            "Correct the file, or leave the front end at 'reference'."
        ) from error
    if plan.config.tie_word_embeddings:
        model.tie_weights()
    layer_types = settings.get("layer_types")
    return Template(model, tuple(layer_types) if layer_types else None, rotary.inv_freq.detach())


@contextlib.contextmanager
def _unadvised() -> Iterator[None]:
    """What transformers thinks of a config does not concern a user. Each of its loggers has a level of its own, so it
    is their common handlers that are told."""
    handlers = list(logging.getLogger("transformers").handlers)

    def serious(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for handler in handlers:
        handler.addFilter(serious)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(serious)


def _settings(plan: ExportPlan, published: Mapping[str, Any], attention: str) -> dict[str, Any]:
    """What config.json says about the function, with the plan's sizes and the template's layers.

    The sizes are those of config.json unless the plan is a small twin of it, and a head_dim that is absent there, which
    Ministral's class takes for a number.
    """
    config = plan.config
    kept = (CONSUMED | ARCHITECTURES[config.architecture].keys).difference(_LEFT_OUT)
    # A copy, since the class writes its own spelling into the RoPE parameters that it is given.
    settings = copy.deepcopy({key: value for key, value in published.items() if key in kept})
    settings |= {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(plan.kinds),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attn_implementation": attention,
    }
    windows = [window for window in plan.kinds if window is not None]
    by_layer = config.architecture == "ministral"
    if len(windows) > 1 or (len(plan.kinds) > 1 and not by_layer):
        raise ExportError(
            f"The layers have the windows {', '.join(map(str, plan.kinds))} (None is full attention), and "
            f"{MODEL_CLASSES[config.architecture][1]} of transformers has one sliding window for all layers"
            f"{' that slide' if by_layer else ''}. Leave the front end at 'reference'."
        )
    settings["sliding_window"] = windows[0] if windows else None
    if by_layer:
        settings["layer_types"] = [_FULL if window is None else _SLIDING for window in plan.kinds]
    if config.moe is not None:
        settings["num_local_experts"] = config.moe.num_experts
        # grouped_mm has no ONNX translation, and the loop over the experts that were hit depends on the data.
        settings["experts_implementation"] = "batched_mm"
    return settings
