"""Networks with other numbers of units: sites of unequal width, and units that move from one network to another.

Stock formats know one width for all layers, so there a narrower site is padded with zeros: a zero unit reads and writes
nothing, so it changes no output. Our own folders hold each site as wide as it is.
"""

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from moeify.models.families import describe, rebuild, unit_space, with_units
from moeify.models.units import UnitSite, UnitSpace, is_conv1d
from moeify.recipe.partition import UnitKind


def shaped(description: dict[str, Any], units: Mapping[str, int]) -> nn.Module:
    """Return an untrained network of the shape that ``describe`` tells, each site as wide as ``units`` says."""
    network = rebuild(description)
    wanted = [units.get(site.name, 0) for site in unit_space(network).sites]
    if any(more > site.units for more, site in zip(wanted, unit_space(network).sites, strict=True)):
        network = rebuild(with_units(description, max(wanted)))
    for site in unit_space(network, get_args(UnitKind)).sites:
        if site.name in units and units[site.name] < site.units:
            _narrow(network, site, units[site.name])
    return network


@torch.no_grad()
def widened(network: nn.Module, added: Callable[[str], int], seed: int) -> nn.Module:
    """Return the network with so many fresh units at the end of each feed-forward site, itself where there are none.

    They read through weights drawn from the seed and write nothing yet, so that no output changes. ``added`` returns
    how many a site of this name gets.
    """
    space = unit_space(network)
    more = {site.name: added(site.name) for site in space.sites}
    if not any(more.values()):
        return network
    widths = {site.name: site.units + more[site.name] for site in space.sites}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = rebuild(with_units(describe(network), max(widths.values())))
        wide = shaped(describe(network), widths).to(next(network.parameters()))
    copy_units(network, space, {site.name: torch.arange(site.units) for site in space.sites}, wide)
    for site in space.sites:
        for part in site.ways_in:
            fresh = (part.axis, site.units, more[site.name])
            values = drawn.get_parameter(part.parameter).narrow(*fresh)
            wide.get_parameter(part.parameter).narrow(*fresh).copy_(values)
    return wide


@torch.no_grad()
def copy_units(
    source: nn.Module, space: UnitSpace, kept: Mapping[str, Int[Tensor, " kept"]], target: nn.Module
) -> None:
    """Copy a network's tensors into ``target``, of each site the ``kept`` units, zeros behind where target is wider."""
    held = dict(source.named_parameters()) | dict(source.named_buffers())
    parts = {part.parameter: (part, kept[site.name]) for site in space.sites for part in site.slices}
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        values = held[name]
        if name in parts:
            part, index = parts[name]
            entries = part.entries(index).to(values.device)
            values = padded(values.index_select(part.axis, entries), part.axis, tensor.shape[part.axis])
        tensor.copy_(values)


def padded(tensor: Tensor, axis: int, width: int) -> Tensor:
    """Return the tensor with zeros behind, up to ``width`` on that axis."""
    behind = [0, 0] * (tensor.dim() - 1 - axis)
    return F.pad(tensor, [*behind, 0, width - tensor.shape[axis]])


def _narrow(network: nn.Module, site: UnitSite, units: int) -> None:
    """Keep a site's first units, in place."""
    for part in site.slices:
        name, _, kind = part.parameter.rpartition(".")
        layer: Any = network.get_submodule(name)
        held = getattr(layer, kind)
        kept = held.detach().narrow(part.axis, 0, units * part.width).clone()
        setattr(layer, kind, nn.Parameter(kept) if isinstance(held, nn.Parameter) else kept)
        if is_conv1d(layer):
            layer.nx, layer.nf = layer.weight.shape
        elif isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        elif isinstance(layer, nn.BatchNorm2d):
            (layer.num_features,) = layer.weight.shape
        else:
            layer.out_features, layer.in_features = layer.weight.shape
