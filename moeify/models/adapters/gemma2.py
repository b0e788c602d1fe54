"""Gemma 2: norms on both sides of every block, so edges between sites cannot be followed; softcapped attention."""

from moeify.models.transformer import Transformer

ADAPTER = Transformer("gemma2", "Gemma2ForCausalLM", "Gemma2Config", activation="hidden_activation", norm=None)
