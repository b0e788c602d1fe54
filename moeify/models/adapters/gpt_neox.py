"""GPT-NeoX and Pythia: plain GELU beside the attention. Its heads are no units yet."""

from moeify.models.transformer import Transformer

ADAPTER = Transformer(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    layer="gpt_neox.layers.{}",
    gate=None,
    up="dense_h_to_4h",
    down="dense_4h_to_h",
    biases=True,
)
