"""Where the units of each supported network live, and how to describe and rebuild it: asked of the family's adapter.

``moeify.models.adapters`` has a file for each family. A network without an adapter is looked at by
``moeify.models.detect``; what is found there can be measured and split, and neither rebuilt nor exported.
"""

from collections.abc import Collection
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from attribution.edge_taps import Entry
from attribution.sites import Site
from moeify.models.adapter import Adapter
from moeify.models.adapters import (
    autoencoder,
    bert,
    distilbert,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    opt,
    phi3,
    qwen2,
    qwen3,
    resnet,
    roberta,
    vit,
)
from moeify.models.detect import Detected
from moeify.models.transformer import Transformer, config_of
from moeify.models.units import ConvUnits, FfnUnits, UnitSpace, check, is_conv1d
from moeify.recipe.model import Traits
from moeify.recipe.partition import PLAIN, UnitKind

TRANSFORMERS: tuple[Transformer, ...] = (
    llama.ADAPTER,
    mistral.ADAPTER,
    qwen2.ADAPTER,
    qwen3.ADAPTER,
    gemma.ADAPTER,
    gemma2.ADAPTER,
    gemma3.ADAPTER,
    phi3.ADAPTER,
    gpt_neox.ADAPTER,
    gpt2.ADAPTER,
    opt.ADAPTER,
    bert.ADAPTER,
    roberta.ADAPTER,
    distilbert.ADAPTER,
    vit.ADAPTER,
    bert.CLASSIFIER,
    roberta.CLASSIFIER,
    distilbert.CLASSIFIER,
)
ADAPTERS: tuple[Adapter, ...] = (autoencoder.ADAPTER, resnet.ADAPTER, *TRANSFORMERS)
DETECTED = Detected()


def unit_space(network: nn.Module, kinds: Collection[UnitKind] = PLAIN) -> UnitSpace:
    """Return the sites of a network's units of these kinds, in the network's order.

    Kinds that the network has none of are passed over. ValueError for a network without an adapter in which nothing is
    found.
    """
    return check(network, [site for site in _adapter(network).sites(network) if site.kind in kinds])


def layers(network: nn.Module) -> list[nn.Module]:
    """Return a transformer's layers, first one first; none of another network."""
    adapter = _adapter(network)
    if not isinstance(adapter, Transformer):
        return []
    return [network.get_submodule(adapter.layer.format(i)) for i in range(config_of(network).num_hidden_layers)]


def traits(network: nn.Module) -> Traits:
    """Return what a network has of what parts of a recipe ask for; ValueError as ``unit_space`` raises it."""
    sites = unit_space(network, get_args(UnitKind)).sites
    return Traits(
        units=tuple(kind for kind in get_args(UnitKind) if any(site.kind == kind for site in sites)),
        layers=bool(layers(network)),
        channels=any(isinstance(site, ConvUnits) for site in sites),
        batch_norm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()),
    )


def streams(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that return the residual stream right behind each feed-forward block; none where
    there is no such stream, or a norm between."""
    return tuple(site.stream for site in unit_space(network).sites if isinstance(site, FfnUnits) and site.stream)


def readers(network: nn.Module) -> tuple[Site, ...]:
    """Return every site that attribution can read, in the network's order, whether it is split or not."""
    return unit_space(network, get_args(UnitKind)).readers


def entries(network: nn.Module) -> tuple[Entry, ...]:
    """Return the ways into the sites of ``readers`` that have sites before them, for attribution of edges.

    None where edges cannot be followed, or where there is but one site.
    """
    return _adapter(network).entries(network)


def describe(network: nn.Module) -> dict[str, Any]:
    """Return plain data from which ``rebuild`` makes a network of the same shape, no site narrower than it is."""
    adapter = _adapter(network)
    return {"family": adapter.family, **adapter.describe(network)}


def outside_flops(network: nn.Module) -> dict[str, int]:
    """Return module -> floating-point operations an example (or token) of the linear maps that belong to no site."""
    inside = {part.parameter for site in unit_space(network, get_args(UnitKind)).sites for part in site.slices}
    places = _adapter(network).places(network)
    return {
        name: 2 * network.get_parameter(f"{name}.weight").numel() * places.get(name, 1)
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module) or name in places) and f"{name}.weight" not in inside
    }


def rebuild(description: dict[str, Any]) -> nn.Module:
    """Return an untrained network of the described shape."""
    return _named(description).build(description)


def with_units(description: dict[str, Any], units: int, heads: int | None = None) -> dict[str, Any]:
    """Return the description of the same network with another number of units in every site.

    ``units``: of each feed-forward site; ``heads``: of each site of attention heads, as many as it has if not given.
    More heads than asked for where the format wants so.
    """
    return _named(description).with_units(description, units, heads)


def with_biases(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the same network with biases in its feed-forward blocks.

    ValueError for a family that has no place for them.
    """
    return _named(description).with_biases(description)


def opened(network: nn.Module) -> nn.Module:
    """Return the network, those of its maps that a stock architecture keeps fused opened in place.

    Networks that ``rebuild`` and ``moeify.models.pretrained`` give are open already.
    """
    found = transformer_of(network)
    return network if found is None else found.opened(network)


def example_inputs(network: nn.Module, rows: int, seed: int) -> Tensor:
    """Return random rows of valid input, as long as the network takes them."""
    return _adapter(network).inputs(network, rows, torch.Generator().manual_seed(seed))


def transformer_of(network: nn.Module) -> Transformer | None:
    """Return the family of a network of ``transformers``; None where it is not among them."""
    name = _class(network)
    return next((each for each in TRANSFORMERS if each.network == name), None)


def transformer_named(family: object) -> Transformer | None:
    """Return the family of this name; None where it is not among them."""
    return next((each for each in TRANSFORMERS if each.family == family), None)


def _adapter(network: nn.Module) -> Adapter:
    name = _class(network)
    for adapter in ADAPTERS:
        if adapter.network == name:
            return adapter
    return DETECTED


def _class(network: nn.Module) -> str:
    """Return the name of a network's class; torch's FSDP puts one of its own before it."""
    kind = type(network)
    return kind.__mro__[2].__name__ if isinstance(network, FSDPModule) else kind.__name__


def detected(network: nn.Module) -> bool:
    """Say whether the network has no adapter, so that its sites were found by what they compute."""
    return _adapter(network) is DETECTED


def _named(description: dict[str, Any]) -> Adapter:
    family = description.get("family")
    for adapter in (*ADAPTERS, DETECTED):
        if adapter.family == family:
            return adapter
    known = ", ".join(adapter.family for adapter in ADAPTERS)
    raise ValueError(f"unknown network family {family!r}; this version rebuilds {known}")
