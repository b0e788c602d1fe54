"""Whether a network's sites are what its adapter says: asked of the whole network, on rows that it is given.

For who writes an adapter, and for networks whose sites were found (``moeify.models.detect``). It must not matter in
which order a site's units lie, routed blocks must give what the stock ones give, and a unit must be able to matter.
"""

import copy

import torch
from torch import Tensor, nn

from moeify.models.build import logits
from moeify.models.families import readers, unit_space
from moeify.models.units import output_weight
from moeify.recipe.partition import UnitKind
from moeify.routed.split_model import SplitModel
from moeify.splitting.surgery import permute

_BOTH: tuple[UnitKind, ...] = ("ffn", "heads")
_TOLERANCE = 1e-8
"""Of outputs in float64, relative to the largest."""


@torch.no_grad()
def prove(network: nn.Module, inputs: Tensor) -> None:
    """Raise ValueError, by site, where the sites are not what the adapter says; the network stays as it is.

    ``inputs``: rows that it takes, two at least. Everything runs in float64 and eval mode.
    """
    stock = copy.deepcopy(network).double().eval()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    space, wanted = unit_space(stock, _BOTH), logits(stock, inputs)
    for site in space.sites:
        moved = copy.deepcopy(stock)
        order = {each.name: torch.arange(each.units) for each in space.sites}
        order[site.name] = order[site.name].roll(1).flip(0)
        permute(moved, None, space, order)
        _alike(logits(moved, inputs), wanted, f"site {site.name!r}: another order of its units changes what comes out")
        output_weight(moved, site).zero_()
        if torch.equal(logits(moved, inputs), wanted):
            raise ValueError(f"site {site.name!r}: nothing that comes out depends on its units")
    model = SplitModel(copy.deepcopy(stock), ("a", "b"), kinds=_BOTH)
    categories = torch.arange(len(inputs)).mul(2).div(len(inputs), rounding_mode="floor")
    _alike(model(inputs, categories), wanted, "the routed blocks do not give what the network's own give")
    with model.masked():
        _alike(model(inputs, categories), wanted, "the masked blocks do not give what the network's own give")
    assert readers(model.network) == readers(stock)


def _alike(got: Tensor, wanted: Tensor, problem: str) -> None:
    difference = (got - wanted).abs().max().item()
    if not difference <= _TOLERANCE * max(1.0, wanted.abs().max().item()):
        raise ValueError(f"{problem} (by {difference:.1e}); see what the adapter says of it")
