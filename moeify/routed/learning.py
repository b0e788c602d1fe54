"""Which units run and learn in a batch, where that is not simply what is on each row's route (gradient routing).

A batch is a run of segments, rows that are treated alike; an expert's own units and a segment are a rectangle. Nothing
is computed category by category: all that runs goes through one product, and what may not learn is scaled, most often
to zero, in the gradients of activations before they become gradients of weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Rectangle(NamedTuple):
    """Half-open ranges: these tokens (or rows) run these units."""

    rows: slice
    units: slice


class Factors(NamedTuple):
    """What is left of a unit's gradients on a row, each 0..1."""

    flow: float
    """Of its activation's gradient, and so of all that its input weights and the units below it get through it."""
    read: float
    """Of its input weights' gradients, beside that."""
    write: float
    """Of its output weights' gradients."""


ALL = Factors(1.0, 1.0, 1.0)


class Damped(NamedTuple):
    """A rectangle whose units learn less from its rows than they would."""

    rows: slice
    units: slice
    factors: Factors


class Treatment(NamedTuple):
    """How some rows use an expert's own units."""

    runs: bool
    factors: Factors


class Experts(NamedTuple):
    """One site's experts, core included, in the units' order."""

    units: Sequence[slice]
    """Each expert's own units, one behind the other."""
    treatments: Sequence[Sequence[Treatment]]
    """By expert, by segment of the batch."""


@dataclass(frozen=True)
class Learning:
    """What runs and what learns at each site in one batch."""

    bounds: Sequence[int]
    """Row offsets of the batch's segments, from 0 to the number of rows."""
    sites: dict[str, Experts]

    def running(self, site: str, positions: int = 1) -> list[Rectangle]:
        """Return what runs, rows counted in tokens of ``positions`` a row; neighbours that are alike in one piece."""
        experts = self.sites[site]
        kinds = [tuple(each.runs for each in row) for row in experts.treatments]
        return [Rectangle(*place) for place, runs in self._pieces(experts.units, kinds, positions) if runs]

    def damped(self, site: str, positions: int = 1) -> list[Damped]:
        """Return what runs and does not learn in full."""
        experts = self.sites[site]
        kinds = [tuple(each.factors if each.runs else ALL for each in row) for row in experts.treatments]
        found = self._pieces(experts.units, kinds, positions)
        return [Damped(*place, factors) for place, factors in found if factors != ALL]

    def _pieces(
        self, units: Sequence[slice], kinds: Sequence[tuple[Any, ...]], positions: int
    ) -> Iterable[tuple[tuple[slice, slice], Any]]:
        """Yield rectangles and what they are, experts and then segments that are alike taken together."""
        wide = [(own, row) for own, row in zip(units, kinds, strict=True) if own.stop > own.start]
        for row, alike in groupby(wide, key=lambda each: each[1]):
            group = [own for own, _ in alike]
            for kind, places in groupby(range(len(row)), key=row.__getitem__):
                segments = list(places)
                low, high = self.bounds[segments[0]] * positions, self.bounds[segments[-1] + 1] * positions
                if high > low:
                    yield (slice(low, high), slice(group[0].start, group[-1].stop)), kind


def within(rectangle: Rectangle, damped: Sequence[Damped]) -> list[Damped]:
    """Return the parts of damped rectangles that lie in a rectangle, counted from its corner."""
    found = []
    for rows, units, factors in damped:
        mine, own = _overlap(rectangle.rows, rows), _overlap(rectangle.units, units)
        if mine and own:
            found.append(Damped(mine, own, factors))
    return found


def scale(values: Tensor, damped: Sequence[Damped], factor: Callable[[Factors], float]) -> None:
    """Multiply rectangles of ``values`` [tokens units] by one of their factors, in place."""
    for rows, units, factors in damped:
        match factor(factors):
            case 1.0:
                pass
            case 0.0:
                values[rows, units] = 0.0
            case share:
                values[rows, units] *= share


def damp(values: Float[Tensor, "rows units"], damped: Sequence[Damped]) -> Float[Tensor, "rows units"]:
    """Return the values as they are; on the way back their gradients are scaled by ``flow``.

    For any layer's units, rows sorted so that they form rectangles: 0 is a stop-gradient.
    """
    return _damp(values, damped)


class _Damp(Function):
    """The identity, with scaled gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, damped: Sequence[Damped]) -> Tensor:
        ctx.damped = damped
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        scaled = grads[0].clone()
        scale(scaled, ctx.damped, lambda factors: factors.flow)
        return scaled, None


_damp: Callable[..., Tensor] = _Damp.apply


def _overlap(outer: slice, inner: slice) -> slice | None:
    low, high = max(outer.start, inner.start), min(outer.stop, inner.stop)
    return slice(low - outer.start, high - outer.start) if high > low else None
