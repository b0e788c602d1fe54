"""Who owns which unit: an expert tree and, for each site, the units that each expert owns.

Units lie in tree order, so widths say everything: owners, routes, live edges and active fractions are derived
from them and can never disagree.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attribution.sites import Site
from moeify.splitting.tree import ExpertTree, Node

Costs = Mapping[str, int]
"""Site -> what one of its units costs; where there are none, every unit costs 1."""


@dataclass(frozen=True)
class Partition:
    """An expert tree over the units of a network, which stand in the tree's depth-first order."""

    tree: ExpertTree
    widths: Mapping[str, tuple[int, ...]]
    """Site -> units that each node owns itself, nodes in the tree's order."""

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("a partition needs at least one site")
        for site, widths in self.widths.items():
            if len(widths) != len(self.tree.nodes) or min(widths) < 0:
                raise ValueError(
                    f"site {site!r} needs one width >= 0 for each of {len(self.tree.nodes)} experts, got {widths}"
                )
            for category, fraction in self._fractions(site).items():
                if fraction == 0.0:
                    raise ValueError(f"category {category!r} has no unit on its route in site {site!r}")

    @classmethod
    def undivided(cls, categories: Sequence[str], sites: Sequence[Site]) -> "Partition":
        """Return the partition of a dense model: the root owns every unit."""
        return cls(ExpertTree.undivided(categories), {site.name: (site.units,) for site in sites})

    def units(self, site: str) -> int:
        """Return the number of units of a site."""
        return sum(self.widths[site])

    def starts(self, site: str) -> tuple[int, ...]:
        """Return where each node's own units start."""
        return tuple(itertools.accumulate(self.widths[site], initial=0))[:-1]

    def owners(self, site: str) -> Int[Tensor, " units"]:
        """Return the owning node of each unit."""
        return torch.repeat_interleave(torch.arange(len(self.tree.nodes)), torch.tensor(self.widths[site]))

    def active(self, site: str, category: str) -> Bool[Tensor, " units"]:
        """Say which units lie on a category's route."""
        return torch.isin(self.owners(site), torch.tensor(self.tree.route(category)))

    def live(self, site: str, other: str) -> Bool[Tensor, "units other_units"]:
        """Say which edges between the units of two sites live: those between related owners."""
        nodes = range(len(self.tree.nodes))
        related = torch.tensor([[self.tree.related(a, b) for b in nodes] for a in nodes])
        return related[self.owners(site)][:, self.owners(other)]

    def active_units(self, category: str, costs: Costs | None = None) -> int:
        """Return how many units of all sites lie on a category's route, or what they cost."""
        route = self.tree.route(category)
        return sum(sum(widths[node] for node in route) * _cost(costs, site) for site, widths in self.widths.items())

    def surplus(self, separation: float, costs: Costs | None = None) -> int:
        """Return how many active units, added up over categories, are too many for a separation; below 0: too few.

        With ``costs``: how much they cost, for a separation of what units cost.
        """
        categories = self.tree.categories
        total = len(categories) * self._total(costs)
        active = sum(self.active_units(category, costs) for category in categories)
        rounding = 1e-9 * max(_cost(costs, site) for site in self.widths)
        return math.ceil(active - (1.0 - separation) * total - rounding)

    def active_shares(self, costs: Costs | None = None) -> dict[str, float]:
        """Return category -> fraction of all units, or of what they cost, on its route."""
        total = self._total(costs)
        return {category: self.active_units(category, costs) / total for category in self.tree.categories}

    def separation_of(self, costs: Costs | None = None) -> float:
        """Return 1 - the mean over categories of the active fraction of all units, or of what they cost."""
        fractions = self.active_shares(costs).values()
        return 1.0 - sum(fractions) / len(fractions)

    @property
    def active_fraction(self) -> dict[str, float]:
        """Category -> fraction of all units on its route."""
        return self.active_shares()

    @property
    def separation(self) -> float:
        """1 - the mean over categories of the active fraction."""
        return self.separation_of()

    @property
    def owned(self) -> tuple[int, ...]:
        """Units of all sites that each node owns itself."""
        return tuple(sum(column) for column in zip(*self.widths.values(), strict=True))

    def nested(self) -> dict[str, Any]:
        """Return the tree as nested plain data, with the units that each expert owns."""
        return self.tree.nested(self.owned)

    def as_json(self) -> dict[str, Any]:
        """Return plain data that ``from_json`` takes back, with the owners spelled out for other readers."""
        return {
            "nodes": [{"name": n.name, "parent": n.parent, "categories": list(n.categories)} for n in self.tree.nodes],
            "widths": {site: list(widths) for site, widths in self.widths.items()},
            "owners": {site: self.owners(site).tolist() for site in self.widths},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Partition":
        """Return the partition that ``as_json`` described; ValueError where it does not hold together."""
        nodes = tuple(Node(n["name"], n["parent"], tuple(n["categories"])) for n in data["nodes"])
        if odd := [name for node in nodes for name in (node.name, *node.categories) if not isinstance(name, str)]:
            raise ValueError(f"experts and categories have names of text, got {odd[0]!r}")
        return cls(ExpertTree(nodes), {site: tuple(widths) for site, widths in data["widths"].items()})

    def _total(self, costs: Costs | None) -> int:
        return sum(sum(widths) * _cost(costs, site) for site, widths in self.widths.items())

    def _fractions(self, site: str) -> dict[str, float]:
        widths = self.widths[site]
        return {c: sum(widths[i] for i in self.tree.route(c)) / max(1, sum(widths)) for c in self.tree.categories}


def _cost(costs: Costs | None, site: str) -> int:
    return 1 if costs is None else costs[site]
