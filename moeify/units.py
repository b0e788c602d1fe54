"""The unit space: which tensors of a network hold a site's units, and along which axis.

Everything that moves or weighs units (permutation, compensation, extraction) works on these descriptions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attribution.sites import Site

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Slice:
    """One parameter's axis that runs over a site's units."""

    parameter: str
    axis: int


@dataclass(frozen=True)
class FfnUnits:
    """The neurons of one feed-forward block: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    name: str
    """Of the site."""
    module: str
    """Qualified name of the feed-forward module."""
    gate: str | None
    """Names of the ``nn.Linear`` submodules; a neuron is a row of gate and up and a column of down."""
    up: str
    down: str
    activation: Activation
    units: int
    gate_bias: bool = False
    up_bias: bool = False
    told: bool = False
    """Whether units learn a bias for each category (``moeify.told``)."""

    @property
    def site(self) -> Site:
        """The site as attribution reads it: at the input of ``down``."""
        return Site(self.name, f"{self.module}.{self.down}", self.units)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every parameter axis that moves with the units."""
        ways_in = [(self.up, self.up_bias)] + ([(self.gate, self.gate_bias)] if self.gate else [])
        found = [Slice(f"{self.module}.{name}.weight", 0) for name, _ in ways_in]
        found += [Slice(f"{self.module}.{name}.bias", 0) for name, bias in ways_in if bias]
        return (*found, Slice(self.output, 1), *([Slice(f"{self.module}.told.weight", 1)] if self.told else []))

    @property
    def output(self) -> str:
        """The parameter [dim units] through which the units write."""
        return f"{self.module}.{self.down}.weight"


UnitSite = FfnUnits
"""A site with its tensors. Attention heads and conv channels join here as further classes."""


@dataclass(frozen=True)
class UnitSpace:
    """All sites of a network."""

    sites: tuple[UnitSite, ...]

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a unit space needs sites with names of their own, got {names}")

    def __getitem__(self, name: str) -> UnitSite:
        return next(site for site in self.sites if site.name == name)

    @property
    def readers(self) -> tuple[Site, ...]:
        """The sites as attribution reads them."""
        return tuple(site.site for site in self.sites)

    @property
    def units(self) -> int:
        """Units of all sites."""
        return sum(site.units for site in self.sites)


def linear(network: nn.Module, name: str) -> nn.Linear:
    """Return a submodule that must be an ``nn.Linear``."""
    module = network.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name!r} is a {type(module).__name__}; a unit site needs nn.Linear there")
    return module


def output_weight(network: nn.Module, site: UnitSite) -> Tensor:
    """Return the parameter [dim units] through which a site's units write."""
    return network.get_parameter(site.output)


def input_weight(network: nn.Module, site: UnitSite) -> Tensor:
    """Return the weights [units inputs] through which a site's units read, those of gate and up side by side."""
    ways_in = [network.get_parameter(part.parameter) for part in site.slices if part.axis == 0]
    return torch.cat([weight for weight in ways_in if weight.ndim == 2], dim=1)


def check(network: nn.Module, sites: Sequence[UnitSite]) -> UnitSpace:
    """Return the unit space of the sites; ValueError where a tensor does not have the units a site claims."""
    for site in sites:
        for part in site.slices:
            shape = network.get_parameter(part.parameter).shape
            if shape[part.axis] != site.units:
                raise ValueError(
                    f"site {site.name!r}: {part.parameter} has shape {tuple(shape)}, "
                    f"wanted {site.units} on axis {part.axis}"
                )
    return UnitSpace(tuple(sites))
