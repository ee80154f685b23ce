"""Models with a vision tower: refused as they are, and their text side read as transformers reads it."""

from __future__ import annotations

from typing import Any

import pytest

from reference.config import ModelConfig
from tests.support.config_json import of_transformers, refusal, small
from tests.support.quantized_checkpoints import Kind, quantization_config
from tests.support.twins import published


def wrapped(kind: str = "mistral3", text: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A wrapper's config around a small Mistral's."""
    text = small(sliding_window=None) if text is None else text
    return {"model_type": kind, "text_config": text, "vision_config": {"model_type": "pixtral"}} | changes


@pytest.mark.parametrize("name", ["Pixtral-12B", "Mistral-Small-3.1-24B", "Ministral-3-8B"])
def test_without_text_only_it_is_refused_by_name(name: str) -> None:
    message = refusal(published(name))
    assert f"{published(name)['architectures'][0]} takes images" in message
    assert "vision tower" in message
    assert "--text-only" in message


def test_text_only_changes_nothing_for_a_language_model() -> None:
    assert ModelConfig.from_hf(small(), text_only=True) == ModelConfig.from_hf(small())


@pytest.mark.parametrize("kind", ["mistral3", "llava"])
def test_the_text_config_alone_counts(kind: str) -> None:
    noise: dict[str, Any] = {"image_token_index": 10, "vision_feature_layer": -1, "ignore_index": -100}
    config = ModelConfig.from_hf(wrapped(kind, **noise), text_only=True)
    assert config == ModelConfig.from_hf(small(sliding_window=None))


@pytest.mark.parametrize("kind", ["mistral3", "llava"])
@pytest.mark.parametrize("text", [None, {}, {"num_hidden_layers": 3}], ids=str)
def test_what_a_text_config_leaves_out(kind: str, text: dict[str, Any] | None) -> None:
    """Only one that is absent as a whole is the wrapper's; keys that one leaves out are those of its own class."""
    written = {"model_type": kind, "text_config": text}
    ours = ModelConfig.from_hf(written, text_only=True)
    theirs = of_transformers(written).text_config
    assert ours.architecture == theirs.model_type == {"mistral3": "mistral", "llava": "llama"}[kind]
    assert (ours.hidden_size, ours.num_layers) == (theirs.hidden_size, theirs.num_hidden_layers)
    assert (ours.norm_eps, ours.rope.theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert set(ours.layer_windows) == {getattr(theirs, "sliding_window", None)}
    assert (ours.vocab_size, ours.head_dim) == (theirs.vocab_size, theirs.head_dim)


@pytest.mark.parametrize("outside", [True, False, None])
@pytest.mark.parametrize("inside", [True, False, None])
@pytest.mark.parametrize("kind", ["mistral3", "llava"])
def test_the_wrapper_decides_about_tied_embeddings(kind: str, outside: bool | None, inside: bool | None) -> None:
    text = small(sliding_window=None) | ({} if inside is None else {"tie_word_embeddings": inside})
    config = wrapped(kind, text) | ({} if outside is None else {"tie_word_embeddings": outside})
    ours = ModelConfig.from_hf(config, text_only=True).tie_word_embeddings
    if kind == "mistral3" and outside is None:  # the old generation, whose language model had the head
        assert ours == bool(inside)
    else:
        assert ours == of_transformers(config).tie_word_embeddings


def test_how_tensors_are_packed_is_said_outside() -> None:
    packed = quantization_config(Kind("awq", group=128))
    config = ModelConfig.from_hf(wrapped(quantization_config=packed), text_only=True)
    assert config.quantization == ModelConfig.from_hf(small(quantization_config=packed)).quantization is not None


def test_dtype_and_end_tokens_of_the_wrapper() -> None:
    text = small(sliding_window=None, torch_dtype="float16")
    del text["eos_token_id"]
    config = ModelConfig.from_hf(wrapped(text=text, dtype="bfloat16", eos_token_id=[7, 9]), text_only=True)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (7, 9))
    inside = ModelConfig.from_hf(wrapped(text=small(torch_dtype="float16"), eos_token_id=9), text_only=True)
    assert (inside.dtype, inside.eos_token_ids) == ("float16", (2,))


@pytest.mark.parametrize(
    "config,words",
    [
        (wrapped(quux=1), "quux = 1, but Cierzo does not know what that means for mistral3"),
        (wrapped(text=small(quux=1)), "text_config.quux = 1"),
        (wrapped(text=small(hidden_size=0)), "text_config.hidden_size = 0"),
        (wrapped(text=small(rope_parameters={"rope_type": "x"})), 'text_config.rope_parameters.rope_type = "x"'),
        (wrapped(text=small(model_type="gemma")), 'text_config.model_type = "gemma"'),
        (wrapped(text=wrapped()), 'text_config.model_type = "mistral3"'),
        (wrapped(text_config=[1]), "an object or null belongs there"),
        (wrapped(quantization_config={"bits": 4}), "a quantised layout"),
        (wrapped(text=small(quantization_config={"bits": 4})), "a quantised layout"),
        (wrapped(architectures=["LlavaForConditionalGeneration"]), "Cierzo computes Mistral3ForConditionalGeneration"),
        (wrapped(text=small(architectures=["LlamaForCausalLM"])), "Cierzo computes MistralForCausalLM"),
        (wrapped(tie_word_embeddings=1), "true or false belongs there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(config: dict[str, Any], words: str) -> None:
    assert words in refusal(config, text_only=True)


def test_keys_are_ignored_outside_and_inside() -> None:
    config = wrapped(text=small(sliding_window=None, quux=1), quux=2)
    ours = ModelConfig.from_hf(config, text_only=True, ignore_keys=["quux"])
    assert ours == ModelConfig.from_hf(small(sliding_window=None))
    assert "text_config decides" in refusal(config, text_only=True, ignore_keys=["text_config"])


@pytest.mark.parametrize("prefix", ["text_config.", ""])
def test_rope_keys_are_ignored_under_the_name_that_the_refusal_says(prefix: str) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "depth": 1}
    config = wrapped(text=small(sliding_window=None, rope_parameters=rope))
    assert "--ignore-config-key text_config.rope_parameters.depth" in refusal(config, text_only=True)
    ours = ModelConfig.from_hf(config, text_only=True, ignore_keys=[f"{prefix}rope_parameters.depth"])
    assert ours.rope.factor == 2.0


def test_the_vocabulary_may_be_repeated_outside() -> None:
    """As in the published LLaVA 1.5; the tensors of the language model have the size that its own config says."""
    text = small(sliding_window=None)
    ours = ModelConfig.from_hf(wrapped(vocab_size=99, text=text), text_only=True)
    assert ours == ModelConfig.from_hf(text)
    assert of_transformers(wrapped(vocab_size=99, text=text)).get_text_config().vocab_size == ours.vocab_size
