"""GPT-2: plain GELU; maps keep their weights the other way round."""

from moeify.models.transformer import Transformer

ADAPTER = Transformer(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    layer="transformer.h.{}",
    gate=None,
    up="c_fc",
    down="c_proj",
    transposed=True,
    after="dropout",
    width="n_inner",
    biases=True,
    activation="activation_function",
    norm="ln_2",
)
