"""The unit space: which tensors of a network hold a site's units, and along which axis.

Everything that moves or weighs units (permutation, compensation, extraction) works on these descriptions alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attribution.sites import Site
from moeify.recipe.partition import UnitKind
from moeify.shares import whole

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Return what a feed-forward block makes of its gate, or of up where it has none."""
    match activation:
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Slice:
    """One axis, of a parameter or a buffer, that runs over a site's units."""

    parameter: str
    axis: int
    width: int = 1
    """Entries a unit, side by side."""

    def entries(self, units: Int[Tensor, " some"]) -> Int[Tensor, " entries"]:
        """Return where these units lie on the axis, in the order given."""
        return (units[:, None] * self.width + torch.arange(self.width, device=units.device)).flatten()


@dataclass(frozen=True)
class FfnUnits:
    """The neurons of one feed-forward block: down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate."""

    kind: ClassVar[UnitKind] = "ffn"
    name: str
    """Of the site."""
    module: str
    """Qualified name of the feed-forward module."""
    gate: str | None
    """Names of the linear maps, submodules; a neuron is a row of gate and up and a column of down."""
    up: str
    down: str
    activation: Activation
    units: int
    gate_bias: bool = False
    up_bias: bool = False
    inline: str | None = None
    """Name of the activation's submodule, where ``module`` is a whole layer that runs up, activation and down itself,
    on tokens [rows*positions dim] or in rows; None where it is the feed-forward block alone."""
    transposed: bool = False
    """Whether the maps are ``Conv1D`` of ``transformers``, which keeps weights as [inputs outputs]."""
    after: str | None = None
    """Name of the submodule, a dropout, that is given what the block writes."""
    told: bool = False
    """Whether units learn a bias for each category (``moeify.routed.told``)."""
    places: int = 1
    """Tokens that an example is to the block, where what it costs is counted by examples."""
    stream: str | None = None
    """Qualified name of the module that returns the residual stream right behind the block, what the block writes added
    to what came in; None where there is no such stream, or a norm between."""

    @property
    def site(self) -> Site:
        """The site as attribution reads it: at the input of ``down``."""
        return Site(self.name, f"{self.module}.{self.down}", self.units)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every parameter axis that moves with the units."""
        told = [Slice(f"{self.module}.{self.inline}.told.weight" if self.inline else f"{self.module}.told.weight", 1)]
        return (*self.ways_in, Slice(self.output, int(not self.transposed)), *(told if self.told else []))

    @property
    def ways_in(self) -> tuple[Slice, ...]:
        """Weights and biases through which the units read."""
        maps = [(self.up, self.up_bias)] + ([(self.gate, self.gate_bias)] if self.gate else [])
        found = [Slice(f"{self.module}.{name}.weight", int(self.transposed)) for name, _ in maps]
        return (*found, *(Slice(f"{self.module}.{name}.bias", 0) for name, bias in maps if bias))

    @property
    def output(self) -> str:
        """The parameter through which the units write, see ``output_weight``."""
        return f"{self.module}.{self.down}.weight"

    @property
    def shift(self) -> str:
        """The parameter that is added to every unit before its activation, where the block has biases."""
        return f"{self.module}.{self.up}.bias"


@dataclass(frozen=True)
class HeadUnits:
    """The heads of one attention block. Query heads that share keys and values are one unit, since none of them can go
    without the others' keys."""

    kind: ClassVar[UnitKind] = "heads"
    name: str
    """Of the site."""
    module: str
    """Qualified name of the attention module."""
    query: str
    """Names of the ``nn.Linear`` submodules; a unit is rows of query, key and value and columns of out, in the order of
    the heads."""
    key: str
    value: str
    out: str
    units: int
    """Heads of keys and values."""
    queries: int
    """Query heads a unit."""
    size: int
    """Dimensions a head."""
    bias: bool = False
    """Whether query, key and value have biases."""
    norms: tuple[str, str] | None = None
    """Names of the modules that norm each head's queries and keys [... size], where there are any; all heads share
    them, so they belong to no unit."""
    inline: str | None = None
    """Name of the submodule that holds all but ``out`` and hands it what the heads see; None where ``module`` itself
    does."""
    causal: bool = True
    """Whether a token sees none that come after it."""
    places: int = 1
    """Tokens that an example is to the block, where what it costs is counted by examples."""

    @property
    def site(self) -> Site:
        """The site as attribution reads it: at the input of ``out``."""
        return Site(self.name, f"{self.module}.{self.out}", self.units, self.queries * self.size)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every parameter axis that moves with the units."""
        return (*self.ways_in, Slice(self.output, 1, self.queries * self.size))

    @property
    def ways_in(self) -> tuple[Slice, ...]:
        """Weights and biases through which the units read."""
        maps = ((self.query, self.queries * self.size), (self.key, self.size), (self.value, self.size))
        kinds = ("weight", "bias") if self.bias else ("weight",)
        return tuple(Slice(f"{self.module}.{name}.{kind}", 0, width) for kind in kinds for name, width in maps)

    @property
    def output(self) -> str:
        """The parameter through which the units write, see ``output_weight``."""
        return f"{self.module}.{self.out}.weight"


@dataclass(frozen=True)
class ConvUnits:
    """The inner channels of one residual block: conv2(relu(bn1(conv1(x)))).

    A unit is a row of the first convolution, its channel of the batch norm, running statistics included, and what the
    second convolution reads of it: a slice as large as the kernel.
    """

    kind: ClassVar[UnitKind] = "ffn"
    name: str
    """Of the site."""
    module: str
    """Qualified name of the block, with submodules ``conv1``, ``bn1`` and ``conv2``."""
    units: int
    places: int
    """Of the map that either convolution gives: what an example costs goes by them."""
    told: bool = False
    """Whether units learn a bias for each category (``moeify.routed.told``)."""

    @property
    def site(self) -> Site:
        """The site as attribution reads it: at the input of ``conv2``."""
        return Site(self.name, f"{self.module}.conv2", self.units, spatial=True)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every axis, of parameters and buffers, that moves with the units."""
        statistics = tuple(Slice(f"{self.module}.bn1.running_{what}", 0) for what in ("mean", "var"))
        told = [Slice(f"{self.module}.told.weight", 1)] if self.told else []
        return (*self.ways_in, *statistics, Slice(self.output, 1), *told)

    @property
    def ways_in(self) -> tuple[Slice, ...]:
        """Weights and biases through which the units read."""
        return tuple(Slice(f"{self.module}.{name}", 0) for name in ("conv1.weight", "bn1.weight", "bn1.bias"))

    @property
    def output(self) -> str:
        """The parameter through which the units write, see ``output_weight``."""
        return f"{self.module}.conv2.weight"

    @property
    def shift(self) -> str:
        """The parameter that is added to every unit before its activation."""
        return f"{self.module}.bn1.bias"


