"""Llama: RMSNorm, rotary positions, SwiGLU."""

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer("llama", "LlamaForCausalLM", "LlamaConfig", biases="mlp_bias", heads=Heads())
