"""The port between networks and everything that moves, weighs or runs their units: what an adapter of a family says."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attribution.edge_taps import Entry
from moeify.models.units import UnitSite


class Adapter(Protocol):
    """One family of networks. ``moeify.models.adapters`` has a short file for each; docs/extending.md adds one.

    A description is plain data, JSON, that says the shape of a network and holds no weight.
    """

    @property
    def family(self) -> str:
        """Its name, in descriptions and checkpoints."""
        ...

    @property
    def network(self) -> str:
        """Name of the networks' class, by which they are told: its module need not be imported to ask."""
        ...

    def sites(self, network: nn.Module) -> list[UnitSite]:
        """Return all sites of all kinds, in the network's order."""
        ...

    def entries(self, network: nn.Module) -> tuple[Entry, ...]:
        """Return the ways into the sites that have sites before them; none where edges cannot be followed."""
        ...

    def places(self, network: nn.Module) -> dict[str, int]:
        """Return convolution outside of all sites -> places of the map that it gives, for what it costs."""
        ...

    def describe(self, network: nn.Module) -> dict[str, Any]:
        """Return the network's description, no site narrower than it is; ``family`` is added to it."""
        ...

    def build(self, description: dict[str, Any]) -> nn.Module:
        """Return an untrained network of the described shape."""
        ...

    def with_units(self, description: dict[str, Any], units: int, heads: int | None) -> dict[str, Any]:
        """Return the description with so many units a feed-forward site, and at least so many of heads."""
        ...

    def with_biases(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return the description with biases in feed-forward sites; ValueError where there is no place for them."""
        ...

    def inputs(self, network: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
        """Return random rows of valid input."""
        ...
