"""Is there anything to split? Attribution's split of a leaf against splits of the same leaf by meaningless labels.

Labels are permuted across rows (sequences or examples) among the categories of each leaf, the network is measured again
with them, and each such table chooses a split of its own, as the true one did, at the same widths. What the network
computes stays the same, since a leaf's categories share their route; only whom it is credited to differs. If labels
meant nothing to the units, the true table's J would be one draw more of the same distribution.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import stdtr
from torch import Tensor

from attribution.table import AttributionTable
from moeify.recipe.config import RunConfig
from moeify.recipe.rounds import Round
from moeify.rows import generator
from moeify.splitting.grouping import choose_groups, divisible_leaves, is_routed
from moeify.splitting.partition import Partition
from moeify.splitting.terms import Terms, plain_terms
from moeify.splitting.trials import Trials, even_cut
from moeify.task import Batch

Relabel = Callable[[Iterable[Batch]], Iterable[Batch]]
"""Gives rows other labels; the rows themselves, and how many there are of each category, stay."""
Measure = Callable[[Relabel], AttributionTable]
"""Measures the network with other labels: the same rows as the true table's, all workers' together."""


@dataclass(frozen=True)
class Verdict:
    """What the test says of one leaf."""

    expert: str
    predicted: float
    """J of attribution's split, nats per unit (token or example) over all data."""
    null: tuple[float, ...]
    """J of the split that each permutation's table chooses; nats."""

    def __post_init__(self) -> None:
        if len(self.null) < 2:
            raise ValueError(f"expert {self.expert!r}: got {len(self.null)} permutations, wanted at least 2")

    @property
    def statistic(self) -> float:
        """How much lower J is than permuted labels leave it on average, nats."""
        return fmean(self.null) - self.predicted

    @property
    def p(self) -> float:
        """Probability of so low a J from one permutation more.

        If log J is normal, with a mean and a spread that the permutations tell: Student's t of the gap over spread
        sqrt(1 + 1 / permutations). A rank among so few could not fall below 1 / (permutations + 1).
        """
        measured, *null = (math.log(max(value, sys.float_info.min)) for value in (self.predicted, *self.null))
        gap, spread = fmean(null) - measured, stdev(null) * math.sqrt(1 + 1 / len(null))
        if spread == 0.0:
            return 0.0 if gap > 0 else 1.0
        return float(stdtr(len(null) - 1, -gap / spread))

    def __str__(self) -> str:
        return (
            f"{self.expert}: J {self.predicted:.3g}, with permuted labels {fmean(self.null):.3g} "
            f"+- {stdev(self.null):.1g}, p = {self.p:.2g}"
        )


def null_test(
    partition: Partition,
    table: AttributionTable,
    weights: Mapping[str, Float[Tensor, "dim _"]],
    config: RunConfig,
    round_: Round,
    permutations: int,
    measure: Measure,
    number: int = 0,
    terms: Terms | None = None,
) -> dict[int, Verdict]:
    """Return leaf -> verdict, for every leaf that can be divided; one measuring pass a permutation serves them all.

    ``table`` is the true one, ``round_`` says the branching and the separation whose widths are compared, equally wide
    experts in all sites. Permutations are drawn from the recipe's seed and ``number``, that of the round. Rows of one
    document are alike, so where documents are few the test also finds documents, not only categories. Leaf by leaf,
    with no correction for how many there are.
    """
    leaves = divisible_leaves(partition, config.partition)
    if not leaves:
        return {}
    served = [[table.categories.index(c) for c in partition.tree.nodes[leaf].categories] for leaf in leaves]
    measured = split_costs(partition, table, weights, config, round_, terms)
    nulls = []
    for i in range(permutations):

        def relabel(batches: Iterable[Batch], i: int = i) -> list[Batch]:
            return permuted(batches, served, generator(config.seed, "permute", number, i))

        nulls.append(split_costs(partition, measure(relabel), weights, config, round_, terms))
    return {
        leaf: Verdict(partition.tree.nodes[leaf].name, measured[leaf], tuple(null[leaf] for null in nulls))
        for leaf in leaves
    }


def split_costs(
    partition: Partition,
    table: AttributionTable,
    weights: Mapping[str, Float[Tensor, "dim _"]],
    config: RunConfig,
    round_: Round,
    terms: Terms | None = None,
) -> dict[int, float]:
    """Return leaf -> J of the split into the table's own groups, with equally wide experts in all sites; nats."""
    score = config.attribution.score
    terms = terms or plain_terms(config.partition, partition.widths)
    groups = choose_groups(partition, table, weights, config.partition, round_, score, config.tree, terms=terms)
    cut = even_cut(partition, list(groups), round_.separation, terms)
    return {
        leaf: Trials(partition, table, weights, config.partition, score, leaf, cut, terms).cost(
            [part for part in parts if is_routed(part, config.partition)]
        )
        for leaf, parts in groups.items()
    }


def permuted(batches: Iterable[Batch], groups: Sequence[Sequence[int]], random: np.random.Generator) -> list[Batch]:
    """Permute the labels of all rows among the categories of each group, over all batches; rows go into category order.

    Holds all batches at once.
    """
    held = list(batches)
    labels = torch.cat([batch.categories for batch in held])
    for group in groups:
        places = torch.isin(labels, torch.tensor(group, device=labels.device)).nonzero().squeeze(1)
        labels[places] = labels[places][torch.from_numpy(random.permutation(len(places))).to(labels.device)]
    found = []
    for batch, mine in zip(held, labels.split([len(batch.categories) for batch in held]), strict=True):
        order = torch.argsort(mine, stable=True)
        found.append(Batch(batch.inputs, batch.targets, mine, batch.ids).take(order))
    return found
