"""Tiny networks of each family, in float64 so that rounding cannot hide an error."""

import torch
from torch import nn

from moeify.config import AutoencoderModel, LlamaModel
from moeify.models import build_autoencoder, build_llama

CATEGORIES = ("a", "b", "c", "d")


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
    return torch.randint(40, (rows, 12), generator=generator)
