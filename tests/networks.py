"""Tiny networks of each family; most in float64 so that rounding cannot hide an error."""

from typing import Any

import torch
from torch import nn

from moeify.models.build import build_autoencoder, build_llama
from moeify.models.families import transformer_named, transformer_of
from moeify.models.resnet import ResNet, build_resnet
from moeify.recipe.model import AutoencoderModel, LlamaModel

CATEGORIES = ("a", "b", "c", "d")
DECODER_SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6}
DECODER_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 3},
    "mistral": {"num_key_value_heads": 3, "head_dim": 6, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 3},
    "qwen3": {"num_key_value_heads": 3, "head_dim": 6},
    "gemma": {"num_key_value_heads": 3, "head_dim": 6},
    "gemma2": {"num_key_value_heads": 3, "head_dim": 6, "sliding_window": 6, "query_pre_attn_scalar": 6},
    "gemma3_text": {"num_key_value_heads": 3, "head_dim": 6, "sliding_window": 6, "query_pre_attn_scalar": 6},
    "phi3": {"num_key_value_heads": 3},
    "gpt_neox": {},
    "gpt2": {"n_inner": 20, "resid_pdrop": 0.0},
    "opt": {"ffn_dim": 20, "word_embed_proj_dim": 24},
    "bert": {},
    "roberta": {"max_position_embeddings": 13, "pad_token_id": 0},
    "distilbert": {"dim": 24, "hidden_dim": 20, "n_layers": 2, "n_heads": 6},
    "vit": {"image_size": [4, 6], "patch_size": 2, "num_channels": 2, "num_labels": 5},
    "bert_classifier": {"num_labels": 5},
    "roberta_classifier": {"max_position_embeddings": 13, "pad_token_id": 0, "num_labels": 5},
    "distilbert_classifier": {"dim": 24, "hidden_dim": 20, "n_layers": 2, "n_heads": 6, "num_labels": 5},
}
"""Family -> what its configuration says besides the sizes."""


def tiny_llama(seed: int = 0, *, ffn: int = 24) -> nn.Module:
    config = LlamaModel(kind="llama", hidden=16, layers=2, heads=2, ffn=ffn)
    return build_llama(config, vocabulary=40, length=12, end=0, seed=seed).double()


def tiny_autoencoder(seed: int = 0) -> nn.Module:
    config = AutoencoderModel(kind="autoencoder", hidden=24, code=3)
    return build_autoencoder(config, inputs=10, seed=seed).double()


def rows_for(network: nn.Module, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if type(network).__name__ == "Autoencoder":
        return torch.rand(rows, 10, generator=generator, dtype=torch.float64)
    if isinstance(network, ResNet):
        return torch.randn(rows, *network.image, generator=generator, dtype=torch.float64)
    if (family := transformer_of(network)) and family.learns == "class of an image":
        return family.inputs(network, rows, generator).to(next(network.parameters()).dtype)
    return torch.randint(1, 40, (rows, 12), generator=generator)


def grouped_llama(seed: int = 0, *, heads: int = 6, groups: int = 6, bias: bool = False) -> nn.Module:
    """A Llama of more heads; ``groups`` < ``heads``: several share keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 40}
    attention = {"num_attention_heads": heads, "num_key_value_heads": groups, "attention_bias": bias, "mlp_bias": bias}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(LlamaConfig(**sizes, **attention, max_position_embeddings=12, use_cache=False))
        if bias:  # freshly initialised ones are 0
            for name, parameter in network.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
        return network.double()


def tiny_decoder(family: str, **changes: Any) -> nn.Module:
    """A tiny random network of a family; norms and biases random too, so that none is forgotten unseen. In float32."""
    found = transformer_named(family)
    assert found is not None
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "use_cache": False}
    config = {
        "vocab_size": 40,
        "max_position_embeddings": 12,
        **ends,
        **DECODER_SIZES,
        **DECODER_CONFIGS[family],
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = found.build({"config": config})
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def tiny_resnet(seed: int = 0, *, width: int = 6, stages: int = 2) -> ResNet:
    """A residual network for maps of 8 x 6, its norms neither fresh nor alike."""
    network = build_resnet((2, 8, 6), classes=5, width=width, blocks=1, stages=stages, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.2, 0.3)
                nn.init.normal_(module.running_mean, 0.0, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.double()
