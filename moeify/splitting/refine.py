"""Exchange units between experts for as long as that lowers J: what scores of single units cannot see.

Two units that make up for each other are cheap to part from one at a time and dear to part from together. Here every
unit's worth is what J itself says of it at the sets as they stand, exactly; the best exchanges are tried together, as
many as lower J, and the worth of all is measured anew. Widths stay what the budget made them.

Axes: L units that a leaf owns in a site, B bins (the K children, then the leaf itself).
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from attribution.removals import Removals
from attribution.table import AttributionTable
from moeify.splitting.partition import Partition

_SWEEPS = 16
"""How often the worth of all units is measured, at most."""


class Exchange:
    """One leaf in one site: J of any owners, and exchanges that lower it; none where second moments are sketched."""

    def __init__(
        self,
        partition: Partition,
        table: AttributionTable,
        weight_DU: Float64[Tensor, "dim units"],
        site: str,
        leaf: int,
        parts: Sequence[Sequence[str]],
    ) -> None:
        self._start = partition.starts(site)[leaf]
        self._parts = parts
        self._runs = [(bin_, category) for bin_, part in enumerate(parts) for category in part]
        self._share = {c: table.shares[table.categories.index(c)].item() for _, c in self._runs}
        self._removals = {
            category: Removals(
                table.second_moment(site, category),
                table.curvature(site, category),
                weight_DU.t(),
                partition.active(site, category),
            )
            for _, category in self._runs
        }

    def residual(self, owner_L: Int[np.ndarray, " leaf_units"]) -> float:
        """Return J of these owners, nats per unit (token or example) over all data."""
        return sum(
            self._share[category] * self._removals[category].residual(self._removed(owner_L, bin_, category))
            for bin_, category in self._runs
        )

    def settle(self, owner_L: Int[np.ndarray, " leaf_units"]) -> Int[np.ndarray, " leaf_units"]:
        """Return owners of the same widths with no more J, from which no exchange that was looked at lowers it."""
        if not all(removals.inverted for removals in self._removals.values()):
            return owner_L
        least = self.residual(owner_L)
        for _ in range(_SWEEPS):
            swaps = _swaps(self._costs(owner_L), owner_L)
            while swaps:
                tried_L = owner_L.copy()
                for one, other in swaps:
                    tried_L[[one, other]] = owner_L[[other, one]]
                if (now := self.residual(tried_L)) < least:
                    owner_L, least = tried_L, now
                    break
                swaps = swaps[: len(swaps) // 2]
            else:
                return owner_L
        return owner_L

    def _costs(self, owner_L: Int[np.ndarray, " leaf_units"]) -> Float64[np.ndarray, "leaf_units bins"]:
        """Return what J would lose or gain, in itself, by each unit in each bin; nats."""
        cost_LB = np.zeros((len(owner_L), len(self._parts) + 1))
        for home, category in self._runs:
            marginal_U = self._removals[category].marginals(self._removed(owner_L, home, category))
            worth_L = self._share[category] * marginal_U[self._start : self._start + len(owner_L)].numpy()
            for bin_ in range(len(self._parts)):
                if bin_ != home:
                    cost_LB[:, bin_] += worth_L
        return cost_LB

    def _removed(self, owner_L: Int[np.ndarray, " leaf_units"], home: int, category: str) -> Tensor:
        removed_U = torch.zeros(self._removals[category].units, dtype=torch.bool)
        gone_L = (owner_L != home) & (owner_L != len(self._parts))
        removed_U[self._start : self._start + len(owner_L)] = torch.from_numpy(gone_L)
        return removed_U


def _swaps(
    cost_LB: Float64[np.ndarray, "leaf_units bins"], owner_L: Int[np.ndarray, " leaf_units"]
) -> list[tuple[int, int]]:
    """Return pairs of units that would better change places, the most rewarding first, each unit once."""
    found: list[tuple[float, int, int]] = []
    for a, b in combinations(range(cost_LB.shape[1]), 2):
        ones, others = np.flatnonzero(owner_L == a), np.flatnonzero(owner_L == b)
        gain_M, gain_N = cost_LB[ones, a] - cost_LB[ones, b], cost_LB[others, b] - cost_LB[others, a]
        first, second = np.argsort(-gain_M, kind="stable"), np.argsort(-gain_N, kind="stable")
        for i, j in zip(first, second, strict=False):
            if (gain := gain_M[i] + gain_N[j]) <= 0.0:
                break
            found.append((float(gain), int(ones[i]), int(others[j])))
    taken: set[int] = set()
    pairs = []
    for _, one, other in sorted(found, key=lambda each: (-each[0], each[1], each[2])):
        if not {one, other} & taken:
            taken |= {one, other}
            pairs.append((one, other))
    return pairs
