"""Budgeted control: how far a round may cut, what that is expected to cost, and why a run stopped.

A cut's tax is foreseen from its J: the tax right before the cut, plus as many nats for each nat of J as cuts have cost
in this run so far, those that were rolled back included. Before the first round is judged, a nat of J counts as one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import assert_never

from moeify.config import Budget
from moeify.events import RoundEnded, Stop
from moeify.propose import Proposal
from moeify.result import MEAN

_HALVINGS = 10
"""How often a step is bisected: to a thousandth of what the round asks for."""


class NoStepLeftError(ValueError):
    """No cut that is worth a round is expected to stay in the budget."""


@dataclass(frozen=True)
class Standing:
    """What the split model costs right before a cut."""

    tax: float
    """Mean over categories of the nats above the dense twin on validation data."""
    used: float | None
    """The part of the budget that this takes; None without a budget."""
    twin: Mapping[str, float]
    """Category -> the dense twin's nats on validation data."""


@dataclass(frozen=True)
class Forecast:
    """Foresees a figure after recovery from the J of a cut."""

    now: float
    """The figure right before the cut."""
    scale: float
    """What a nat of J adds to it; never negative."""

    def after(self, predicted: float) -> float:
        """Return the figure to expect of a cut with that J."""
        return self.now + self.scale * predicted


def tax_forecast(standing: Standing, rounds: Sequence[RoundEnded]) -> Forecast:
    """Return what foresees the mean tax in nats, calibrated on the rounds so far."""
    pairs = [(r.predicted, r.tax - r.tax_before) for r in rounds if r.tax_before is not None]
    return Forecast(standing.tax, _scale(pairs, 1.0))


def budget_forecast(standing: Standing, rounds: Sequence[RoundEnded], budget: Budget) -> Forecast:
    """Return what foresees the part of the budget that is used, calibrated on the rounds so far."""
    assert standing.used is not None
    known = [(r.predicted, r.budget_used, r.budget_used_before) for r in rounds]
    pairs = [(j, after - before) for j, after, before in known if after is not None and before is not None]
    return Forecast(standing.used, _scale(pairs, 1.0 / budget.limit(fmean(standing.twin.values()))))


def _scale(pairs: Sequence[tuple[float, float]], before: float) -> float:
    """Return the rise of all rounds together over the J of all together; ``before`` where no round has cut yet."""
    predicted = sum(j for j, _ in pairs)
    return max(0.0, sum(rise for _, rise in pairs)) / predicted if predicted > 0.0 else before


def budget_used(budget: Budget, taxes: Mapping[str, float], twin: Mapping[str, float]) -> float:
    """Return the part of the budget that a tax takes, 1 = all of it; below 0 where nothing is lost.

    ``taxes``: category -> nats above the dense twin, and their ``mean``; ``twin``: category -> the dense twin's nats.
    """
    match budget.per:
        case "mean":
            return taxes[MEAN] / budget.limit(fmean(twin.values()))
        case "category":
            return max(taxes[category] / budget.limit(loss) for category, loss in twin.items())
        case _:
            assert_never(budget.per)


def deepest(cut: Callable[[float], Proposal], least: float, most: float, fits: Callable[[Proposal], bool]) -> Proposal:
    """Return the cut with the largest separation from ``least`` to ``most`` that fits, to a thousandth of the way.

    J rises with separation. Raises NoStepLeftError where not even the smallest fits.
    """
    if fits(whole := cut(most)):
        return whole
    if not fits(found := cut(least)):
        raise NoStepLeftError(
            f"no step left: even a separation of {found.partition.separation:.3f} is expected to cost more than the "
            f"budget (J {found.predicted:.2g})"
        )
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        if fits(proposal := cut(middle)):
            found, least = proposal, middle
        else:
            most = middle
    return found


def why_stopped(rounds: Sequence[RoundEnded], separation: float) -> Stop:
    """Name the reason why a run was not split any further; ``separation`` is what its recipe asked for in the end."""
    if any(r.outcome == "kept" and r.asked >= separation - 1e-9 for r in rounds):
        return "target reached"
    return rounds[-1].uncut or "rounds used up"
