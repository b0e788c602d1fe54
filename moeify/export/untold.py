"""A told split model as one category sees it, told no more: the category's biases become the blocks' own."""

import torch

from moeify.models.families import describe, with_biases
from moeify.models.resizing import shaped
from moeify.models.units import ConvUnits, FfnUnits
from moeify.routed.split_model import SplitModel


@torch.no_grad()
def untold(split: SplitModel, category: str) -> SplitModel:
    """Return a split model of the same units and routes, not told, that gives this category's outputs for any row."""
    widths = {site.name: site.units for site in split.space.sites}
    network = shaped(with_biases(describe(split.network)), widths)
    held = dict(split.network.named_parameters()) | dict(split.network.named_buffers())
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name in held:
            tensor.copy_(held[name])
        else:  # a bias that the split model's blocks have none of
            tensor.zero_()
    place = split.categories.index(category)
    sites = [site for site in split.space.sites if isinstance(site, FfnUnits | ConvUnits)]
    for site, biases in zip(sites, split.told, strict=True):
        network.get_parameter(site.shift).add_(biases[place])
    return SplitModel(network, split.categories, split.partition).eval()
