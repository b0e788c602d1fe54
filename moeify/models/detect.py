"""Feed-forward blocks of a network that has no adapter, found by what they compute.

A module is one if all its parameters are those of two linear maps, or three, whose shapes fit, and if it computes
``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))``, for one of the activations that routed blocks know: asked in
float64 of a copy whose weights are drawn at random, so that no trained weight (a zero, say) hides a difference, and
asked in training mode too, so that dropout is known or the block is left alone. A block that passes may be replaced by
its routed form wherever the network calls it. What the network does with the block's weights besides, it can hide from
this; ``moeify.routed.proof`` asks the whole network.
"""

import copy
import json
from collections.abc import Iterator
from itertools import permutations, product
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.edge_taps import Entry
from moeify.models.units import Activation, FfnUnits, UnitSite, activate

NEEDS = (
    "an adapter names the network's class, how it is described and rebuilt, and for each site its module, the linear "
    "maps up, gate and down, and the activation; docs/extending.md shows how to add one"
)
_ROWS, _POSITIONS = 2, 5
_SIZES = (1.0, 100.0)
"""Of inputs: large ones tell an activation from one that is cut off, as ReLU from ReLU6."""
_TOLERANCE = 1e-9
_TOLD = ".told.weight"
_REMEMBERED = 4


class Detected:
    """An adapter of networks whose blocks are found. Only their own code can make them, so what is rebuilt is a copy of
    one that this process was given (``remember``); there is no stock form to export."""

    family = "detected"
    network = ""

    def __init__(self) -> None:
        self._given: dict[str, nn.Module] = {}
        """Description -> a network of that shape; the last ones."""

    def remember(self, network: nn.Module) -> None:
        """Keep a copy by which ``build`` makes networks of the same shape."""
        key = _key(self.describe(network))
        self._given.pop(key, None)
        self._given[key] = copy.deepcopy(network)
        while len(self._given) > _REMEMBERED:
            del self._given[next(iter(self._given))]

    def sites(self, network: nn.Module) -> list[UnitSite]:
        """Return what is found, in the network's order; ValueError where nothing is."""
        found: list[UnitSite] = list(feed_forward_blocks(network))
        if not found:
            raise ValueError(
                f"no adapter for {type(network).__name__}, and no module of it is provably a feed-forward block by "
                f"itself; {NEEDS}"
            )
        return found

    def entries(self, network: nn.Module) -> tuple[Entry, ...]:
        """Return none: nothing is known of what lies between the blocks."""
        self.sites(network)
        return ()

    def places(self, network: nn.Module) -> dict[str, int]:
        """Return nothing: convolutions are not counted."""
        return {}

    def describe(self, network: nn.Module) -> dict[str, Any]:
        """Return the shapes of all parameters but biases of categories, to tell networks apart by."""
        self.sites(network)
        shapes = {name: list(each.shape) for name, each in network.named_parameters() if not name.endswith(_TOLD)}
        return {"class": type(network).__name__, "parameters": dict(sorted(shapes.items()))}

    def build(self, description: dict[str, Any]) -> nn.Module:
        """Return a copy of the network of this shape that was given; ValueError where there was none."""
        if given := self._given.get(_key(description)):
            return copy.deepcopy(given)
        raise ValueError(f"a {description.get('class')} cannot be rebuilt without an adapter; {NEEDS}")

    def with_units(self, description: dict[str, Any], units: int, heads: int | None) -> dict[str, Any]:
        """Refuse: nothing says how to make another one."""
        raise ValueError(f"a {description.get('class')} cannot be rebuilt without an adapter; {NEEDS}")

    def with_biases(self, description: dict[str, Any]) -> dict[str, Any]:
        """Refuse, as ``with_units`` does."""
        raise ValueError(f"a {description.get('class')} cannot be rebuilt without an adapter; {NEEDS}")

    def inputs(self, network: nn.Module, rows: int, generator: torch.Generator) -> Tensor:
        """Refuse: nothing is known of what the network takes."""
        raise ValueError(f"nothing is known of what a {type(network).__name__} takes; {NEEDS}")


