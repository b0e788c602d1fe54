"""Routed blocks of layers that run up, activation and down themselves, or what heads see and their way out.

Such a block is no module that could be replaced, so those that the layer calls share the work. Maps keep their places
and their parameters' names.

Axes: R rows, T positions, N tokens (rows times positions), D model width, U units.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.models.units import FfnUnits, HeadUnits
from moeify.routed.attention import RoutedAttention
from moeify.routed.ffn import RoutedFfn, Routes, uncompiled


class InlineFfn(RoutedFfn):
    """What stands in the place of the activation.

    Routed, up and down hand on what they are given, and all is done here. Masked, each does its own part, so that
    attribution reads units at the input of down, as it does elsewhere. A layer may hand over tokens in rows [R T D] or
    without [N D], and gets back the same.
    """

    def __init__(self, layer: nn.Module, units: FfnUnits, routes: Routes) -> None:
        super().__init__(nn.Identity().train(layer.training), units, routes)
        up, down = (cast(nn.Linear, layer.get_submodule(name)) for name in (units.up, units.down))
        self._outer = {units.up: _Up.of(up, routes), units.down: _Down.of(down, routes)}
        """Submodules of the layer, and not of this one."""
        self._outer[units.down].shape = self._outer[units.up].shape

    @classmethod
    def install(cls, layer: nn.Module, units: FfnUnits, routes: Routes) -> None:
        """Replace the layer's activation, up and down, in place."""
        assert units.inline is not None
        block = cls(layer, units, routes)
        layer.set_submodule(units.inline, block)
        for name, linear in block._outer.items():
            layer.set_submodule(name, linear)

    def forward(self, x: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens2 _"]:
        """Return what the active units write to x; masked, activations [R T U] of what up gives."""
        return uncompiled(self._run)(x)

    def _run(self, x: Tensor) -> Tensor:
        if self.routes.masked:
            return super()._run(x)
        return super()._run(_rows(x, self.routes)).view(*x.shape[:-1], -1)

    def _map(self, name: str) -> nn.Linear:
        return self._outer[name]

    def _masked(self, x: Tensor) -> Tensor:
        return self._active(x, None)


class InlineAttention(RoutedAttention):
    """What stands in the place of the submodule that all heads are in but their way out, which is outside of it.

    Routed, heads write here, and the way out hands on what it is given. Masked, it does its own part, as above.
    """

    def __init__(self, block: nn.Module, units: HeadUnits, routes: Routes) -> None:
        assert units.inline is not None
        super().__init__(block.get_submodule(units.inline), units, routes)
        self._outer = {units.out: _Outer.of(cast(nn.Linear, block.get_submodule(units.out)), routes)}
        """A submodule of the block, and not of this one."""

    @classmethod
    def install(cls, block: nn.Module, units: HeadUnits, routes: Routes) -> None:
        """Replace the block's attention and its way out, in place."""
        assert units.inline is not None
        routed = cls(block, units, routes)
        block.set_submodule(units.inline, routed)
        block.set_submodule(units.out, routed._outer[units.out])

    def _linear(self, name: str) -> nn.Linear:
        if name in self._outer:
            return self._outer[name]
        return cast(nn.Linear, self.get_submodule(name.removeprefix(f"{self.units.inline}.")))

    def _written(self, seen: Tensor) -> Tensor:
        return seen


class _Outer(nn.Linear):
    """A linear map of the layer; it does its part where the oracle runs, and nothing otherwise."""

    routes: Routes
    shape: "_Shape"

    @classmethod
    def of(cls, linear: nn.Linear, routes: Routes) -> "_Outer":
        """Return the same map, with the same parameters."""
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        made.weight, made.bias, made.routes, made.shape = linear.weight, linear.bias, routes, _Shape()
        return made.train(linear.training)

    def forward(self, x: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens _"]:
        return super().forward(x) if self.routes.masked else x


class _Up(_Outer):
    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens2 _"]:
        self.shape.tokens = x.shape[:-1]
        return super().forward(_rows(x, self.routes) if self.routes.masked else x)


class _Down(_Outer):
    def forward(self, x: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens2 dim"]:
        return super().forward(x).view(*self.shape.tokens, -1)


@dataclass
class _Shape:
    """How the layer handed tokens over in this pass."""

    tokens: torch.Size = field(default_factory=torch.Size)


def _rows(x: Float[Tensor, "*tokens dim"], routes: Routes) -> Float[Tensor, "rows positions dim"]:
    """Return tokens in rows, as they may be already."""
    rows = 1 if routes.routers else routes.bounds[-1]  # routers take tokens as they come
    return x if x.dim() > 2 else x.view(rows, len(x) // max(1, rows), -1)
