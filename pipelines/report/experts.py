"""The expert tree as it is opened on the page, and what every category loses without each expert."""

from dataclasses import dataclass
from typing import Literal

from pipelines.report.cost import operations_of, owned
from pipelines.report.recorded import Recorded
from pipelines.show import Summary, active_fraction, walk
from pipelines.wording import interval, nats

_MOST_ROWS = 400
"""Experts in the matrix of removals, the first in the tree's order."""
_MOST_PLACES = 6000
"""Experts times sites up to which an expert tells its units in each site."""
_ALL_OPEN = 60
"""Experts up to which the whole tree is open."""


@dataclass(frozen=True)
class Expert:
    """A node of the tree with all that is told when it is opened."""

    name: str
    look: str
    serves: str
    categories: list[str]
    units: int
    share: float
    """Of all units, 0..1."""
    active: float | None
    """Of a leaf: fraction of all units on the way from the core to it."""
    flops: float | None
    """Operations of its own units in a forward pass, per token or example; None where units' parameters were not
    recorded."""
    active_flops: float | None
    """Of a leaf: fraction 0..1 of the whole network's operations that what it serves runs; None where not recorded."""
    sites: list[tuple[str, int, float]]
    """Site, units, fraction of the site's."""
    removal: list[tuple[str, float]]
    """Category, rise of its test loss in nats without the expert and all below it; the largest first."""
    below: int
    """Experts below it."""
    children: "list[Expert]"
    is_open: bool


def expert_tree(run: Recorded, look: dict[str, str], serves: dict[str, str]) -> Expert | None:
    """Return the root with everything below it; ``look`` and ``serves`` are of ``boxes``. None before the plan."""
    if run.tree is None:
        return None
    nodes = [node for node, _ in walk(run.tree)]
    total = sum(node["units"] for node in nodes)
    active = active_fraction(run.tree)
    sites = _own_units(run)
    removed: dict[str, dict[str, float | None]] = run.known["own_other"] or {}
    operations, whole = operations_of(run), run.known["active_flops"] or {}

    def expert(node: Summary, depth: int) -> Expert:
        name = node["name"]
        rises = [(c, rise) for c in node["categories"] if (rise := removed.get(c, {}).get(name)) is not None]
        return Expert(
            name=name,
            look=look[name],
            serves=serves[name],
            categories=node["categories"],
            units=node["units"],
            share=node["units"] / total,
            active=None if node["children"] else active[node["categories"][0]],
            flops=operations.get(name),
            active_flops=None if node["children"] else whole.get(node["categories"][0]),
            sites=sites.get(name, []),
            removal=sorted(rises, key=lambda each: -each[1]),
            below=sum(1 for _ in walk(node)) - 1,
            children=[expert(child, depth + 1) for child in node["children"]],
            is_open=len(nodes) <= _ALL_OPEN or depth < 1,
        )

    return expert(run.tree, 0)


def _own_units(run: Recorded) -> dict[str, list[tuple[str, int, float]]]:
    """Return expert -> its units in each site; empty where the last partition was not kept."""
    ownership = run.ownership()
    if ownership is None or len(ownership.nodes) * len(ownership.owners) > _MOST_PLACES:
        return {}
    found: dict[str, list[tuple[str, int, float]]] = {node.name: [] for node in ownership.nodes}
    for site, counts in owned(ownership).items():
        for node, count in zip(ownership.nodes, counts, strict=True):
            found[node.name].append((site, count, count / sum(counts)))
    return found


@dataclass(frozen=True)
class Cell:
    """What one category loses without one expert."""

    category: str
    kind: Literal["rise", "fall", "never", "unknown"]
    """``never``: the category does not run the expert; ``unknown``: not measured, or not finite."""
    text: str
    reach: str
    """Half of the rise's 95 % interval; empty where it is not known."""
    strength: float
    """Size beside the largest of the matrix, 0..1."""


@dataclass(frozen=True)
class Removal:
    """A row of the matrix: what every category loses without one expert and all below it."""

    name: str
    depth: int
    look: str
    serves: str
    cells: list[Cell]


def removals(
    run: Recorded, look: dict[str, str], serves: dict[str, str]
) -> tuple[list[str], list[Removal], int] | None:
    """Return the categories in leaf order, the rows, and how many were left out; None before the test."""
    matrix: dict[str, dict[str, float | None]] = run.known["own_other"]
    if not matrix or run.tree is None:
        return None
    nodes = [(node, depth) for node, depth in walk(run.tree) if depth]
    errors: dict[str, dict[str, float | None]] = run.known["own_other_error"] or {}
    rises = [rise for each in matrix.values() for rise in each.values() if rise is not None]
    largest = max(map(abs, rises), default=0.0) or 1.0
    rows = []
    for node, depth in nodes[:_MOST_ROWS]:
        name = node["name"]
        cells = [
            _cell(
                category,
                matrix.get(category, {}).get(name),
                errors.get(category, {}).get(name),
                category in node["categories"],
                largest,
            )
            for category in run.tree["categories"]
        ]
        rows.append(Removal(name, depth, look[name], serves[name], cells))
    return (run.tree["categories"], rows, len(nodes) - len(rows)) if rows else None


def _cell(category: str, rise: float | None, error: float | None, runs: bool, largest: float) -> Cell:
    if not runs and (rise is None or rise == 0.0):
        return Cell(category, "never", "·", "", 0.0)
    if rise is None:
        return Cell(category, "unknown", "?", "", 0.0)
    reach = "" if error is None else interval(error)
    return Cell(category, "rise" if rise >= 0.0 else "fall", nats(rise, signed=True), reach, abs(rise) / largest)