def _key(description: dict[str, Any]) -> str:
    return json.dumps([description["class"], description["parameters"]])


def feed_forward_blocks(network: nn.Module) -> Iterator[FfnUnits]:
    """Yield the blocks, innermost ones, in the network's order; those that are routed already as they were found."""
    shared = _shared(network)
    taken: list[str] = []
    found: dict[str, FfnUnits] = {}
    modules = {name: module for name, module in network.named_modules() if name}
    for name in sorted(modules, key=lambda name: -name.count(".")):
        if any(inner.startswith(f"{name}.") for inner in taken):
            continue
        routed = getattr(modules[name], "units", None)
        if isinstance(routed, FfnUnits):
            found[name] = routed
        elif not shared.intersection(modules[name].parameters()) and (block := _block(name, modules[name])):
            found[name] = block
        if name in found:
            taken.append(name)
    yield from (found[name] for name in modules if name in found)


def _block(name: str, module: nn.Module) -> FfnUnits | None:
    """Return what a module is as a feed-forward block; None where it is none."""
    maps = {path: each for path, each in module.named_modules() if type(each) is nn.Linear}
    held = sum(parameter.numel() for each in maps.values() for parameter in each.parameters())
    every = [*module.parameters(), *module.buffers()]
    if len(maps) not in (2, 3) or "" in maps or sum(tensor.numel() for tensor in every) != held:
        return None
    drops = [path for path, each in module.named_modules() if isinstance(each, nn.Dropout) and each.p > 0]
    if len(drops) > 1:
        return None
    for names in permutations(maps):
        *ways_in, down = names
        units = maps[down].in_features
        inputs = maps[ways_in[0]].in_features
        if any((maps[way].out_features, maps[way].in_features) != (units, inputs) for way in ways_in):
            continue
        for activation in get_args(Activation):
            site = FfnUnits(
                f"{name}.hidden",
                name,
                ways_in[0] if len(ways_in) == 2 else None,
                ways_in[-1],
                down,
                activation,
                units,
                gate_bias=len(ways_in) == 2 and maps[ways_in[0]].bias is not None,
                up_bias=maps[ways_in[-1]].bias is not None,
                after=drops[0] if drops else None,
            )
            if _computes(module, site):
                return site
    return None


@torch.no_grad()
def _computes(module: nn.Module, site: FfnUnits) -> bool:
    """Say whether a module computes what a site says, whatever its weights are."""
    asked = copy.deepcopy(module).cpu().double()
    generator = torch.Generator().manual_seed(0)
    for parameter in asked.parameters():
        drawn = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else drawn)
    up = asked.get_submodule(site.up)
    assert isinstance(up, nn.Linear)
    for positions, size in product(((), (_POSITIONS,)), _SIZES):
        x = size * torch.randn(_ROWS, *positions, up.in_features, dtype=torch.float64, generator=generator)
        for training in (False, True):
            asked.train(training)
            got, wanted = _drawn(asked, x), _drawn(_Reference(asked, site), x)
            if not isinstance(got, Tensor) or got.shape != wanted.shape:
                return False
            if not torch.allclose(got, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
                return False
    return True


class _Reference(nn.Module):
    """What a site says that its module computes."""

    def __init__(self, module: nn.Module, site: FfnUnits) -> None:
        super().__init__()
        self.module, self.site = module, site

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        up = self._map(self.site.up)(x)
        hidden = activate(up if self.site.gate is None else self._map(self.site.gate)(x), self.site.activation)
        out = self._map(self.site.down)(hidden if self.site.gate is None else hidden * up)
        return self._map(self.site.after)(out) if self.site.after else out

    def _map(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)


def _drawn(run: nn.Module, x: Tensor) -> Any:
    """Return what a module gives, None where it does not take one tensor; dropout draws the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        try:
            return run(x)
        except Exception:
            return None


def _shared(network: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that the network holds under several names."""
    names: dict[nn.Parameter, int] = {}
    for _, parameter in network.named_parameters(remove_duplicate=False):
        names[parameter] = names.get(parameter, 0) + 1
    return {parameter for parameter, count in names.items() if count > 1}
