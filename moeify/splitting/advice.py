"""Which categories to divide and which to keep together, foreseen of a network that is not cut yet.

All from one table of the undivided network. Nodes of the tree to come are divided as the loop would divide them, by J
(``moeify.splitting.grouping``), each as if its categories had the network to themselves, and always at the same active
budget. Whether a node is worth dividing is asked of its own categories alone: their labels are permuted among them,
and either table, the true one too, groups them by affinity, since grouping by J takes hundreds of trials.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from attribution.affinity import profile_affinity, profile_interval
from attribution.sites import Site
from attribution.table import AttributionTable
from moeify.recipe.config import RunConfig
from moeify.recipe.given_tree import Nested
from moeify.recipe.partition import AffinityGrouping, ResidualGrouping
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.rows import generator
from moeify.splitting.grouping import choose_groups
from moeify.splitting.null_test import Measure, Verdict, permuted
from moeify.splitting.partition import Partition
from moeify.splitting.terms import Terms, costs, plain_terms
from moeify.splitting.trials import Trials, even_cut, most_given

Matrix = Float64[Tensor, "categories categories"]
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Merge:
    """What it costs that a node of the tree is not divided: on the way from every category alone to the root's groups,
    the deepest nodes first, the groups below it become one."""

    joined: Groups
    """Those groups."""
    groups: int
    """How many are left."""
    predicted: float
    """J of a split into all that are left; nats per unit (token or example) over all data."""
    cost: float
    """By how much that is above J before the merge, at the same active budget; below 0: together they lose less."""


@dataclass(frozen=True)
class Division:
    """A node of the tree, and what speaks for dividing it."""

    categories: tuple[str, ...]
    groups: Groups
    """What it would be divided into."""
    round: int
    """Which round's cut that is, from 1."""
    predicted: float
    """J of the division, nats per unit over all data: what these categories lose."""
    verdict: Verdict | None
    """Of a split of the node, grouped by affinity, against those by permuted labels; None where that was not asked."""
    level: float
    """Largest p-value of a node that is worth dividing."""

    @property
    def worth(self) -> bool:
        """Whether its categories' labels mean something to the units."""
        return self.verdict is None or self.verdict.p <= self.level


@dataclass(frozen=True)
class Advice:
    """What is recommended, and from what."""

    categories: tuple[str, ...]
    """Those that get experts."""
    separation: float
    """Share of units that is off in every division that was tried."""
    affinity: Matrix
    """Of the categories' attribution profiles, and the ends of its 95 % interval."""
    lower: Matrix
    upper: Matrix
    apart: float
    """J of a split that gives every category an expert of its own; nats per unit over all data."""
    merges: tuple[Merge, ...]
    divisions: tuple[Division, ...]
    """Of the tree's nodes, from the root on, level by level. Below one that is not worth dividing there are none."""

    @property
    def tree(self) -> Nested | None:
        """The recommended tree, as a recipe has it; None where the recipe needs none: nothing is worth dividing, or
        the root's groups are single categories."""
        parted = {each.categories: each.groups for each in self.divisions if each.worth}

        def nested(categories: tuple[str, ...]) -> "str | Nested":
            if len(categories) == 1:
                return categories[0]
            return tuple(nested(group) for group in parted[categories]) if categories in parted else categories

        groups = parted.get(self.divisions[0].categories, ())
        return tuple(nested(group) for group in groups) if any(len(group) > 1 for group in groups) else None

    @property
    def together(self) -> Groups:
        """The groups of categories that are not worth separating."""
        return tuple(each.categories for each in self.divisions if not each.worth)

    @property
    def rounds(self) -> int:
        """How many rounds the recommended tree takes."""
        return max((each.round for each in self.divisions if each.worth), default=0)


def advise(
    sites: Sequence[Site],
    weights: Mapping[str, Float[Tensor, "dim _"]],
    config: RunConfig,
    measure: Measure,
    *,
    separation: float,
    permutations: int,
    level: float = 0.05,
    terms: Terms | None = None,
    said: Callable[[str], None] = lambda _: None,
) -> Advice:
    """Recommend a tree for an undivided network whose units are those of ``sites``; nothing is trained.

    ``weights`` holds each site's output weights. ``config``: its rounds say into how many groups each level divides
    (beyond them the last one does), its ``partition`` what groups and sites may be; a ``tree`` it has does not count.
    ``measure`` is called once with the true labels and ``permutations`` times a level of the tree with permuted ones;
    0: no null test, and everything is divided. ``said`` hears what is under way. ValueError for a separation out of
    reach.
    """
    terms = terms or plain_terms(config.partition, [site.name for site in sites])
    asked = _Asked(sites, weights, config, separation, terms)
    said("measuring")
    table = measure(iter)
    categories = tuple(c for c in table.categories if c not in config.partition.unrouted)
    if len(categories) < 2:
        raise ValueError(f"got one category to divide, {categories[0]!r}, wanted two or more")
    _check_separation(Partition.undivided(categories, sites), separation, config.rounds[0].branching, terms)
    nodes, divisions, number = [categories], list[Division](), 0
    while nodes:
        number += 1
        said(f"level {number}: trying groups")
        groups = [asked.groups(table, node, number, asked.by_residual) for node in nodes]
        if permutations:
            said(f"level {number}: measuring with permuted labels, {permutations} times")
        verdicts = asked.verdicts(table, nodes, number, measure, permutations)
        new = [
            Division(node, parts, number, asked.trials(table, node).cost(parts), verdict, level)
            for node, parts, verdict in zip(nodes, groups, verdicts, strict=True)
        ]
        divisions += new
        nodes = [g for g in chain.from_iterable(each.groups for each in new if each.worth) if len(g) > 1]
    score = config.attribution.score
    affinity, (lower, upper) = profile_affinity(table, score), profile_interval(table, score, seed=config.seed)
    rows = torch.tensor([table.categories.index(category) for category in categories])
    affinity, lower, upper = (each[rows][:, rows] for each in (affinity, lower, upper))
    trials = asked.trials(table, categories)
    apart = trials.cost([[category] for category in categories])
    merges = _merges(divisions, trials, apart)
    return Advice(categories, separation, affinity, lower, upper, apart, merges, tuple(divisions))


