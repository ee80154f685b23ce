"""The demo's checkpoints are what they claim to be: the Hugging Face layout, trained, tokenizers that lose nothing.

`transformers` is the judge here: it must find every tensor it wants and no other, and predict unseen text well.
"""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.demo_data import DEMO_CHECKPOINTS, HELDOUT_FILE, demo_checkpoint
from exporter.demo_data.corpus import HELDOUT_SEED, MIN_PARAGRAPH_WORDS, make_story, stories
from exporter.demo_data.grammar import Character, Narrator

#: 1.15 times what was measured, 1.623 and 1.617; an untrained model of this vocabulary is beyond 1000.
PERPLEXITY_BOUND = {"mistral": 1.87, "mixtral": 1.86}

each_checkpoint = pytest.mark.parametrize("name", DEMO_CHECKPOINTS)


@functools.cache
def load(name: str) -> tuple[Any, dict[str, Any]]:
    torch.set_num_threads(1)
    model, report = AutoModelForCausalLM.from_pretrained(
        demo_checkpoint(name), dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), report


def tokenizer_of(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(demo_checkpoint(name) / "tokenizer.json"))


def heldout_text() -> str:
    return HELDOUT_FILE.read_text(encoding="utf-8")


def next_token_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def tensors_of(folder: Path) -> dict[str, str]:
    """Name of each stored tensor -> its dtype."""
    dtypes: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            dtypes |= {key: shard.get_slice(key).get_dtype() for key in shard.keys()}  # noqa: SIM118 - no mapping
    return dtypes


def test_a_seed_always_tells_the_same_story() -> None:
    assert make_story(7) == make_story(7)


def test_other_seeds_tell_other_stories() -> None:
    texts = [story.text for story in stories(0, 200)]
    assert len(set(texts)) == len(texts)
    assert len({word for text in texts for word in text.lower().split()}) > 700


def test_stories_are_whole_and_leave_no_notation_behind() -> None:
    for story in stories(0, 200):
        paragraphs = story.text.split("\n")
        assert len(paragraphs) == 4
        assert all(MIN_PARAGRAPH_WORDS <= len(paragraph.split()) <= 250 for paragraph in paragraphs)
        assert not set("{}<>|") & set(story.text)
        assert story.text.count("“") == story.text.count("”") > 0


def test_pronouns_agree_with_the_name_they_stand_for() -> None:
    people = {"H": Character("Ana", True, "miller"), "F": Character("Leo", False, "baker")}
    seen = set()
    for seed in range(50):
        narrator = Narrator(random.Random(seed), {}, {}, people)
        first = narrator.sentence("<H> met <F.name>, and <H.he> took <H.his> hat.")
        assert first == "Ana met Leo, and she took her hat."
        seen.add(narrator.sentence("<F> sang."))
    assert seen == {"Leo sang.", "He sang."}


def test_a_pronoun_is_not_used_when_two_could_be_meant() -> None:
    people = {"H": Character("Ana", True, "miller"), "F": Character("Inés", True, "baker")}
    for seed in range(50):
        narrator = Narrator(random.Random(seed), {}, {}, people)
        narrator.sentence("<H.name> met <F.name>.")
        assert narrator.sentence("<H> sang.") == "Ana sang."


def test_heldout_text_comes_from_seeds_outside_the_training() -> None:
    expected = "\n".join(story.text for story in stories(HELDOUT_SEED, 4)) + "\n"
    assert heldout_text() == expected
    assert make_story(HELDOUT_SEED).text not in {story.text for story in stories(0, 200)}


def test_an_unknown_demo_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mistral, mixtral"):
        demo_checkpoint("gemma")


@each_checkpoint
def test_transformers_finds_every_tensor_and_no_other(name: str) -> None:
    model, report = load(name)
    assert not any(report.values()), report
    assert 0 < sum(parameter.numel() for parameter in model.parameters()) <= 900_000