UnitSite = FfnUnits | HeadUnits | ConvUnits
"""A site with its tensors."""


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


def unit_parameters(network: nn.Module, site: UnitSite) -> int:
    """Return how many parameters belong to one unit of a site: what it reads and writes through."""
    held = dict(network.named_parameters())
    shapes = [(held[part.parameter].shape, part) for part in site.slices if part.parameter in held]
    return sum(shape.numel() // shape[part.axis] * part.width for shape, part in shapes)


def tensor_of(network: nn.Module, name: str) -> Tensor:
    """Return a network's parameter or buffer by its qualified name."""
    module, _, own = name.rpartition(".")
    found = getattr(network.get_submodule(module), own)
    assert isinstance(found, Tensor)
    return found


def linear(network: nn.Module, name: str) -> nn.Linear:
    """Return a submodule that must be an ``nn.Linear``."""
    module = network.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name!r} is a {type(module).__name__}; a unit site needs nn.Linear there")
    return module


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is a ``Conv1D`` of ``transformers``: a linear map with its weight the other way round."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def output_weight(network: nn.Module, site: UnitSite) -> Float[Tensor, "dim features"]:
    """Return the parameter (or a view of it) through which a site's units write; a unit's features side by side.

    Those of a channel are the places of the kernel, as ``attribution.sites.output_weight`` orders them. Of a network
    that workers share out it is gathered, so that it is a copy.
    """
    return as_output(whole(network.get_parameter(site.output)), site)


def as_output(weight: Tensor, site: UnitSite) -> Float[Tensor, "dim features"]:
    """Return a view of the parameter that ``site.output`` names, as ``output_weight`` gives it."""
    return weight.t() if _transposed(site) else weight.flatten(1)


def stream_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """Return the residual stream in what the module of ``FfnUnits.stream`` returned: it comes first."""
    return output[0] if isinstance(output, tuple) else output


def input_weight(network: nn.Module, site: UnitSite) -> Float[Tensor, "units inputs"]:
    """Return the weights through which a site's units read, those of all ways in (gate and up) side by side."""
    ways_in = [whole(network.get_parameter(part.parameter)) for part in site.ways_in]
    matrices = [weight.t() if _transposed(site) else weight for weight in ways_in if weight.ndim > 1]
    return torch.cat([weight.reshape(site.units, -1) for weight in matrices], dim=1)


def _transposed(site: UnitSite) -> bool:
    return isinstance(site, FfnUnits) and site.transposed


def flops(network: nn.Module, site: UnitSite, length: int) -> int:
    """Return the floating-point operations of one unit's forward pass, a token (or example): 2 a weight.

    Heads also compare with, and read from, other positions: ``length`` / 2 of them on average in causal rows of
    ``length`` tokens, all of them in others. Weights are applied at every place of a channel's map, and at every token
    that an image becomes.
    """
    shapes = [tensor_of(network, part.parameter).shape for part in site.slices]
    own = 2 * sum(shape.numel() for shape in shapes if len(shape) > 1) // site.units
    match site:
        case FfnUnits():
            return own * site.places
        case HeadUnits():
            seen = length if site.causal else 2 * (length if site.places == 1 else site.places)
            return (own + 2 * site.queries * site.size * seen) * site.places
        case ConvUnits():
            return own * site.places
        case _:
            assert_never(site)


def check(network: nn.Module, sites: Sequence[UnitSite]) -> UnitSpace:
    """Return the unit space of the sites; ValueError where a tensor does not have the units a site claims."""
    for site in sites:
        for part in site.slices:
            shape = tensor_of(network, part.parameter).shape
            if shape[part.axis] != site.units * part.width:
                raise ValueError(
                    f"site {site.name!r}: {part.parameter} has shape {tuple(shape)}, "
                    f"wanted {site.units * part.width} on axis {part.axis}"
                )
    return UnitSpace(tuple(sites))
