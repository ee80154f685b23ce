"""Names and shapes of the reference model's parameters, in the model's order.

Symbols: V vocabulary, C hidden size, I intermediate size, H heads, G KV heads, D head dim, E experts.
"""

from __future__ import annotations

from reference.config import ModelConfig

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"


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
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


def _attention(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, query_rows, kv_rows = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    return {
        prefix + "q_proj.weight": (query_rows, hidden),
        prefix + "k_proj.weight": (kv_rows, hidden),
        prefix + "v_proj.weight": (kv_rows, hidden),
        prefix + "o_proj.weight": (hidden, query_rows),
    }


def _feed_forward(config: ModelConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, intermediate = config.hidden_size, config.intermediate_size
    if config.moe is None:
        return {
            prefix + "mlp.gate_proj.weight": (intermediate, hidden),
            prefix + "mlp.up_proj.weight": (intermediate, hidden),
            prefix + "mlp.down_proj.weight": (hidden, intermediate),
        }
    experts = config.moe.num_experts
    return {
        prefix + "moe.router.weight": (experts, hidden),
        prefix + "moe.gate_proj": (experts, intermediate, hidden),
        prefix + "moe.up_proj": (experts, intermediate, hidden),
        prefix + "moe.down_proj": (experts, hidden, intermediate),
    }
