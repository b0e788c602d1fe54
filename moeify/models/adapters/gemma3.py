"""Gemma 3, its language model: norms on both sides of every block, as in Gemma 2."""

from moeify.models.transformer import Transformer

ADAPTER = Transformer("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", activation="hidden_activation", norm=None)
