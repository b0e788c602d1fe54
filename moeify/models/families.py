"""Adapters: where the units of each supported network live, and how to describe and rebuild it.

Language models of ``transformers`` are data in ``moeify.models.decoders``; the autoencoder and the residual network are
cases of their own here.
"""

from collections.abc import Collection
from typing import Any, get_args

import torch
from torch import Tensor, nn

from attribution.edge_taps import Entry, Writer
from attribution.sites import Site
from moeify.models.decoders import DECODERS, WITHOUT, config_of, decoder_named, decoder_of
from moeify.models.resnet import ResNet
from moeify.models.units import ConvUnits, FfnUnits, UnitSite, UnitSpace, check, is_conv1d, linear
from moeify.recipe.partition import PLAIN, UnitKind


def unit_space(network: nn.Module, kinds: Collection[UnitKind] = PLAIN) -> UnitSpace:
    """Return the sites of a network's units of these kinds, in the network's order.

    Kinds that the network has none of are passed over. ValueError for a network without an adapter.
    """
    sites: list[UnitSite]
    if decoder := decoder_of(network):
        sites = decoder.sites(network)
    elif _is_autoencoder(network):
        sites = [_feed_forward(network, name) for name in ("encoder", "decoder")]
    elif isinstance(network, ResNet):
        sites = [
            ConvUnits(f"{name}.channels", name, block.conv1.weight.shape[0], places)
            for name, block, places in network.blocks()
        ]
    else:
        raise _unknown(network)
    return check(network, [site for site in sites if site.kind in kinds])


def layers(network: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers, first one first; none of a network that is no decoder."""
    decoder = decoder_of(network)
    if decoder is None:
        return []
    return [network.get_submodule(decoder.layer.format(i)) for i in range(config_of(network).num_hidden_layers)]


def readers(network: nn.Module) -> tuple[Site, ...]:
    """Return every site that attribution can read, in the network's order, whether it is split or not."""
    return unit_space(network, get_args(UnitKind)).readers


def entries(network: nn.Module) -> tuple[Entry, ...]:
    """Return the ways into the sites of ``readers`` that have sites before them, for attribution of edges.

    None where edges cannot be followed, see ``Decoder.norm``, or where there is but one site. Those of a residual
    network pass batch norms behind the blocks, which are no norm of a token by itself.
    """
    if decoder := decoder_of(network):
        return decoder.entries(network)
    if _is_autoencoder(network):
        return (Entry("decoder.hidden", (Writer("decoder.up"),)),)
    if isinstance(network, ResNet):
        return ()
    raise _unknown(network)


def describe(network: nn.Module) -> dict[str, Any]:
    """Return plain data from which ``rebuild`` makes a network of the same shape, no site narrower than it is."""
    if decoder := decoder_of(network):
        return {"family": decoder.family, "config": config_of(network).to_dict()}
    if _is_autoencoder(network):
        up, down = linear(network, "encoder.up"), linear(network, "encoder.down")
        return {
            "family": "autoencoder",
            "inputs": up.in_features,
            "hidden": max(up.out_features, linear(network, "decoder.up").out_features),
            "code": down.out_features,
        }
    if isinstance(network, ResNet):
        inner = [block.conv1.weight.shape[0] for _, block, _ in network.blocks()]
        return {
            "family": "resnet",
            "image": list(network.image),
            "classes": network.linear.out_features,
            "width": network.conv1.out_channels,
            "blocks": len(inner) // network.stages,
            "stages": network.stages,
            "inner": inner,
        }
    raise _unknown(network)


def outside_flops(network: nn.Module) -> dict[str, int]:
    """Return module -> floating-point operations an example (or token) of the linear maps that belong to no site."""
    inside = {part.parameter for site in unit_space(network, get_args(UnitKind)).sites for part in site.slices}
    places = {"conv1": network.image[1] * network.image[2]} if isinstance(network, ResNet) else {}
    return {
        name: 2 * network.get_parameter(f"{name}.weight").numel() * places.get(name, 1)
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module) or name in places) and f"{name}.weight" not in inside
    }


def rebuild(description: dict[str, Any]) -> nn.Module:
    """Return an untrained network of the described shape."""
    family = description.get("family")
    if decoder := decoder_named(family):
        return decoder.build(description["config"])
    if family == "autoencoder":
        from moeify.models.build import Autoencoder

        return Autoencoder(description["inputs"], description["hidden"], description["code"])
    if family == "resnet":
        sizes = {key: description[key] for key in ("classes", "width", "blocks", "stages", "inner")}
        return ResNet(tuple(description["image"]), **sizes)
    known = ", ".join(decoder.family for decoder in DECODERS)
    raise ValueError(f"unknown network family {family!r}; this version rebuilds autoencoder, resnet, {known}")


def with_units(description: dict[str, Any], units: int, heads: int | None = None) -> dict[str, Any]:
    """Return the description of the same network with another number of units in every site.

    ``units``: of each feed-forward site; ``heads``: of each site of attention heads, as many as it has if not given.
    More heads than asked for where the format wants their number to divide the model's width.
    """
    family = description.get("family")
    if decoder := decoder_named(family):
        return {**description, "config": decoder.with_units(description["config"], units, heads)}
    if family == "autoencoder":
        return {**description, "hidden": units}
    if family == "resnet":
        return {**description, "inner": [units] * len(description["inner"])}
    raise ValueError(f"unknown network family {family!r}")


def with_biases(description: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the same network with biases in its feed-forward blocks.

    ValueError for a family that has no place for them.
    """
    family = description.get("family")
    if decoder := decoder_named(family):
        return {**description, "config": decoder.with_biases(description["config"])}
    if family in ("autoencoder", "resnet"):
        return description  # has them
    raise ValueError(f"unknown network family {family!r}")


def example_inputs(network: nn.Module, rows: int, seed: int) -> Tensor:
    """Return random rows of valid input, as long as the network takes them."""
    generator = torch.Generator().manual_seed(seed)
    if decoder_of(network):
        config = config_of(network)
        return torch.randint(config.vocab_size, (rows, min(64, config.max_position_embeddings)), generator=generator)
    if isinstance(network, ResNet):
        return torch.randn(rows, *network.image, generator=generator)
    return torch.rand(rows, describe(network)["inputs"], generator=generator)


def _is_autoencoder(network: nn.Module) -> bool:
    return type(network).__name__ == "Autoencoder"


def _unknown(network: nn.Module) -> ValueError:
    name = type(network).__name__
    known = ", ".join(decoder.network for decoder in DECODERS)
    return ValueError(
        f"no adapter for {name}: {WITHOUT.get(name, f'moeify.models.decoders names the modules of {known}')}"
    )


def _feed_forward(network: nn.Module, module: str) -> FfnUnits:
    up = linear(network, f"{module}.up")
    return FfnUnits(
        f"{module}.hidden", module, None, "up", "down", "relu", up.out_features, up_bias=up.bias is not None
    )
