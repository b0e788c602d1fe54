"""Gemma: gated GELU. Its heads are no units yet."""

from moeify.models.transformer import Transformer

ADAPTER = Transformer("gemma", "GemmaForCausalLM", "GemmaConfig")
