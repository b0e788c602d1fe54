"""The autoencoder of ``moeify.models.build``: the hidden units of its encoder and its decoder."""

from typing import Any

import torch
from torch import Tensor, nn

from attribution.edge_taps import Entry, Writer
from moeify.models.units import FfnUnits, UnitSite, linear


class AutoencoderAdapter:
    """See ``moeify.models.adapter``."""

    family = "autoencoder"
    network = "Autoencoder"

    def sites(self, network: nn.Module) -> list[UnitSite]:
        """Return both hidden layers."""
        return [self._feed_forward(network, name) for name in ("encoder", "decoder")]

    def entries(self, network: nn.Module) -> tuple[Entry, ...]:
        """Return the way into the decoder, which is the code."""
        return (Entry("decoder.hidden", (Writer("decoder.up"),)),)

    def places(self, network: nn.Module) -> dict[str, int]:
        """Return nothing: it has no convolution."""
        return {}

    def describe(self, network: nn.Module) -> dict[str, Any]:
        """Return the sizes."""
        up, down = linear(network, "encoder.up"), linear(network, "encoder.down")
        hidden = max(up.out_features, linear(network, "decoder.up").out_features)
        return {"inputs": up.in_features, "hidden": hidden, "code": down.out_features}

    def build(self, description: dict[str, Any]) -> nn.Module:
        """Return an untrained network of these sizes."""
        from moeify.models.build import Autoencoder

        return Autoencoder(description["inputs"], description["hidden"], description["code"])

    def with_units(self, description: dict[str, Any], units: int, heads: int | None) -> dict[str, Any]:
        """Return the sizes with so many hidden units."""
        return {**description, "hidden": units}

    def with_biases(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return the sizes as they are: it has biases."""
        return description

    def inputs(self, network: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
        """Return random intensities, 0..1."""
        return torch.rand(rows, linear(network, "encoder.up").in_features, generator=generator)

    def _feed_forward(self, network: nn.Module, module: str) -> FfnUnits:
        up = linear(network, f"{module}.up")
        return FfnUnits(
            f"{module}.hidden", module, None, "up", "down", "relu", up.out_features, up_bias=up.bias is not None
        )


ADAPTER = AutoencoderAdapter()
