"""Parts of a split model: some of its categories alone, or all of them without some categories' own experts.

A category that stays runs the same units as before, so its outputs are the same. Units that no row can reach any more
are gone from the tensors. A category whose experts are taken out still has a place in the tree: it runs on what is
left of its route, the deepest ancestor that also serves others, as in ``SplitModel.ablated``.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.models.families import describe
from moeify.models.resizing import copy_units, shaped
from moeify.models.units import ConvUnits, FfnUnits
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ROOT, ExpertTree, Node


@dataclass(frozen=True)
class Pruning:
    """What is left of a partition."""

    partition: Partition
    kept: Mapping[str, Int[Tensor, " kept"]]
    """Site -> the units that stay, as the whole partition counts them, in order."""
    removed: tuple[str, ...]
    """The experts whose units were taken from categories that are still served, topmost only."""


def only(partition: Partition, categories: Sequence[str]) -> Pruning:
    """Return the part that serves these categories alone; an expert with one child left becomes one with it."""
    tree, wanted = partition.tree, set(categories)
    _known(tree, categories)
    found: list[tuple[Node, tuple[int, ...]]] = []

    def visit(node: int, parent: int | None) -> None:
        chain = [node]
        while len(below := _serving(tree, chain[-1], wanted)) == 1:
            chain.append(below[0])
        place = len(found)
        name = ROOT if parent is None else tree.nodes[chain[-1]].name
        served = tuple(c for c in tree.nodes[node].categories if c in wanted)
        found.append((Node(name, parent, served), tuple(chain)))
        for child in below:
            visit(child, place)

    visit(0, None)
    return _pruning(partition, found, ())


def without(partition: Partition, categories: Sequence[str]) -> Pruning:
    """Return the partition without the experts that serve none but these categories.

    In their place stands a leaf that owns nothing. Raises ValueError where a category has no expert to take out, or
    would be left without any unit in a site.
    """
    tree, unwanted = partition.tree, set(categories)
    _known(tree, categories)
    found: list[tuple[Node, tuple[int, ...]]] = []
    removed: list[str] = []
    for category in categories:
        if not _own(partition, category, unwanted):
            leaf = tree.nodes[tree.route(category)[-1]]
            shared = [other for other in leaf.categories if other not in unwanted]
            with_whom = f"; it shares {leaf.name!r} with {', '.join(shared)}, take them out with it" if shared else ""
            raise ValueError(f"category {category!r} has no expert of its own to take out{with_whom}")

    def visit(node: int, parent: int | None) -> None:
        old, place = tree.nodes[node], len(found)
        goes = parent is not None and unwanted.issuperset(old.categories)
        found.append((Node(old.name, parent, old.categories), () if goes else (node,)))
        if goes:
            removed.append(old.name)
        for child in () if goes else tree.children(node):
            visit(child, place)

    visit(0, None)
    for site, widths in partition.widths.items():
        for category in categories:
            left = [node for node in tree.route(category) if not unwanted.issuperset(tree.nodes[node].categories)]
            if not sum(widths[node] for node in left or (0,)):
                raise ValueError(
                    f"without its expert, category {category!r} has no unit left in site {site!r}; "
                    f"export the other categories alone instead"
                )
    return _pruning(partition, found, removed)


def prune(split: SplitModel, pruning: Pruning) -> SplitModel:
    """Return a split model of its own that holds what the pruning keeps, in eval mode and float32."""
    network = shaped(describe(split.network), {site: len(kept) for site, kept in pruning.kept.items()})
    copy_units(split.network, split.space, pruning.kept, network)
    served = set(pruning.partition.tree.categories)
    categories = [c for c in split.categories if c in served]
    pruned = SplitModel(network, categories, pruning.partition, told=bool(split.told)).eval()
    _copy_told(split, pruning, pruned)
    return pruned


@torch.no_grad()
def _copy_told(split: SplitModel, pruning: Pruning, pruned: SplitModel) -> None:
    """Copy what the units that stay have learned of the categories that stay."""
    places = torch.tensor([split.categories.index(category) for category in pruned.categories])
    sites = [site.name for site in split.space.sites if isinstance(site, FfnUnits | ConvUnits)]
    for site, biases, mine in zip(sites if split.told else (), split.told, pruned.told, strict=True):
        mine.copy_(biases[places][:, pruning.kept[site]])


def _pruning(partition: Partition, found: Sequence[tuple[Node, tuple[int, ...]]], removed: Sequence[str]) -> Pruning:
    """Return the pruning that makes each new node of the units of old ones."""
    widths, kept = {}, {}
    for site, old in partition.widths.items():
        starts = partition.starts(site)
        widths[site] = tuple(sum(old[node] for node in sources) for _, sources in found)
        own = [range(starts[node], starts[node] + old[node]) for _, sources in found for node in sources]
        kept[site] = torch.tensor(list(itertools.chain.from_iterable(own)), dtype=torch.long)
    return Pruning(Partition(ExpertTree(tuple(node for node, _ in found)), widths), kept, tuple(removed))


def _own(partition: Partition, category: str, unwanted: set[str]) -> bool:
    """Say whether units on the category's route serve none but unwanted categories."""
    nodes = partition.tree.nodes
    own = [node for node in partition.tree.route(category)[1:] if unwanted.issuperset(nodes[node].categories)]
    return any(partition.owned[node] for node in own)


def _serving(tree: ExpertTree, node: int, wanted: set[str]) -> list[int]:
    return [child for child in tree.children(node) if wanted.intersection(tree.nodes[child].categories)]


def _known(tree: ExpertTree, categories: Sequence[str]) -> None:
    if not categories:
        raise ValueError(f"no category was named; the model has {', '.join(tree.categories)}")
    for category in categories:
        if category not in tree.categories:
            raise ValueError(f"no category {category!r}; the model has {', '.join(tree.categories)}")
