"""ViT: an image's patches are tokens that see each other; one token more says the class."""

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer(
    "vit",
    "ViTForImageClassification",
    "ViTConfig",
    learns="class of an image",
    layer="vit.layers.{}",
    gate=None,
    up="fc1",
    down="fc2",
    biases=True,
    norm="layernorm_after",
    heads=Heads("attention", norm="layernorm_before"),
)
