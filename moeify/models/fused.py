"""Linear maps that a stock architecture keeps side by side in one module, as a module each.

Units need rows of their own in every map, so an adapter opens what is fused before anything is measured or cut, and
``closed`` puts it back before the network leaves. The stock code sees what it saw before: one module, one output.
"""

from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """Linear maps of the same input, what they give side by side, in the order of the submodules."""

    def __init__(self, parts: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Return what all maps give."""
        return torch.cat([part(x) for part in self.children()], dim=-1)

    @classmethod
    @torch.no_grad()
    def of(cls, whole: nn.Linear, rows: Mapping[str, int]) -> "FusedLinear":
        """Return the same maps, each with its rows of the weight; ``rows`` in the order in which they lie."""
        if sum(rows.values()) != whole.out_features:
            raise ValueError(f"a fused map of {whole.out_features} rows cannot be opened into {dict(rows)}")
        weights = whole.weight.split(list(rows.values()))
        biases = [None] * len(rows) if whole.bias is None else whole.bias.split(list(rows.values()))
        parts = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return cls(dict(zip(rows, parts, strict=True))).train(whole.training)

    @torch.no_grad()
    def whole(self) -> nn.Linear:
        """Return the one map that the stock architecture has."""
        parts = [cast(nn.Linear, part) for part in self.children()]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        weights: list[Tensor] = [part.weight for part in parts]
        return _linear(torch.cat(weights), torch.cat(biases) if biases else None)


def open_fused(network: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> None:
    """Open modules by their qualified names, in place; those that are open already stay as they are."""
    for name, rows in fused.items():
        module = network.get_submodule(name)
        if isinstance(module, nn.Linear):
            network.set_submodule(name, FusedLinear.of(module, rows))


def closed(network: nn.Module) -> nn.Module:
    """Put every fused map back to the one module that the stock architecture has, in place, and return the network."""
    opened = [name for name, module in network.named_modules() if isinstance(module, FusedLinear)]
    for name in opened:
        module = network.get_submodule(name)
        assert isinstance(module, FusedLinear)
        network.set_submodule(name, module.whole().train(module.training))
    return network


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a map with copies of a weight and a bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made