@dataclass(frozen=True)
class _Asked:
    """An undivided network, and how its categories may part."""

    sites: Sequence[Site]
    weights: Mapping[str, Float[Tensor, "dim _"]]
    config: RunConfig
    separation: float
    terms: Terms

    @property
    def by_residual(self) -> PartitionConfig:
        """The recipe's partition, categories grouped by J."""
        balanced = self.config.partition.grouping.balanced
        return self._grouped(ResidualGrouping(kind="residual", balanced=balanced))

    @property
    def by_affinity(self) -> PartitionConfig:
        """The recipe's partition, categories grouped by affinity."""
        balanced = self.config.partition.grouping.balanced
        return self._grouped(AffinityGrouping(kind="affinity", balanced=balanced))

    def _grouped(self, grouping: AffinityGrouping | ResidualGrouping) -> PartitionConfig:
        return self.config.partition.model_copy(update={"grouping": grouping, "unrouted": ()})

    def groups(self, table: AttributionTable, node: tuple[str, ...], number: int, by: PartitionConfig) -> Groups:
        """Return the groups that a node's categories part into in the round of this number."""
        branching = self.config.rounds[min(number, len(self.config.rounds)) - 1].branching
        round_ = Round(train=0, recover=0, branching=branching, separation=self.separation)
        whole, score = Partition.undivided(node, self.sites), self.config.attribution.score
        return tuple(choose_groups(whole, table, self.weights, by, round_, score, terms=self.terms)[0])

    def trials(self, table: AttributionTable, node: tuple[str, ...]) -> Trials:
        """Return trial splits of a node whose categories have the network to themselves."""
        whole, score = Partition.undivided(node, self.sites), self.config.attribution.score
        cut = even_cut(whole, [0], self.separation, self.terms)
        return Trials(whole, table, self.weights, self.by_residual, score, 0, cut, self.terms)

    def verdicts(
        self,
        table: AttributionTable,
        nodes: Sequence[tuple[str, ...]],
        number: int,
        measure: Measure,
        permutations: int,
    ) -> list[Verdict | None]:
        """Hold a split of each node against splits by labels that are permuted within it; None without permutations."""

        def costs_of(found: AttributionTable) -> list[float]:
            parted = [(node, self.groups(found, node, number, self.by_affinity)) for node in nodes]
            return [self.trials(found, node).cost(groups) for node, groups in parted]

        if not permutations:
            return [None] * len(nodes)
        members, nulls = [[table.categories.index(category) for category in node] for node in nodes], []
        for i in range(permutations):
            random = generator(self.config.seed, "permute", number, i)
            nulls.append(costs_of(measure(partial(permuted, groups=members, random=random))))
        measured = zip(nodes, costs_of(table), zip(*nulls, strict=True), strict=True)
        return [Verdict("+".join(node), predicted, null) for node, predicted, null in measured]


def _merges(divisions: Sequence[Division], trials: Trials, apart: float) -> tuple[Merge, ...]:
    """Return the merges that lead from every category alone to the root's groups, the deepest nodes' first."""
    groups: list[tuple[str, ...]] = [(category,) for category in divisions[0].categories]
    before, found = apart, []
    for node in reversed(divisions[1:]):
        joined = tuple(group for group in groups if set(group) <= set(node.categories))
        groups = [*(group for group in groups if group not in joined), node.categories]
        predicted = trials.cost(groups)
        found.append(Merge(joined, len(groups), predicted, predicted - before))
        before = predicted
    return tuple(found)


def _check_separation(partition: Partition, separation: float, branching: int, terms: Terms) -> None:
    """Raise ValueError where as few groups as the first round makes have no room for the separation."""
    groups, cost = min(branching, len(partition.tree.categories)), costs(terms)
    spared = sum((most_given(partition, terms, site, 0) // groups) * cost[site] for site in partition.widths)
    most = (groups - 1) * spared / sum(partition.units(site) * cost[site] for site in partition.widths)
    if separation > most + 1e-9:
        raise ValueError(
            f"separation: got {separation:g}, at most {most:.3f} can be reached with {groups} groups; lower it, or "
            f"partition.min_core"
        )
