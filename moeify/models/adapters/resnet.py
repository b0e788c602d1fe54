"""The residual network of ``moeify.models.resnet``: the channels inside of its blocks."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from attribution.edge_taps import Entry
from moeify.models.resnet import ResNet
from moeify.models.units import ConvUnits, UnitSite


class ResNetAdapter:
    """See ``moeify.models.adapter``."""

    family = "resnet"
    network = "ResNet"

    def sites(self, network: nn.Module) -> list[UnitSite]:
        """Return the inner channels of every block."""
        return [
            ConvUnits(f"{name}.channels", name, block.conv1.weight.shape[0], places)
            for name, block, places in cast(ResNet, network).blocks()
        ]

    def entries(self, network: nn.Module) -> tuple[Entry, ...]:
        """Return none: ways in pass batch norms behind other blocks, which are no norm of a token by itself."""
        return ()

    def places(self, network: nn.Module) -> dict[str, int]:
        """Return the first convolution, which keeps the image's size."""
        _, height, width = cast(ResNet, network).image
        return {"conv1": height * width}

    def describe(self, network: nn.Module) -> dict[str, Any]:
        """Return the sizes."""
        own = cast(ResNet, network)
        inner = [block.conv1.weight.shape[0] for _, block, _ in own.blocks()]
        return {
            "image": list(own.image),
            "classes": own.linear.out_features,
            "width": own.conv1.out_channels,
            "blocks": len(inner) // own.stages,
            "stages": own.stages,
            "inner": inner,
        }

    def build(self, description: dict[str, Any]) -> nn.Module:
        """Return an untrained network of these sizes."""
        sizes = {key: description[key] for key in ("classes", "width", "blocks", "stages", "inner")}
        return ResNet(tuple(description["image"]), **sizes)

    def with_units(self, description: dict[str, Any], units: int, heads: int | None) -> dict[str, Any]:
        """Return the sizes with so many inner channels in every block."""
        return {**description, "inner": [units] * len(description["inner"])}

    def with_biases(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return the sizes as they are: norms have biases."""
        return description

    def inputs(self, network: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
        """Return random images."""
        return torch.randn(rows, *cast(ResNet, network).image, generator=generator)


ADAPTER = ResNetAdapter()
