"""Owners learned by gradient: the assignment itself, relaxed to a transport plan, goes down the loss.

Bamba et al., "DOT-MoE", 2026 (arXiv 2606.01666) learn through differentiable optimal transport which unit goes to which
expert, by straight-through gradients and together with a router. Here routes are the categories', so there is no router
to learn, and the soft plan is run itself: entropic mirror descent (Beck and Teboulle 2003) on the plans that give each
unit away once and fill each bin, whose projection is Sinkhorn and Knopp's scaling. Gradients add up in the plan's
logits, which harden it as they grow. It starts from the owners of a proposal, keeps their widths, and ends in an exact
assignment of the logits. Weights stay as they are.

Axes: C categories, U units of a site, L units that a leaf owns in it, B bins (the K children, then the leaf itself).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int
from scipy.special import logsumexp
from torch import Tensor

from moeify.recipe.partition import LearnedOwners
from moeify.splitting.assignment import assign
from moeify.splitting.grouping import Groups
from moeify.splitting.partition import Partition
from moeify.splitting.propose import Owned

Keeps = Mapping[str, Float64[Tensor, "categories units"]]
"""Site -> the factor of each unit's activation in a category's rows: 1 on its route, 0 off it, or between."""
Slopes = Callable[[Keeps], Keeps]
"""Returns the gradient of the loss of some rows with respect to the factors."""

_START = 1.0
"""Logit of the bin where a unit starts, above all others'."""
_SINKHORN = 20
"""Iterations of Sinkhorn and Knopp's."""


def learned(
    partition: Partition,
    owned: Owned,
    groups: Groups,
    categories: Sequence[str],
    asked: LearnedOwners,
    passes: Iterable[Slopes],
) -> Owned:
    """Return owners of the same widths that a step of descent for each of ``passes`` has led to.

    ``owned`` are the owners to start from, of every site and leaf of ``groups`` that is divided in ``partition``.
    """
    plans = {
        (site, leaf): _Plan(owner_L, groups[leaf], categories, partition.starts(site)[leaf])
        for (site, leaf), owner_L in owned.items()
    }
    if all(plan.settled_already for plan in plans.values()):
        return owned
    for slopes in passes:
        keeps = {site: torch.ones(len(categories), partition.units(site), dtype=torch.float64) for site, _ in plans}
        for (site, _), plan in plans.items():
            plan.write(keeps[site])
        found = slopes(keeps)
        for (site, _), plan in plans.items():
            plan.descend(found[site], asked.learning_rate)
    return {key: plan.owners() for key, plan in plans.items()}


class _Plan:
    """How much of each of a leaf's units is in each bin."""

    def __init__(
        self,
        owner_L: Int[np.ndarray, " leaf_units"],
        parts: Sequence[Sequence[str]],
        categories: Sequence[str],
        start: int,
    ) -> None:
        self._room_B = np.bincount(owner_L, minlength=len(parts) + 1)
        self._rows = [[categories.index(category) for category in part] for part in parts]
        self._units = slice(start, start + len(owner_L))
        self._logit_LB = _START * (owner_L[:, None] == np.arange(len(self._room_B))).astype(np.float64)
        self._squares, self._steps = 0.0, 0

    @property
    def settled_already(self) -> bool:
        """Whether there is but one bin to be in."""
        return int((self._room_B > 0).sum()) < 2

    def shares(self) -> Float64[np.ndarray, "leaf_units bins"]:
        """Return the plan: each unit's shares add up to 1, and each bin's to its room, up to the last iteration."""
        log_LB = np.where(self._room_B > 0, self._logit_LB, -np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            for _ in range(_SINKHORN):
                log_LB = log_LB - logsumexp(log_LB, axis=1, keepdims=True)
                filled_B = logsumexp(log_LB, axis=0)
                log_LB = log_LB + np.where(self._room_B > 0, np.log(self._room_B) - filled_B, 0.0)
        return np.exp(log_LB - logsumexp(log_LB, axis=1, keepdims=True))

    def write(self, keep_CU: Float64[Tensor, "categories units"]) -> None:
        """Put down how much of each unit a category's rows run: what is in its own bin, and in the leaf's."""
        share_BL = torch.from_numpy(self.shares()).t()
        for bin_, rows in enumerate(self._rows):
            keep_CU[rows, self._units] = share_BL[bin_] + share_BL[-1]

    def descend(self, slope_CU: Float64[Tensor, "categories units"], rate: float) -> None:
        """Take a step against the slopes, ``rate`` logits long for a slope of the size that slopes have had so far."""
        slope_CL = slope_CU[:, self._units].numpy()
        part_BL = [slope_CL[rows].sum(0) for rows in self._rows]
        slope_LB = np.stack([*part_BL, np.sum(part_BL, axis=0)], 1)
        level_LB = slope_LB - slope_LB.mean(1, keepdims=True)  # what all of a unit's bins share moves nothing
        self._squares, self._steps = self._squares + float(np.square(level_LB).mean()), self._steps + 1
        if self._squares > 0:
            self._logit_LB -= rate / (self._squares / self._steps) ** 0.5 * level_LB

    def owners(self) -> Int[np.ndarray, " leaf_units"]:
        """Return the owners of the greatest logits that there is room for."""
        return assign(self._logit_LB, self._room_B).owner
