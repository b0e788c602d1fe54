"""Mistral: a Llama with sliding windows."""

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer("mistral", "MistralForCausalLM", "MistralConfig", heads=Heads())
