"""Routed execution: with rows sorted by leaf, every expert is a rectangle of rows times units.

A routed feed-forward layer is a short sum of plain matrix products over views, one rectangle a node: no masks, no
gathers, no copied weights, forward and backward. Torch's own product of groups (``grouped_mm``) takes experts of one
width alone, and on CPU won 2 to 6 % in float32 and nothing in bfloat16 but at the smallest size, so it is not used. The
masked path, which runs every unit and zeroes those off the route, is the slow oracle, and is what attribution reads.

Axes: N tokens (rows times positions), D model width, U units; a rectangle has n tokens and u units.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moeify.models.units import Activation, FfnUnits, activate
from moeify.routed.learning import Damped, Learning, Rectangle, scale, within
from moeify.splitting.partition import Partition

P = ParamSpec("P")
T = TypeVar("T")

_REMEMBERED = 1024
"""Sites times mixtures of categories, at most."""


@dataclass
class Routes:
    """What every routed module of one network shares: the partition, and where each leaf's rows lie in this batch."""

    partition: Partition
    bounds: tuple[int, ...] = ()
    """Row offsets by leaf position: position k serves rows ``bounds[k] .. bounds[k + 1]``."""
    categories: Int[Tensor, " rows"] | None = None
    """Category index of each row in this batch, for blocks that are told; rows in the order in which they run."""
    order: Int[Tensor, " tokens"] | None = None
    """Where each token has a route of its own: the order by leaf in which tokens run, each as a row of one position."""
    places: Int[Tensor, " tokens"] | None = None
    """The inverse of ``order``: where each token runs."""
    ablated: frozenset[int] = field(default_factory=frozenset)
    """Nodes whose own units give nothing."""
    masked: bool = False
    """Run the oracle instead of rectangles."""
    learning: Learning | None = None
    """What runs and learns in this batch, where gradients are routed."""
    routers: Mapping[str, Float[Tensor, "leaves dim"]] | None = None
    """Site -> what scores leaves at its input, where every site routes tokens by itself."""
    _found: dict[tuple[Any, ...], tuple[Rectangle, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Rectangles of ``_partition``, by what they depend on besides: a token at a time, they are the same for long."""
    _partition: Partition | None = field(default=None, init=False, repr=False, compare=False)

    def rectangles(self, site: str, positions: int = 1) -> Sequence[Rectangle]:
        """Return the non-empty rectangles of a site, rows counted in tokens of ``positions`` a row."""
        if self.learning:
            return self.learning.running(site, positions)
        if self._partition is not self.partition or len(self._found) > _REMEMBERED:
            self._found, self._partition = {}, self.partition
        key = (site, positions, self.bounds, self.ablated)
        if (found := self._found.get(key)) is None:
            found = self._found[key] = tuple(self._rectangles(site, positions))
        return found

    def _rectangles(self, site: str, positions: int) -> Iterator[Rectangle]:
        for node, (start, width) in enumerate(
            zip(self.partition.starts(site), self.partition.widths[site], strict=True)
        ):
            first, last = self.partition.tree.span(node)
            low, high = self.bounds[first] * positions, self.bounds[last] * positions
            if width and high > low and node not in self.ablated:
                yield Rectangle(slice(low, high), slice(start, start + width))

    def damped(self, site: str, positions: int = 1) -> list[Damped]:
        """Return the rectangles of a site that do not learn in full."""
        return self.learning.damped(site, positions) if self.learning else []

    def decide(self, site: str, x: Float[Tensor, "*tokens dim"]) -> None:
        """Send each token along the route of the leaf that the site's router scores highest, where it has one."""
        if self.routers is None:
            return
        tree = self.partition.tree
        firsts, weight_ED = torch.tensor([tree.span(leaf)[0] for leaf in tree.leaves]), self.routers[site]
        positions = firsts.to(x.device)[(x.flatten(0, -2).to(weight_ED.dtype) @ weight_ED.t()).argmax(-1)]
        self.order = torch.argsort(positions, stable=True)
        self.places = torch.argsort(self.order)
        counts = torch.bincount(positions, minlength=len(tree.categories))
        self.bounds = (0, *counts.cumsum(0).tolist())

    def routing(self, routers: Mapping[str, Float[Tensor, "leaves dim"]]) -> AbstractContextManager[None]:
        """Return a context in which every site's router chooses each token's leaf from what the site reads."""
        return self._being({"routers": routers, "order": None, "places": None, "bounds": (), "categories": None})

    def learns(self, learning: Learning | None) -> AbstractContextManager[None]:
        """Run and teach as ``learning`` says while the context lasts; backward passes may come later."""
        assert not self.masked
        assert not self.ablated
        return self._being({"learning": learning})

    def as_now(self) -> AbstractContextManager[None]:
        """Return a context in which the routes are what they are at this call, for a pass that is run again later."""
        names = ("partition", "bounds", "categories", "order", "places", "ablated", "masked", "learning", "routers")
        return self._being({name: getattr(self, name) for name in names})

    @contextmanager
    def _being(self, kept: dict[str, Any]) -> Iterator[None]:
        before = {name: getattr(self, name) for name in kept}
        vars(self).update(kept)
        try:
            yield
        finally:
            vars(self).update(before)

    def ablating(self, nodes: Sequence[int]) -> AbstractContextManager[None]:
        """Zero the own units of these nodes while the context lasts."""
        return self._being({"ablated": self.ablated | frozenset(nodes)})

    def masking(self) -> AbstractContextManager[None]:
        """Run the masked oracle while the context lasts."""
        return self._being({"masked": True})


def uncompiled(run: Callable[P, T]) -> Callable[P, T]:
    """Return ``run``, out of whose frames ``torch.compile`` keeps.

    How many rows a leaf has changes from batch to batch. Traced, every mixture of categories was compiled anew, which
    takes longer than hundreds of batches. Left out, a network compiles once, and what is between its routed blocks is
    compiled. At the size of the shipped text recipe that made it no faster (the dense twin's step: by an eighth).
    """
    return torch.compiler.disable(run) if torch.compiler.is_compiling() else run


def lowered(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors in the precision that autocast gives products here, where it is on; gradients come back in
    their own. It does so by itself for torch's functions, and not inside of ours."""
    given = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(given):
        return tensors
    dtype = torch.get_autocast_dtype(given)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class RoutedFfn(nn.Module):
    """A feed-forward block that runs only the units on each row's route.

    It takes over the submodules of the dense block under their own names, so parameter names stay those of the
    stock architecture. ``torch.compile`` runs it as it is, see ``uncompiled``.
    """

    def __init__(self, dense: nn.Module, units: FfnUnits, routes: Routes) -> None:
        super().__init__()
        for name, child in dense.named_children():
            self.add_module(name, child)
        self.training = dense.training
        self.units = units
        self.routes = routes
        self.told: nn.Embedding | None = None
        """Category -> what is added to what ``up`` gives, where the block is told; see ``moeify.routed.told``."""

    def forward(self, x: Float[Tensor, "rows *positions dim"]) -> Float[Tensor, "rows *positions out"]:
        """Return what the active units write."""
        return uncompiled(self._run)(x)

    def _run(self, x: Tensor) -> Tensor:
        self.routes.decide(self.units.name, x)
        run, order, places = self._masked if self.routes.masked else self._routed, self.routes.order, self.routes.places
        if order is None or places is None:
            out = run(x)
        else:
            sorted_ND = run(_permute(x.flatten(0, -2), order, places))
            out = _permute(sorted_ND, places, order).view(*x.shape[:-1], -1)
        return self.get_submodule(self.units.after)(out) if self.units.after else out

    def _map(self, name: str) -> Any:
        """Return an ``nn.Linear``, or a ``Conv1D`` where units are transposed."""
        found = self._modules.get(name)  # at once, where the name has no dots: a token at a time, this shows
        return self.get_submodule(name) if found is None else found

    def _told(self, x: Tensor) -> Tensor | None:
        if self.told is None:
            return None
        assert self.routes.categories is not None
        return self.told(self.routes.categories.repeat_interleave(x.shape[:-1].numel() // max(1, x.shape[0])))

    def _routed(self, x: Tensor) -> Tensor:
        up, down = self._map(self.units.up), self._map(self.units.down)
        gate = self._map(self.units.gate) if self.units.gate else None
        up_UD, down_DU = (way.weight.t() if self.units.transposed else way.weight for way in (up, down))
        flat_ND = x.reshape(-1, x.shape[-1])
        positions = flat_ND.shape[0] // max(1, x.shape[0])
        rectangles = self.routes.rectangles(self.units.name, positions)
        flat_ND, *maps = lowered(
            flat_ND,
            gate.weight if gate else None,
            gate.bias if gate else None,
            up_UD,
            up.bias,
            self._told(x),
            down_DU,
            down.bias,
        )
        if torch.is_grad_enabled():
            damped = self.routes.damped(self.units.name, positions)
            out_ND = _rectangles(flat_ND, rectangles, damped, self.units.activation, *maps)
        else:
            out_ND = _written(flat_ND, Maps(*maps), rectangles, self.units.activation)
        return out_ND.view(*x.shape[:-1], -1)

    def _masked(self, x: Tensor) -> Tensor:
        gate = None if self.units.gate is None else self._map(self.units.gate)(x)
        return self._map(self.units.down)(self._active(self._map(self.units.up)(x), gate))

    def _active(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Return the activations [rows *positions units], 0 off each row's route, of what up and gate give."""
        if (told_NU := self._told(up)) is not None:
            up = up + told_NU.view(up.shape)
        hidden = activate(up if gate is None else gate, self.units.activation)
        if gate is not None:
            hidden = hidden * up
        mask_RU = hidden.new_zeros(up.shape[0], self.units.units)
        for rectangle in self.routes.rectangles(self.units.name):
            mask_RU[rectangle] = 1.0
        return hidden * mask_RU.view(up.shape[0], *[1] * (up.dim() - 2), self.units.units)


class Maps(NamedTuple):
    """A block's maps; None where it has none."""

    gate_UD: Tensor | None
    gate_bias_U: Tensor | None
    up_UD: Tensor
    up_bias_U: Tensor | None
    told_NU: Tensor | None
    """What is added to what up gives, row by row."""
    down_DU: Tensor
    down_bias_D: Tensor | None


def _written(
    x_ND: Tensor,
    maps: Maps,
    rectangles: Sequence[Rectangle],
    activation: Activation,
    hidden: list[Tensor] | None = None,
) -> Tensor:
    """Return the sum over rectangles of down(act(gate(x)) * up(x)), each over its own rows and units.

    ``hidden`` is given what up and gate give in each rectangle.
    """
    gate_UD, gate_bias_U, up_UD, up_bias_U, told_NU, down_DU, down_bias_D = maps
    out_ND = x_ND.new_zeros(x_ND.shape[0], down_DU.shape[0])
    if down_bias_D is not None:
        out_ND += down_bias_D
    for rows, units in rectangles:
        x_nD = x_ND[rows]
        up_nu = F.linear(x_nD, up_UD[units], None if up_bias_U is None else up_bias_U[units])
        if told_NU is not None:
            up_nu += told_NU[rows, units]
        read = [up_nu]
        if gate_UD is None:
            active_nu = activate(up_nu, activation)
        else:
            gate_nu = F.linear(x_nD, gate_UD[units], None if gate_bias_U is None else gate_bias_U[units])
            read.append(gate_nu)
            active_nu = activate(gate_nu, activation).mul_(up_nu)
        if hidden is not None:
            hidden += read
        out_ND[rows].addmm_(active_nu, down_DU[:, units].t())
    return out_ND


class _Rectangles(torch.autograd.Function):
    """``_written``, forward and backward.

    Written out because autograd's own backward of a weight's view fills and adds a whole weight for each node;
    here each rectangle's gradient is one product, added straight to its slice. ``damped``: what learns less than all,
    see ``moeify.routed.learning``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        rectangles: Sequence[Rectangle],
        damped: list[Damped],
        activation: Activation,
        *tensors: Any,
    ) -> Tensor:
        maps = Maps(*tensors)
        hidden: list[Tensor] = []
        out_ND = _written(x_ND, maps, rectangles, activation, hidden)
        kept = (maps.gate_UD, maps.gate_bias_U, maps.up_UD, maps.up_bias_U, maps.down_DU, maps.down_bias_D)
        ctx.save_for_backward(x_ND, *kept, *hidden)
        ctx.rectangles, ctx.damped = rectangles, damped
        ctx.activation = activation
        ctx.told = maps.told_NU is not None
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (out_grad_ND,) = grads
        x_ND, gate_UD, gate_bias_U, up_UD, up_bias_U, down_DU, down_bias_D, *hidden = ctx.saved_tensors
        x_grad_ND = torch.zeros_like(x_ND)
        parameters = (gate_UD, gate_bias_U, up_UD, up_bias_U, down_DU)
        gate_grad, gate_bias_grad, up_grad, up_bias_grad, down_grad = (
            None if p is None else torch.zeros_like(p) for p in parameters
        )
        told_grad = x_ND.new_zeros(x_ND.shape[0], up_UD.shape[0]) if ctx.told else None
        assert up_grad is not None
        assert down_grad is not None
        saved = iter(hidden)
        for rows, units in ctx.rectangles:
            damped = within(Rectangle(rows, units), ctx.damped)
            x_nD, out_grad_nD = x_ND[rows], out_grad_ND[rows]
            active_grad_nu = out_grad_nD @ down_DU[:, units]
            scale(active_grad_nu, damped, _flow)
            up_nu = next(saved)
            if gate_UD is None:
                active_nu = activate(up_nu, ctx.activation)
                up_grad_nu = _activate_backward(active_grad_nu, up_nu, ctx.activation)
            else:
                gate_nu = next(saved)
                gated_nu = activate(gate_nu, ctx.activation)
                gate_grad_nu = _activate_backward(active_grad_nu * up_nu, gate_nu, ctx.activation)
                up_grad_nu = active_grad_nu.mul_(gated_nu)
                active_nu = gated_nu.mul_(up_nu)
                assert gate_grad is not None
                x_grad_ND[rows].addmm_(gate_grad_nu, gate_UD[units])
                scale(gate_grad_nu, damped, _read)
                gate_grad[units].addmm_(gate_grad_nu.t(), x_nD)
                if gate_bias_grad is not None:
                    gate_bias_grad[units] += gate_grad_nu.sum(0)
            x_grad_ND[rows].addmm_(up_grad_nu, up_UD[units])
            scale(up_grad_nu, damped, _read)
            if told_grad is not None:
                told_grad[rows, units] = up_grad_nu
            up_grad[units].addmm_(up_grad_nu.t(), x_nD)
            if up_bias_grad is not None:
                up_bias_grad[units] += up_grad_nu.sum(0)
            scale(active_nu, damped, _write)
            down_grad[:, units].addmm_(out_grad_nD.t(), active_nu)
        down_bias_grad = None if down_bias_D is None else out_grad_ND.sum(0)
        of_maps = (gate_grad, gate_bias_grad, up_grad, up_bias_grad, told_grad, down_grad, down_bias_grad)
        return (x_grad_ND, None, None, None, *of_maps)


class _Permute(torch.autograd.Function):
    """Rows in another order; backward too they are gathered, where autograd's own adds each up to zeros."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_N), None, None


_permute: Callable[..., Tensor] = _Permute.apply
_rectangles: Callable[..., Tensor] = _Rectangles.apply
_flow, _read, _write = attrgetter("flow"), attrgetter("read"), attrgetter("write")


def _activate_backward(grad: Tensor, x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "silu":
            return torch.ops.aten.silu_backward(grad, x)
        case "relu":
            return torch.ops.aten.threshold_backward(grad, x, 0)
        case "gelu":
            return torch.ops.aten.gelu_backward(grad, x)
        case "gelu_tanh":
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
