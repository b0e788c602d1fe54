"""Qwen2: a Llama whose queries, keys and values have biases."""

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer("qwen2", "Qwen2ForCausalLM", "Qwen2Config", heads=Heads())
