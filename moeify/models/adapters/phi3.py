"""Phi-3 and Phi-4-mini: a Llama that keeps gate and up, and queries, keys and values, as one map each."""

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer(
    "phi3",
    "Phi3ForCausalLM",
    "Phi3Config",
    gate="gate_up_proj.gate",
    up="gate_up_proj.up",
    fused=True,
    heads=Heads(query="qkv_proj.query", key="qkv_proj.key", value="qkv_proj.value"),
)
