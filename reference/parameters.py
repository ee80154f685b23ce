"""Names and shapes of the reference model's parameters, in the model's order.

Symbols: V vocabulary, C hidden size, I intermediate size, H heads, G KV heads, D head dim, E experts.
"""

from __future__ import annotations

from reference.config import ModelConfig

EMBEDDING, FINAL_NORM, LM_HEAD = "embed_tokens.weight", "norm.weight", "lm_head.weight"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the reference model, in the model's order; tied ones once."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes |= _attention(config, prefix + "self_attn.")
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes |= _feed_forward(config, prefix)
    shapes[FINAL_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def _attention(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, query_rows, kv_rows = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in (("q_proj", query_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
        shapes |= _linear(prefix + name, rows, hidden, config.qkv_bias)
    if config.qk_norm:
        shapes |= {prefix + f"{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes | _linear(prefix + "o_proj", hidden, query_rows, config.output_bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _feed_forward(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    if config.moe is None:
        return {
            **_linear(prefix + "mlp.gate_proj", intermediate, hidden, config.mlp_bias),
            **_linear(prefix + "mlp.up_proj", intermediate, hidden, config.mlp_bias),
            **_linear(prefix + "mlp.down_proj", hidden, intermediate, config.mlp_bias),
        }
    experts = config.moe.num_experts
    return {
        prefix + "moe.router.weight": (experts, hidden),
        prefix + "moe.gate_proj": (experts, intermediate, hidden),
        prefix + "moe.up_proj": (experts, intermediate, hidden),
        prefix + "moe.down_proj": (experts, hidden, intermediate),
    }
