"""Low-rank adapters, one for each category, in the maps of attention (LoRA: Hu et al. 2021, arXiv 2106.09685).

Parts of our own, not those of the package ``peft``: here the rows of one step belong to several categories, and each
runs its own adapter in the same pass. On every query, key, value and output map, as published for attention.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.routed.ffn import Routes
from moeify.routed.split_model import SplitModel

_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Adapted(nn.Module):
    """A linear map, and for rows of each category what its adapter adds: nothing at first."""

    def __init__(self, base: nn.Linear, routes: Routes, categories: int, rank: int) -> None:
        super().__init__()
        self.base, self._routes = base, routes
        self.down = nn.Parameter(torch.randn(categories, rank, base.in_features) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(categories, base.out_features, rank))

    def forward(self, x: Float[Tensor, "rows positions inputs"]) -> Float[Tensor, "rows positions outputs"]:
        """Return what the map and each row's adapter give."""
        rows = self._routes.categories
        assert rows is not None
        return self.base(x) + x @ self.down[rows].transpose(1, 2) @ self.up[rows].transpose(1, 2)

    @torch.no_grad()
    def merged(self, category: int) -> nn.Linear:
        """Return the map with this category's adapter in it; the others' are gone."""
        self.base.weight += self.up[category] @ self.down[category]
        return self.base


def adapt(model: SplitModel, rank: int, seed: int) -> list[nn.Parameter]:
    """Put an adapter for each category into the maps of attention, in place, and return their parameters."""
    added: list[nn.Parameter] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in list(model.network.modules()):
            for name in _MAPS:
                if isinstance(base := getattr(module, name, None), nn.Linear):
                    adapted = Adapted(base, model.routes, len(model.categories), rank)
                    setattr(module, name, adapted)
                    added += [adapted.down, adapted.up]
    return added


def merge(model: SplitModel, category: str) -> nn.Module:
    """Return the network with one category's adapters merged and the others' removed, in place."""
    place = model.categories.index(category)
    for module in list(model.network.modules()):
        for name in _MAPS:
            if isinstance(adapted := getattr(module, name, None), Adapted):
                setattr(module, name, adapted.merged(place))
    return model.network