@each_checkpoint
def test_weights_are_small_and_in_bfloat16(name: str) -> None:
    folder = demo_checkpoint(name)
    assert set(tensors_of(folder).values()) == {"BF16"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000


def test_mixtral_is_sharded_with_one_tensor_for_each_expert() -> None:
    folder = demo_checkpoint("mixtral")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert set(weight_map) == set(tensors_of(folder))
    assert len(set(weight_map.values())) == 2
    for layer in range(3):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        assert f"{prefix}.gate.weight" in weight_map
        for expert in range(4):
            assert {f"{prefix}.experts.{expert}.{part}.weight" for part in ("w1", "w2", "w3")} <= set(weight_map)


def test_the_two_configs_are_of_the_two_generations() -> None:
    older, newer = (json.loads((demo_checkpoint(name) / "config.json").read_text()) for name in DEMO_CHECKPOINTS)
    assert (older["rope_theta"], older["torch_dtype"]) == (10000.0, "bfloat16")
    assert older["head_dim"] != older["hidden_size"] // older["num_attention_heads"]
    assert (newer["rope_parameters"]["rope_type"], newer["dtype"]) == ("default", "bfloat16")
    assert (older["sliding_window"], newer["sliding_window"]) == (32, 24)


@each_checkpoint
def test_perplexity_of_unseen_text_is_that_of_a_trained_model(name: str) -> None:
    model, _ = load(name)
    ids = tokenizer_of(name).encode(heldout_text()).ids
    assert len(ids) > 2500
    loss = torch.nn.functional.cross_entropy(next_token_logits(model, ids)[:-1], torch.tensor(ids[1:]))
    assert math.exp(loss.item()) < PERPLEXITY_BOUND[name]


def test_no_expert_is_idle_in_any_layer() -> None:
    """Each is chosen for at least 5 % of the tokens (even shares: 50 %; measured: 14 % to 73 %)."""
    model, _ = load("mixtral")
    ids = tokenizer_of("mixtral").encode(heldout_text()).ids
    with torch.no_grad():
        routers = model(input_ids=torch.tensor([ids]), use_cache=False, output_router_logits=True).router_logits
    assert len(routers) == 3
    for router_logits_NE in routers:
        chosen = router_logits_NE.topk(2).indices.flatten()
        shares = torch.bincount(chosen, minlength=4) / len(ids)
        assert shares.min() > 0.05, shares


@each_checkpoint
def test_attention_honours_the_window(name: str) -> None:
    """No logit hears of a token L * (W - 1) + 1 places back, and logits do hear of one half as far."""
    model, _ = load(name)
    reach = model.config.num_hidden_layers * (model.config.sliding_window - 1)
    ids = tokenizer_of(name).encode(heldout_text()).ids[: reach + 2]
    before = next_token_logits(model, ids)[-1]
    for position, moves in ((0, False), (len(ids) - 1 - reach // 2, True)):
        changed = [*ids]
        changed[position] = (changed[position] + 37) % model.config.vocab_size
        assert (not torch.equal(next_token_logits(model, changed)[-1], before)) == moves


@each_checkpoint
def test_tokenizer_gives_the_text_back_and_spells_accents_in_bytes(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in (heldout_text(), "Inés drank café con leche — ñandú… 中 🌬"):
        encoded = tokenizer.encode(text)
        assert encoded.ids[0] == 1
        assert tokenizer.decode(encoded.ids) == text
    assert {"<0xC3>", "<0xA9>"} <= set(tokenizer.encode("Inés").tokens)


@each_checkpoint
def test_transformers_reads_the_same_tokenizer_and_chat_template(name: str) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(demo_checkpoint(name)), tokenizer_of(name)
    text = heldout_text()[:2000]
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    chat = theirs.apply_chat_template([{"role": "user", "content": "Tell me a story."}], tokenize=False)
    assert chat == "<s>[INST] Tell me a story. [/INST]"
    assert ours.encode(chat, add_special_tokens=False).ids[0] == 1
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
