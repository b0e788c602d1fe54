"""Who owned what: all units after each round, and every site's units after the last one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.report.boxes import LEAST_NAMED, Box, looks, served
from pipelines.report.recorded import Recorded
from pipelines.round_files import Ownership
from pipelines.show import Summary, walk

_MOST_SEGMENTS = 1500
"""Strips in one picture that are told apart; where there are more, experts are drawn with the one they are below."""


@dataclass(frozen=True)
class Column:
    """The owners of all units at one time, from the core at the top to the last leaf."""

    head: str
    note: str
    kept: bool
    owners: tuple[Box, ...]


def ownership_by_round(run: Recorded, look: Mapping[str, str]) -> list[Column]:
    """Return a column for the dense model and one for each round.

    A split divides what a leaf owned and moves nothing else, so a unit keeps its height, but for its place among those
    of the same leaf, from one round that was kept to the next.
    """
    if not run.rounds or run.started is None:
        return []
    categories = run.started.categories
    units = sum(node["units"] for node, _ in walk(run.rounds[0].tree))
    dense = {"name": "core", "categories": list(categories), "units": units, "children": []}
    columns = [Column("dense", "", True, tuple(_stack(dense, look, categories)))]
    for event in run.rounds:
        own = {**looks(event.tree), **look} if event.accepted else looks(event.tree)
        note = f"{event.separation:.1%} separated" if event.outcome == "kept" else event.outcome
        columns.append(Column(f"round {event.round}", note, event.accepted, tuple(_stack(event.tree, own, categories))))
    return columns


def _stack(tree: Summary, look: Mapping[str, str], categories: Sequence[str]) -> Iterator[Box]:
    nodes = [node for node, _ in walk(tree)]
    total = sum(node["units"] for node in nodes)
    serves = served(tree, categories)
    above = 0
    for node in nodes:
        if node["units"]:
            name, share = node["name"], node["units"] / total
            title = f"{name}: {node['units']:,} units, {share:.1%}"
            shown = name if share >= LEAST_NAMED else ""
            yield Box(0, 100 * above / total, 100, 100 * share, title, look[name], shown, serves[name])
        above += node["units"]


@dataclass(frozen=True)
class Strip:
    """A site's units by owner, side by side."""

    site: str
    units: int
    owners: tuple[Box, ...]


def ownership_by_site(ownership: Ownership, look: Mapping[str, str]) -> list[Strip]:
    """Return a strip for each site; with very many experts, those below a child of the core are drawn as one."""
    nodes = ownership.nodes
    top = list(range(len(nodes)))
    if len(nodes) * len(ownership.owners) > _MOST_SEGMENTS:
        for index, node in enumerate(nodes):
            top[index] = index if node.parent in (None, 0) else top[node.parent]
    strips = []
    for site, owners in ownership.owners.items():
        counts = np.bincount(np.asarray(top)[np.asarray(owners, dtype=np.int64)], minlength=len(nodes))
        starts = np.concatenate([[0], np.cumsum(counts)])
        boxes = [
            Box(
                100 * float(first) / len(owners),
                0,
                100 * int(count) / len(owners),
                100,
                f"{node.name}: {int(count):,} units",
                look.get(node.name, "core"),
            )
            for node, first, count in zip(nodes, starts, counts, strict=False)
            if count
        ]
        strips.append(Strip(site, len(owners), tuple(boxes)))
    return strips
