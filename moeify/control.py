"""Budgeted control: how far a round may cut, what that is expected to cost, and why a run stopped.

What a cut costs after recovery is foreseen from what it costs at once, which one pass over validation data measures
before a token is spent: the tax right before the cut, plus that part of the rise at the cut that recoveries have left
in this run so far, rounds that were rolled back included. Before the first round is judged, all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import assert_never

from moeify.evaluation import mean_error
from moeify.events import RoundEnded, Stop
from moeify.recipe.rounds import Budget
from moeify.result import MEAN
from moeify.splitting.grouping import NothingToSplitError
from moeify.splitting.propose import Proposal

_HALVINGS = 6
"""How often a step is bisected: to a sixty-fourth of what the round asks for."""


class NoStepLeftError(ValueError):
    """No cut that is worth a round is expected to stay in the budget."""


@dataclass(frozen=True)
class Standing:
    """What the split model costs at a moment, on validation data."""

    tax: float
    """Mean over categories of the nats above the dense twin."""
    used: float | None
    """The part of the budget that this takes; None without a budget."""


@dataclass(frozen=True)
class Depth:
    """How deep a cut went, in separation by what the recipe counts."""

    before: float
    asked: float
    got: float
    rounding: float
    """What one multiple more of every expert's width adds (``Menu.rounding``)."""
    slack: float
    """A cut that is less deep than asked by less than this counts as what was asked."""

    def check_gain(self) -> None:
        """Raise NothingToSplitError where the cut goes no further than it was before."""
        if self.got <= self.before + 1e-9:
            why = "it is as deep already" if self.before >= self.asked else "widths leave no room for a cut"
            raise NothingToSplitError(f"separation {self.before:.3f} of {self.asked:.3f}: {why}")

    def note(self, short: str, *, handed: bool) -> str | None:
        """Say where the cut is not as deep as asked, or deeper by half a multiple; None where it is what was asked.

        ``short``: why there is no deeper one; ``handed``: whether units were handed over to experts.
        """
        if self.got < self.asked - 1e-9:
            return f"separation {self.got:.3f} of {self.asked:.3f}: {short}"
        if self._over:
            over = "units that are handed over widen every expert" if handed else "widths can be no narrower"
            return f"separation {self.got:.3f}, more than the {self.asked:.3f} asked: {over}"
        return None

    @property
    def judged(self) -> float:
        """What was asked, where the cut came so near, or else what it came to."""
        return self.got if self._over or self.asked - self.got >= self.slack else self.asked

    @property
    def _over(self) -> bool:
        return self.got >= self.asked + self.rounding / 2


def expected_tax(before: Standing, after: Standing, rounds: Sequence[RoundEnded]) -> float:
    """Return the mean tax in nats to expect after recovery; ``before`` and ``after`` are of the cut."""
    known = [(r.tax_before, r.tax_cut, r.tax) for r in rounds]
    left = _left([(b, c, e) for b, c, e in known if b is not None and c is not None])
    return before.tax + left * (after.tax - before.tax)


def expected_use(before: Standing, after: Standing, rounds: Sequence[RoundEnded]) -> float:
    """Return the part of the budget to expect to be used after recovery; ``before`` and ``after`` are of the cut."""
    assert before.used is not None
    assert after.used is not None
    known = [(r.budget_used_before, r.budget_used_cut, r.budget_used) for r in rounds]
    left = _left([(b, c, e) for b, c, e in known if b is not None and c is not None and e is not None])
    return before.used + left * (after.used - before.used)


def _left(known: Sequence[tuple[float, float, float]]) -> float:
    """Return what recovery has left of the rise at the cut, all rounds together; all of it where none is known.

    ``known``: a figure before the cut, right after it, and after recovery. Never negative: no gain is foreseen.
    """
    risen = sum(cut - before for before, cut, _ in known)
    return max(0.0, sum(end - before for before, _, end in known)) / risen if risen > 0.0 else 1.0


def budget_used(budget: Budget | None, taxes: Mapping[str, float], twin: Mapping[str, float]) -> float | None:
    """Return the part of the budget that a tax takes, 1 = all of it; below 0 where nothing is lost.

    ``taxes``: category -> nats above the dense twin, and their ``mean``; ``twin``: category -> the dense twin's nats.
    """
    if budget is None:
        return None
    match budget.per:
        case "mean":
            return taxes[MEAN] / budget.limit(fmean(twin.values()))
        case "category":
            return max(taxes[category] / budget.limit(loss) for category, loss in twin.items())
        case _:
            assert_never(budget.per)


def budget_error(
    budget: Budget | None, taxes: Mapping[str, float], twin: Mapping[str, float], errors: Mapping[str, float]
) -> float | None:
    """Return the standard error of ``budget_used``, of ``errors``: category -> that of its tax, where it is known."""
    if budget is None:
        return None
    match budget.per:
        case "mean":
            error, limit = mean_error(errors, twin), budget.limit(fmean(twin.values()))
        case "category":
            worst = max(twin, key=lambda category: taxes[category] / budget.limit(twin[category]))
            error, limit = errors.get(worst), budget.limit(twin[worst])
        case _:
            assert_never(budget.per)
    return None if error is None else error / limit


def check_step(budget: Budget, step: float, now: Standing) -> None:
    """Raise NoStepLeftError where no cut can be worth it: a step too small, or a budget that is used up before it."""
    if step < budget.least_step:
        raise NoStepLeftError(f"no step left: {step:.3f} of separation is below budget.least_step")
    if now.used is not None and now.used > 1.0:
        raise NoStepLeftError(f"no step left: the tax before the cut, {now.tax:.4f}, is beyond the budget already")


def deepest(cut: Callable[[float], Proposal], least: float, most: float, fits: Callable[[Proposal], bool]) -> Proposal:
    """Return the deepest cut that fits, from a separation of ``least`` to ``most``, which does not; to a sixty-fourth.

    Takes it that what fits at a separation fits below it. Raises NoStepLeftError where not even the smallest fits.
    """
    if not fits(found := cut(least)):
        got = found.partition.separation
        raise NoStepLeftError(f"no step left: even a separation of {got:.3f} is expected to cost more than the budget")
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
