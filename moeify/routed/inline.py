"""Routed feed-forward blocks of layers that run up, activation and down themselves, and on tokens without rows.

Such a block is no module that could be replaced, so the three that the layer calls share the work. Up and down keep
their places and their parameters' names.

Axes: R rows, T positions, N tokens (rows times positions), D model width, U units.
"""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from moeify.models.units import FfnUnits
from moeify.routed.ffn import RoutedFfn, Routes, uncompiled


class InlineFfn(RoutedFfn):
    """What stands in the place of the activation.

    Routed, up and down hand on what they are given, and all is done here. Masked, each does its own part, so that
    attribution reads units at the input of down, as it does elsewhere.
    """

    def __init__(self, layer: nn.Module, units: FfnUnits, routes: Routes) -> None:
        super().__init__(nn.Identity(), units, routes)
        self._outer = {
            units.up: _Up.of(cast(nn.Linear, layer.get_submodule(units.up)), routes),
            units.down: _Down.of(cast(nn.Linear, layer.get_submodule(units.down)), routes),
        }
        """Submodules of the layer, and not of this one."""

    @classmethod
    def install(cls, layer: nn.Module, units: FfnUnits, routes: Routes) -> None:
        """Replace the layer's activation, up and down, in place."""
        assert units.inline is not None
        block = cls(layer, units, routes)
        setattr(layer, units.inline, block)
        for name, linear in block._outer.items():
            setattr(layer, name, linear)

    def forward(self, x: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens _"]:
        """Return what the active units write [N D] to x [N D]; masked, activations [R T U] of what up gives."""
        return uncompiled(self._run)(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.routes.masked:
            return super()._run(x)
        return super()._run(_rows(x, self.routes)).flatten(0, -2)

    def _map(self, name: str) -> nn.Linear:
        return self._outer[name]

    def _masked(self, x: Tensor) -> Tensor:
        return self._active(x, None)


class _Outer(nn.Linear):
    """A linear map of the layer; it does its part where the oracle runs, and nothing otherwise."""

    routes: Routes

    @classmethod
    def of(cls, linear: nn.Linear, routes: Routes) -> "_Outer":
        """Return the same map, with the same parameters."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight, made.bias, made.routes = linear.weight, linear.bias, routes
        return made.train(linear.training)


class _Up(_Outer):
    def forward(self, x: Float[Tensor, "tokens dim"]) -> Tensor:
        return super().forward(_rows(x, self.routes)) if self.routes.masked else x


class _Down(_Outer):
    def forward(self, x: Float[Tensor, "*tokens features"]) -> Float[Tensor, "tokens dim"]:
        return super().forward(x).flatten(0, -2) if self.routes.masked else x


def _rows(x_ND: Tensor, routes: Routes) -> Float[Tensor, "rows positions dim"]:
    rows = routes.bounds[-1]
    return x_ND.view(rows, len(x_ND) // max(1, rows), -1)
