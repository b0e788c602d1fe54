"""Which categories part: every leaf with several categories is divided into groups, one for each child.

Categories start alone and groups merge two at a time until as many are left as the round has branches. What merges is
the recipe's ``partition.grouping``: the groups whose attribution profiles are most alike, or those whose merge leaves
the least J at an equal active budget; by J, categories then change places as long as that lowers it. Everything is
deterministic in the table.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import combinations, islice
from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.affinity import by_linkage, profile_affinity
from attribution.agglomeration import Pick, agglomerate
from attribution.table import AttributionTable, Unsigned
from moeify.recipe.given_tree import Nested, branches, given_groups
from moeify.recipe.partition import AffinityGrouping, ResidualGrouping
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.partition import Partition
from moeify.splitting.terms import Terms, plain_terms
from moeify.splitting.trials import Trials, even_cut

Groups = Mapping[int, Sequence[tuple[str, ...]]]
"""Leaf (its index in the tree) -> the groups of categories that part."""

_SWEEPS = 4
"""How often all changes of places are tried, at most."""


class NothingToSplitError(ValueError):
    """No leaf is left that could be divided further, or none with room for it."""


def choose_groups(
    partition: Partition,
    table: AttributionTable,
    weights: Mapping[str, Float[Tensor, "dim _"]],
    config: PartitionConfig,
    round_: Round,
    score: Unsigned,
    tree: Nested | None = None,
    only: Collection[int] | None = None,
    terms: Terms | None = None,
) -> Groups:
    """Return leaf -> groups of its categories, for every leaf with several; unrouted ones make the last group.

    ``weights`` holds each site's output weights. What ``tree``, the recipe's, gives is taken as it is
    (``moeify.recipe.given_tree``), balanced or not. ``only``: the leaves that may be divided, those that passed the
    null test; ``None``: all. ``terms``: not given, those of ``config`` for every site. Raises NothingToSplitError where
    there is none.
    """
    leaves = divisible_leaves(partition, config)
    if not leaves:
        raise NothingToSplitError("every leaf serves one category; nothing is left to split")
    leaves = {leaf: parts for leaf, parts in leaves.items() if only is None or leaf in only}
    if not leaves:
        raise NothingToSplitError("no leaf's split beats permuted labels; nothing is worth splitting")
    terms = terms or plain_terms(config, partition.widths)
    cut = even_cut(partition, list(leaves), round_.separation, terms)
    affinity_CC = profile_affinity(table, score)
    found = {}
    for leaf, (categories, unrouted) in leaves.items():
        rows = torch.tensor([table.categories.index(c) for c in categories])
        affinity = affinity_CC[rows][:, rows].tolist()
        given = [[categories.index(c) for c in group] for group in given_groups(tree, categories)]
        free = [i for i in range(len(categories)) if not any(i in group for group in given)]
        start, apart = [*given, *([i] for i in free)], [group[0] for group in given]
        count = branches(len(given), len(free), round_.branching)
        even = max(-(-len(categories) // count), *map(len, given), 1)
        room = even if config.grouping.balanced else len(categories)
        match config.grouping:
            case AffinityGrouping():
                parts = agglomerate(start, count, room, _most_alike(affinity), apart)
            case ResidualGrouping(candidates=candidates):
                trials = Trials(partition, table, weights, config, score, leaf, cut, terms)
                pick = _least_residual(affinity, categories, trials, candidates)
                parts = agglomerate(start, count, room, pick, apart)
                parts = _settled(parts, free, room, categories, trials)
            case _:
                assert_never(config.grouping)
        found[leaf] = [*(tuple(categories[i] for i in part) for part in parts), *([unrouted] if unrouted else [])]
    return found


def divisible_leaves(
    partition: Partition, config: PartitionConfig
) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the leaves that can be divided, each with its categories that part there and those that stay unrouted."""
    found = {}
    for leaf in partition.tree.leaves:
        categories = partition.tree.nodes[leaf].categories
        routed = tuple(c for c in categories if is_routed([c], config))
        unrouted = tuple(c for c in categories if c not in routed)
        if len(routed) > 1 or (routed and unrouted):
            found[leaf] = (routed, unrouted)
    return found


def is_routed(part: Sequence[str], config: PartitionConfig) -> bool:
    """Say whether a group's categories get an expert."""
    return not set(part) <= set(config.unrouted)


def _most_alike(affinity: Sequence[Sequence[float]]) -> Pick:
    """Merge the two groups with the highest mean affinity across."""

    def pick(groups: Sequence[Sequence[int]], allowed: Callable[[int, int], bool]) -> tuple[int, int]:
        return next((i, j) for i, j in by_linkage(affinity, groups) if allowed(i, j))

    return pick


def _least_residual(
    affinity: Sequence[Sequence[float]], categories: Sequence[str], trials: Trials, candidates: int
) -> Pick:
    """Merge the two groups, of the ``candidates`` pairs most alike, whose merge leaves the least J.

    Cost: from n categories at most ``candidates`` trials a merge, n - branching merges; a trial is one assignment a
    site and one Schur residual a site and category. J is that of a split into all the groups there are after the merge,
    so every merge is chosen at the same active budget.
    """

    def pick(groups: Sequence[Sequence[int]], allowed: Callable[[int, int], bool]) -> tuple[int, int]:
        tried = []
        for i, j in islice((pair for pair in by_linkage(affinity, groups) if allowed(*pair)), candidates):
            merged = [*(group for k, group in enumerate(groups) if k not in (i, j)), [*groups[i], *groups[j]]]
            tried.append((_cost(merged, categories, trials), (i, j)))
        return min(tried)[1]

    return pick


def _settled(
    parts: Sequence[Sequence[int]], free: Sequence[int], room: int, categories: Sequence[str], trials: Trials
) -> list[list[int]]:
    """Let free categories change places, or go to another group with room, as long as J falls.

    At most ``_SWEEPS`` sweeps over all of them; one costs up to a trial a pair of categories, and a category and group.
    """
    steps = [*combinations(free, 2), *((i, -1 - k) for i in free for k in range(len(parts)))]
    best = [sorted(part) for part in parts]
    least = _cost(best, categories, trials)
    for _ in range(_SWEEPS):
        before = least
        for one, other in steps:
            changed = _changed(best, one, other, room)
            if changed and (cost := _cost(changed, categories, trials)) < least:
                best, least = changed, cost
        if least == before:
            break
    return sorted(best)


def _changed(parts: Sequence[Sequence[int]], one: int, other: int, room: int) -> list[list[int]] | None:
    """Return the groups after two categories changed places or, ``other`` < 0, ``one`` went to group -1 - other."""
    home = {i: k for k, part in enumerate(parts) for i in part}
    source, target = home[one], home[other] if other >= 0 else -1 - other
    if source == target or (other < 0 and (len(parts[source]) == 1 or len(parts[target]) == room)):
        return None
    moved = {one: target, other: source}
    return [sorted(i for i in home if moved.get(i, home[i]) == k) for k in range(len(parts))]


def _cost(parts: Sequence[Sequence[int]], categories: Sequence[str], trials: Trials) -> float:
    return trials.cost([[categories[i] for i in part] for part in parts])
