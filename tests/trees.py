"""Random expert trees, partitions and batches for property tests."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from attribution.sites import Site
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree


@st.composite
def expert_trees(draw: st.DrawFn, categories: int | None = None, rounds: int = 3) -> ExpertTree:
    count = categories or draw(st.integers(1, 6))
    tree = ExpertTree.undivided([f"c{i}" for i in range(count)])
    for _ in range(draw(st.integers(0, rounds))):
        divisible = [leaf for leaf in tree.leaves if len(tree.nodes[leaf].categories) > 1]
        groups = {}
        for leaf in divisible:
            names = draw(st.permutations(tree.nodes[leaf].categories))
            parts = draw(st.integers(1, min(3, len(names))))
            if parts > 1:
                cuts = sorted(draw(st.sets(st.integers(1, len(names) - 1), min_size=parts - 1, max_size=parts - 1)))
                groups[leaf] = [tuple(names[a:b]) for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
        if groups:
            tree = tree.split(groups)
    return tree


@st.composite
def partitions(draw: st.DrawFn, sites: list[Site], categories: int | None = None) -> Partition:
    """A partition of sites that have at least one unit a node, with at least one unit in the root."""
    tree = draw(expert_trees(categories))
    widths = {}
    for site in sites:
        spare = site.units - 1
        shares = draw(st.lists(st.integers(0, 5), min_size=len(tree.nodes), max_size=len(tree.nodes)))
        own = [math.floor(spare * share / max(1, sum(shares))) for share in shares]
        own[0] += site.units - sum(own)
        widths[site.name] = tuple(own)
    return Partition(tree, widths)


def random_orders(sites: list[Site], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {site.name: torch.randperm(site.units, generator=generator) for site in sites}
