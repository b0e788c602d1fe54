"""Owners learned by gradient: the assignment itself, relaxed to a transport plan, goes down the loss.

Bamba et al., "DOT-MoE", 2026 (arXiv 2606.01666) learn through differentiable optimal transport which unit goes to which
expert, by straight-through gradients and together with a router. Here routes are the categories', so there is no router
to learn, and it is the soft plan that is run, so that what is run is what is differentiated. It starts from the owners
of a proposal, keeps their widths, and ends in an exact assignment. Weights stay as they are.

Axes: C categories, U units of a site, L units that a leaf owns in it, B bins (the K children, then the leaf itself).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int
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
    """Return owners of the same widths that a step of gradient descent for each of ``passes`` has led to.

    ``owned`` are the owners to start from, of every site and leaf of ``groups`` that is divided in ``partition``.
    """
    plans = {key: _Plan(owner_L, len(groups[key[1]]) + 1) for key, owner_L in owned.items()}
    open_plans = [plan for plan in plans.values() if plan.logit_LB.shape[1] > 1]
    if not open_plans:
        return owned
    optimizer = torch.optim.Adam([plan.logit_LB for plan in open_plans], lr=asked.learning_rate, betas=(0.9, 0.99))
    for slopes in passes:
        keeps = _keeps(partition, plans, groups, categories)
        found = slopes({site: keep_CU.detach() for site, keep_CU in keeps.items()})
        optimizer.zero_grad()
        torch.autograd.backward(list(keeps.values()), [found[site] for site in keeps])
        optimizer.step()
    return {key: plan.settled() for key, plan in plans.items()}


class _Plan:
    """How much of each of a leaf's units is in each bin that has room."""

    def __init__(self, owner_L: Int[np.ndarray, " leaf_units"], bins: int) -> None:
        room_B = np.bincount(owner_L, minlength=bins)
        self._bins, self._open = bins, torch.from_numpy(np.flatnonzero(room_B))
        self._room_B = room_B[self._open.numpy()]
        own_LB = torch.from_numpy(owner_L)[:, None] == self._open
        self.logit_LB = (_START * own_LB.double()).requires_grad_()

    def shares(self) -> Float64[Tensor, "leaf_units bins"]:
        """Return the plan: each unit's shares add up to 1, and each bin's to its room, up to the last iteration."""
        log_LB: Tensor = self.logit_LB
        room_B = torch.from_numpy(self._room_B).double().log()
        for _ in range(_SINKHORN):
            log_LB = log_LB - log_LB.logsumexp(1, keepdim=True)
            log_LB = log_LB - log_LB.logsumexp(0, keepdim=True) + room_B
        plan_LB = log_LB.softmax(1)
        return plan_LB.new_zeros(len(plan_LB), self._bins).index_copy(1, self._open, plan_LB)

    def settled(self) -> Int[np.ndarray, " leaf_units"]:
        """Return the owners of the greatest logits that there is room for."""
        return self._open.numpy()[assign(self.logit_LB.detach().numpy(), self._room_B).owner]


def _keeps(
    partition: Partition,
    plans: Mapping[tuple[str, int], _Plan],
    groups: Groups,
    categories: Sequence[str],
) -> dict[str, Float64[Tensor, "categories units"]]:
    """Return how much of each unit a category's rows run; what is not being divided stays with all of them."""
    found: dict[str, Tensor] = {}
    for (site, leaf), plan in plans.items():
        whole_CU = torch.ones(len(categories), partition.units(site), dtype=torch.float64)
        keep_CU = found.get(site, whole_CU)
        plan_LB, start = plan.shares(), partition.starts(site)[leaf]
        places = torch.arange(start, start + len(plan_LB))
        for bin_, part in enumerate(groups[leaf]):
            share_L = plan_LB[:, bin_] + plan_LB[:, -1]
            rows = torch.tensor([categories.index(category) for category in part])
            keep_CU = keep_CU.index_put((rows[:, None], places), share_L.expand(len(part), -1))
        found[site] = keep_CU
    return found
