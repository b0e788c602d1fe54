"""Gradient routing: from the recipe, the partition and a batch's labels to what runs and learns.

Sources: Cloud et al., "Gradient Routing", 2024 (arXiv 2410.04332), where masks depend on the example; SGTM, 2025 (arXiv
2512.05648), where the gradients of parameters, not of activations, are masked.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attribution.sites import Site
from moeify.recipe.routing import GivenExpert, Routing
from moeify.routed.learning import ALL, Experts, Factors, Learning, Treatment
from moeify.splitting.owners import Given
from moeify.splitting.partition import Partition

_FULL = Treatment(True, ALL)


class GradientRouter:
    """What a recipe's gradient routing means for one network.

    Raises ValueError where the given experts do not fit the network's sites.
    """

    def __init__(self, routing: Routing, categories: Sequence[str], sites: Sequence[Site], seed: int) -> None:
        self.routing = routing
        self._categories = tuple(categories)
        self._seed = seed
        _check_patterns(routing.experts, [site.name for site in sites])
        self._given = {site.name: _widths(routing.experts, site) for site in sites} if routing.experts else {}

    def labelled(self, categories: Int[Tensor, " rows"], examples: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """Say whose label is known: the same examples of a category each time, for the same seed."""
        if self.routing.labelled == 1.0:
            return torch.ones_like(categories, dtype=torch.bool)
        mixed = _mixed(np.full(len(categories), self._seed, np.uint64))
        for key in (categories, examples):
            mixed = _mixed(mixed ^ key.cpu().numpy().astype(np.uint64))
        return torch.from_numpy(mixed < np.uint64(self.routing.labelled * 2**64)).to(categories.device)

    def learning(
        self, partition: Partition, categories: Int[Tensor, " rows"], labelled: Bool[Tensor, " rows"]
    ) -> Learning | None:
        """Return what runs and learns in a batch; None where no gradient is routed.

        Rows of a category, and of those the labelled ones, lie side by side; the order of categories is free.
        """
        cut = _is_cut(partition)
        widths, below = self._experts(partition)
        if not below:
            return None
        own = _with_units(widths, below)
        kinds, counts = torch.unique_consecutive(categories * 2 + labelled, return_counts=True)
        segments = [(self._categories[kind // 2], bool(kind % 2)) for kind in kinds.tolist()]
        routed = {category for categories in below for category in categories}
        off = {category: self._off_route(category, cut=cut) for category in routed}
        frozen = own if self.routing.core == "frozen" else own.intersection(self.routing.apart)
        core = [
            off[category]._replace(runs=True) if known and category in frozen else _FULL for category, known in segments
        ]
        experts = [
            [
                off[category] if known and category in routed and category not in serves else _FULL
                for category, known in segments
            ]
            for serves in below
        ]
        sites = {site: Experts(_slices(each), [core, *experts]) for site, each in widths.items()}
        return Learning((0, *counts.cumsum(0).tolist()), sites)

    def apart(
        self, partition: Partition, categories: Int[Tensor, " rows"], labelled: Bool[Tensor, " rows"]
    ) -> Bool[Tensor, " rows"]:
        """Say from which rows nothing is to learn but units, and of these (``learning``) their own experts' alone."""
        own = _with_units(*self._experts(partition)) if self.routing.apart else set[str]()
        kinds = [category in self.routing.apart and category in own for category in self._categories]
        return torch.tensor(kinds, device=categories.device)[categories] & labelled

    def handed_over(self, partition: Partition) -> dict[str, list[Given]]:
        """Return the units of each site that a first cut may hand over to the categories they were given to."""
        if _is_cut(partition):
            return {}
        asked = [expert.categories for expert in self.routing.experts]
        return {
            site: [Given(*each) for each in zip(_slices(widths)[1:], asked, strict=True)]
            for site, widths in self._given.items()
        }

    def _experts(self, partition: Partition) -> tuple[Mapping[str, tuple[int, ...]], list[tuple[str, ...]]]:
        """Return each site's units of the core and of each expert, and the categories that each expert serves."""
        if _is_cut(partition):
            return partition.widths, [node.categories for node in partition.tree.nodes[1:]]
        return self._given, [expert.categories for expert in self.routing.experts]

    def _off_route(self, category: str, *, cut: bool) -> Treatment:
        """Return how the category's labelled rows use units off their route."""
        kept = 1.0 - self.routing.strength.get(category, 1.0)
        match self.routing.gradients:
            case "none":
                factors = ALL
            case "parameters":
                factors = Factors(1.0, kept, kept)
            case "activations":
                factors = Factors(kept, 1.0, 1.0)
            case "both":
                factors = Factors(kept, 1.0, kept)
        return Treatment(not self.routing.is_hard(category, cut=cut), factors)


def _is_cut(partition: Partition) -> bool:
    return len(partition.tree.nodes) > 1


def _with_units(widths: Mapping[str, Sequence[int]], below: Sequence[Sequence[str]]) -> set[str]:
    """Return the categories whose experts have units of their own."""
    owned = [sum(column) for column in zip(*widths.values(), strict=True)][1:]
    return {category for categories, units in zip(below, owned, strict=True) if units for category in categories}


def _check_patterns(experts: Sequence[GivenExpert], sites: Sequence[str]) -> None:
    for place, expert in enumerate(experts):
        named = [("sites", pattern) for pattern in expert.sites] + [("expand", pattern) for pattern in expert.expand]
        for key, pattern in named:
            if not any(fnmatchcase(site, pattern) for site in sites):
                raise ValueError(
                    f"routing.experts.{place}.{key}: got {pattern!r}, which matches none of {len(sites)} sites, wanted "
                    f"names or patterns such as {sites[0]!r}"
                )


def _widths(experts: Sequence[GivenExpert], site: Site) -> tuple[int, ...]:
    """Return the units of the core and of each given expert."""
    shares = [expert.share(site.name) for expert in experts]
    added = list(accumulate((expert.added(site.name) for expert in experts), initial=0))
    shared = accumulate(shares, initial=0.0)
    ends = [round(total * (site.units - added[-1])) + more for total, more in zip(shared, added, strict=True)]
    widths = [site.units - ends[-1], *(high - low for low, high in pairwise(ends))]
    if widths[0] < 0:
        raise ValueError(
            f"routing.experts: got {ends[-1]} of the {site.units} units of site {site.name!r}, wanted at most all"
        )
    for place, (share, width) in enumerate(zip(shares, widths[1:], strict=True)):
        if share and not width:
            raise ValueError(
                f"routing.experts.{place}: got {share:g} of the {site.units} units of site {site.name!r}, which is "
                f"none; raise it, or give 0"
            )
    for place, width in enumerate(widths[1:]):
        if widths[0] + width == 0:
            raise ValueError(
                f"routing.experts.{place}: got no unit of site {site.name!r}, where there is no core, so that its "
                f"categories would have none; give it units there, or leave some to the core"
            )
    return tuple(widths)


def _slices(widths: Sequence[int]) -> list[slice]:
    return [slice(*ends) for ends in pairwise(accumulate(widths, initial=0))]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return 64 bits that look random, the same for the same number (SplitMix64: Steele et al. 2014)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)  # arrays of unsigned numbers wrap around
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
