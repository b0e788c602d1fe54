"""OPT: plain ReLU that the layer runs itself, on tokens without rows, so edges between sites cannot be followed."""

from moeify.models.transformer import Transformer

ADAPTER = Transformer(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    layer="model.decoder.layers.{}",
    mlp="",
    gate=None,
    up="fc1",
    down="fc2",
    inline="activation_fn",
    width="ffn_dim",
    biases="enable_bias",
    activation="activation_function",
    norm=None,
)
