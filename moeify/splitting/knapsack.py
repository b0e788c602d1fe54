"""The cheapest way to save so much in all, one choice from each of several curves.

A multiple-choice knapsack, solved exactly by dynamic programming over the total saving.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_LARGEST_TABLE = 1_000_000_000
"""Curves times distinct total savings: 2 GB of choices."""


@dataclass(frozen=True)
class Curve:
    """The choices of one thing."""

    savings: tuple[int, ...]
    """What each choice saves; rising, from 0."""
    costs: tuple[float, ...]
    """What each choice costs."""

    def __post_init__(self) -> None:
        if not self.savings or len(self.savings) != len(self.costs):
            raise ValueError(
                f"a curve needs one cost for each saving, at least one, "
                f"got {len(self.savings)} savings and {len(self.costs)} costs"
            )
        if self.savings[0] != 0 or any(b <= a for a, b in pairwise(self.savings)):
            raise ValueError(f"a curve's savings must rise from 0, got {_short(self.savings)}")
        if not all(math.isfinite(cost) for cost in self.costs):
            raise ValueError(f"a curve's costs must be finite, got {_short(self.costs)}")
        if len(self.savings) > 2**16:
            raise ValueError(f"a curve has at most {2**16} choices, got {len(self.savings)}; take a coarser grid")


def cheapest(curves: Sequence[Curve], saving: int) -> list[int]:
    """Return the index of each curve's choice so that at least ``saving`` is saved in all at the least total cost.

    Of equally cheap ways the one that saves least; then, from the last curve to the first, the one that saves least
    there. Costs are added up in the order of the curves. Raises ValueError, with the most that can be saved, if
    ``saving`` is out of reach.
    """
    most = sum(curve.savings[-1] for curve in curves)
    if saving > most:
        raise ValueError(
            f"cannot save {saving}: all {len(curves)} curves together save at most {most}; "
            f"ask for less or let the curves reach further"
        )
    step = math.gcd(*(s for curve in curves for s in curve.savings)) or 1
    width = most // step + 1
    if width * len(curves) > _LARGEST_TABLE:
        raise ValueError(
            f"{len(curves)} curves that save {most} in steps of {step} make a table of {width * len(curves):.2g} "
            f"entries; round the savings to a larger common multiple"
        )
    # least_S[s]: the least cost of saving exactly s steps with the curves so far.
    least_S = np.full(width, np.inf)
    least_S[0] = 0.0
    choices = np.zeros((len(curves), width), dtype=np.uint16)
    reach = 0
    for curve, choice_S in zip(curves, choices, strict=True):
        before_S = least_S[: reach + 1]
        least_S = np.full(width, np.inf)
        for index, (saved, cost) in enumerate(zip(curve.savings, curve.costs, strict=True)):
            here = slice(saved // step, saved // step + reach + 1)
            total_S = before_S + cost
            better_S = total_S < least_S[here]
            least_S[here][better_S] = total_S[better_S]
            choice_S[here][better_S] = index
        reach += curve.savings[-1] // step
    wanted = max(0, -(-saving // step))
    at = wanted + int(least_S[wanted:].argmin())
    picks = []
    for curve, choice_S in zip(reversed(curves), choices[::-1], strict=True):
        picks.append(int(choice_S[at]))
        at -= curve.savings[picks[-1]] // step
    return picks[::-1]


def _short(values: Sequence[float]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
