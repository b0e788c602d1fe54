"""J of trial splits of one leaf: any groups of its categories, all at the same active budget.

Every trial divides a leaf's units anew by exact assignment, equally wide experts in every site in proportion to its
units, so that each saves as many active units as the next; what differs is who shares an expert.

Axes: U units of a site, L units that the leaf owns in it, C its categories, B bins (the K children, then the leaf).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.moments import SketchedMoment
from attribution.removals import Removals
from attribution.table import AttributionTable, Unsigned
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.splitting.assignment import assign
from moeify.splitting.partition import Partition
from moeify.splitting.terms import Terms, costs, plain_terms

_ELEMENTS = 2**28
"""Numbers that the inverted moments of all trials may hold: 2 GB of float64."""


class Trials:
    """One inversion a site and category to make; then a trial is an assignment a site, and a solve a site and category.

    ``cut``: the fraction 0..1 of the leaf's units that a trial saves each category on average; ``terms``: not given,
    those of ``config`` for every site. Where the inverted moments of all sites would take more than 2 GB, as many
    sites as fit are taken, evenly spaced.
    """

    def __init__(
        self,
        partition: Partition,
        table: AttributionTable,
        weights: Mapping[str, Float[Tensor, "dim _"]],
        config: PartitionConfig,
        score: Unsigned,
        leaf: int,
        cut: float,
        terms: Terms | None = None,
    ) -> None:
        terms = terms or plain_terms(config, partition.widths)
        self._categories = partition.tree.nodes[leaf].categories
        self._cut = cut
        index = [table.categories.index(category) for category in self._categories]
        self._share_C = table.shares[index].tolist()
        self._sites: list[tuple[int, int, Float[np.ndarray, "leaf_units categories"], list[Removals]]] = []
        for site in _affordable(partition, table, leaf, terms):
            start, own = partition.starts(site)[leaf], partition.widths[site][leaf]
            mass_LC = (table.score(site, score) * table.shares)[start : start + own, index].numpy()
            removals = [
                Removals(
                    table.second_moment(site, category),
                    table.curvature(site, category),
                    weights[site].t().double(),
                    partition.active(site, category),
                )
                for category in self._categories
            ]
            self._sites.append((start, most_given(partition, terms, site, leaf), mass_LC, removals))
        self._known: dict[tuple[tuple[int, ...], ...], float] = {}

    def cost(self, parts: Sequence[Sequence[str]]) -> float:
        """Return J of giving each group an expert, nats per unit (token or example) over all data.

        Categories of the leaf that are in no group, the unrouted ones, keep to the units that the leaf keeps.
        """
        members = tuple(sorted(tuple(sorted(self._categories.index(c) for c in part)) for part in parts))
        if members not in self._known:
            self._known[members] = self._cost(members)
        return self._known[members]

    def _cost(self, parts: Sequence[Sequence[int]]) -> float:
        home_C = {category: bin_ for bin_, part in enumerate(parts) for category in part}
        children, number = len(parts), len(self._categories)
        saved = (children - 1) * len(home_C) + children * (number - len(home_C))
        total = 0.0
        for start, give, mass_LC, removals in self._sites:
            own = len(mass_LC)
            width = min(give // children, max(1, round(self._cut * own * number / saved))) if saved else 0
            value_LB = np.stack([*(mass_LC[:, list(part)].sum(1) for part in parts), mass_LC.sum(1)], axis=1)
            owner_L = torch.from_numpy(assign(value_LB, np.array([*[width] * children, own - children * width])).owner)
            for category, each in enumerate(removals):
                removed_U = torch.zeros(each.units, dtype=torch.bool)
                removed_U[start : start + own] = (owner_L != home_C.get(category, children)) & (owner_L != children)
                total += self._share_C[category] * each.residual(removed_U)
        return total


def most_given(partition: Partition, terms: Terms, site: str, leaf: int) -> int:
    """Return how many of its units of a site a leaf may give to children."""
    return terms[site].given(partition.widths[site][leaf], root=leaf == 0)


def even_cut(partition: Partition, leaves: Sequence[int], separation: float, terms: Terms) -> float:
    """Return the fraction of their units that leaves give up on average, the same in all of them, for a separation.

    Sites that are never split give nothing.
    """
    categories = {leaf: len(partition.tree.nodes[leaf].categories) for leaf in leaves}
    room = sum(
        categories[leaf] * widths[leaf] * terms[site].cost
        for site, widths in partition.widths.items()
        for leaf in leaves
        if not terms[site].frozen
    )
    return min(1.0, max(0, partition.surplus(separation, costs(terms))) / max(1, room))


def _affordable(partition: Partition, table: AttributionTable, leaf: int, terms: Terms) -> list[str]:
    """Return the sites to split whose inverted moments fit, evenly spaced; sketched moments need no inverse."""
    sites = [site for site in partition.widths if not terms[site].frozen]
    number = len(partition.tree.nodes[leaf].categories)
    sums = [table.sites[site] for site in sites]
    sizes = [0 if isinstance(each.inputs, SketchedMoment) else number * len(each.power) ** 2 for each in sums]
    step = 1
    while step < len(sites) and sum(sizes[::step]) > _ELEMENTS:
        step += 1
    return sites[::step]
