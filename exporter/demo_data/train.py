"""Makes the demo's checkpoints: `python -m exporter.demo_data.train mistral` and `... mixtral`, minutes on one core.

Trains a tokenizer of the SentencePiece kind (Metaspace, byte fallback) and a model of a few hundred thousand
parameters on the stories of :mod:`exporter.demo_data.corpus`, then writes the folder in the Hugging Face layout.
Needs the extra ``test`` (torch, transformers, tokenizers); nothing of Cierzo's product code does.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from exporter.demo_data import HELDOUT_FILE, demo_checkpoint
from exporter.demo_data.corpus import HELDOUT_SEED, make_story, stories
from exporter.demo_data.layout import write_checkpoint
from exporter.demo_data.vocabulary import BEGIN, CHAT_OPEN, CHAT_SHUT, END, END_ID, train_tokenizer

SEQUENCE = 192
BATCH = 8
STEPS = {"mistral": 1700, "mixtral": 2400}
WARMUP = 60
PEAK_LEARNING_RATE = 5e-3
STORIES = 4000
HELDOUT_STORIES = 4
VOCABULARY = 1024
#: One story in so many is told as the answer to a request, in the form of the chat template.
CHAT_EVERY = 4


def mistral_config() -> MistralConfig:
    """Four layers; head_dim is not hidden_size / num_attention_heads, as in the larger models of the family."""
    return MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=240,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=4096,
        sliding_window=32,
        rms_norm_eps=1e-5,
        initializer_range=0.06,  # the usual 0.02 is for far wider layers and learns slowly here
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def mixtral_config() -> MixtralConfig:
    """Three layers of four experts, of which each token takes two; embeddings tied."""
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=184,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        sliding_window=24,
        rms_norm_eps=1e-5,
        initializer_range=0.06,  # the usual 0.02 is for far wider layers and learns slowly here
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def build_model(name: str) -> Any:
    """An untrained model, on which the seed of torch decides; attention honours the sliding window."""
    if name == "mistral":
        return MistralForCausalLM._from_config(mistral_config(), attn_implementation="sdpa")
    return MixtralForCausalLM._from_config(mixtral_config(), attn_implementation="sdpa")


def document_ids(tokenizer: Tokenizer, seed: int) -> list[int]:
    """The token ids of one story from <s> to </s>; one in `CHAT_EVERY` follows a request."""
    story = make_story(seed)
    if seed % CHAT_EVERY:
        return [*tokenizer.encode(story.text).ids, END_ID]
    text = f"{BEGIN}{CHAT_OPEN} {story.request} {CHAT_SHUT} {story.text}{END}"
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def batches(stream: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Windows of the packed stories: int64 [BATCH, SEQUENCE], in a new order at each pass over the stream."""
    while True:
        offset = int(torch.randint(SEQUENCE, (1,), generator=generator))
        rows = stream[offset : offset + (len(stream) - offset) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield rows[order[start : start + BATCH]]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < WARMUP:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: Any, stream: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """AdamW over `steps` batches; prints the loss as it goes."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
        fused=True,
    )
    started = time.perf_counter()
    model.train()
    for step, input_ids in zip(range(steps), batches(stream, generator), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True)


def perplexity(model: Any, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of ids[1:], in one forward pass over the whole text."""
    model.eval()
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits[0, :-1].float()
    return math.exp(torch.nn.functional.cross_entropy(logits, input_ids[0, 1:]).item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("mistral", "mixtral"))
    parser.add_argument("--out", type=Path, help="folder to write (default: the one that the package ships)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(20)
    out: Path = arguments.out or demo_checkpoint(arguments.name)

    heldout = "\n".join(story.text for story in stories(HELDOUT_SEED, HELDOUT_STORIES)) + "\n"
    HELDOUT_FILE.write_text(heldout, encoding="utf-8")
    texts = (f"{CHAT_OPEN} {story.request} {CHAT_SHUT} {story.text}" for story in stories(0, 800))
    tokenizer = train_tokenizer(texts, VOCABULARY, prepend_everywhere=arguments.name == "mistral")
    ids = [token for seed in range(STORIES) for token in document_ids(tokenizer, seed)]
    steps = STEPS[arguments.name]
    print(f"{STORIES} stories, {len(ids)} tokens, {steps * BATCH * SEQUENCE} to be seen")
    model = build_model(arguments.name)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    print(f"held-out perplexity before: {perplexity(model, heldout_ids(tokenizer)):.1f}")
    train(model, torch.tensor(ids), steps, torch.Generator().manual_seed(21))
    model.to(torch.bfloat16)
    write_checkpoint(arguments.name, model, tokenizer, out)
    print(f"held-out perplexity, weights in bf16: {perplexity(model.float(), heldout_ids(tokenizer)):.3f}")


def heldout_ids(tokenizer: Tokenizer) -> list[int]:
    """The token ids of heldout.txt, <s> first."""
    return list(tokenizer.encode(HELDOUT_FILE.read_text(encoding="utf-8")).ids)


if __name__ == "__main__":
    main()
