"""Qwen3: a Llama that norms each head's queries and keys."""

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer("qwen3", "Qwen3ForCausalLM", "Qwen3Config", heads=Heads(norms=("q_norm", "k_norm")))
