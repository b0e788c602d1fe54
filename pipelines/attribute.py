"""`moeify attribute`: measure a run's model or a checkpoint, say what was found, and leave it as files."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import networkx as nx
import torch
from jaxtyping import Float64
from rich.console import Console
from torch import Tensor

from attribution import files, heatmap
from attribution.affinity import affinity_graph, profile_affinity, profile_interval
from attribution.agreement import EVERY, Agreement, Comparison, Items, compare
from attribution.edges import measure_edges
from attribution.gradients import measure_gradients
from attribution.graph import EveryEdge, UnitGraph
from attribution.measure import measure
from attribution.methods import LinearOutputs
from attribution.stability import strongest_category
from attribution.subject import Rows
from attribution.table import AttributionTable, Unsigned
from moeify.models.families import entries
from moeify.subjects import Probed
from pipelines.tables import console_for, in_columns, table_for
from pipelines.wording import counted

Say = Callable[[str], None]
Matrix = Float64[Tensor, "categories categories"]

TABLE, PARQUET, PICTURE = "attribution.safetensors", "attribution.parquet", "attribution.png"
SAMPLES = 8
"""Draws for the Fisher information: what is read by people is worth being less noisy."""
EXACT_OUTPUTS = LinearOutputs().limit
"""Of a network with at most so many outputs, classes of images, the report takes the loss itself and not a parabola."""
SILENT = {
    "dead": "never active: {}; without them nothing changes, so any split may drop them",
    "without_gradient": "active, but no loss depends on them: {}; measure more rows before they are dropped",
}
"""Units that count for nothing, by what the table calls them, and what to do about them."""
AFFINITY, EDGES, AGREEMENT = "affinity.graphml", "edges.graphml", "agreement.json"


@dataclass(frozen=True)
class Found:
    """All that was measured."""

    table: AttributionTable
    score: Unsigned
    affinity: Matrix
    """Of the categories' attribution profiles."""
    cosines: Matrix | str
    """Of the categories' gradients; why not, where they cannot be told from noise."""
    agreement: Comparison | None


def attribute(
    probed: Probed, out: Path, *, score: Unsigned, seed: int, agreement: bool, removed: float, say: Say
) -> Found:
    """Measure every unit against every category, write what was found to ``out``, and return it.

    ``removed``: the share of a site's units in the sets that ``agreement`` tries, on a few of the rows, since exact
    ablation takes a forward pass a unit. Raises ValueError where ``out`` is no folder to write to; what an earlier call
    left there and this one does not write is removed.
    """
    followed = entries(probed.subject.inner)
    _make_room(out, [name for name, made in ((EDGES, followed), (AGREEMENT, agreement)) if not made])
    say("measuring")
    table = measure(probed.subject, probed.batches, seed=seed, samples=SAMPLES, exact_outputs=EXACT_OUTPUTS)
    files.save(table, out / TABLE)
    files.to_parquet(table, out / PARQUET)
    heatmap.draw(table, out / PICTURE, score)
    say("measuring gradients")
    affinity = profile_affinity(table, score)
    graph = affinity_graph(affinity, table.categories, profile_interval(table, score, seed=seed))
    cosines = _gradient_cosines(probed, seed, graph)
    nx.write_graphml(graph, out / AFFINITY)
    if followed:
        say("measuring edges")
        (out / EDGES).write_text(edge_graph(probed, table).graphml(), encoding="utf-8")
    else:
        say(f"no {EDGES}: edges between the sites of {type(probed.subject.inner).__name__} cannot be followed")
    found = None
    if agreement:
        few = _few(probed.batches, len(table.categories))
        found = compare(probed.subject, few, values=("zero", "mean"), removed=removed, seed=seed, said=say)
        (out / AGREEMENT).write_text(json.dumps(as_json(found), indent=1), encoding="utf-8")
    return Found(table, score, affinity, cosines, found)


def _make_room(out: Path, stale: Sequence[str]) -> None:
    """Make the folder, before anything takes time, without files that would stand beside newer ones."""
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; give a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{there} cannot be written to; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (out / name).unlink(missing_ok=True)


def _few(batches: Sequence[Rows], categories: int) -> list[Rows]:
    """Return the first batches, as many as it takes to have two rows of every category, or all."""
    counts = torch.zeros(categories, dtype=torch.int64)
    for number, batch in enumerate(batches, 1):
        counts += torch.bincount(batch.categories, minlength=categories)
        if bool((counts >= 2).all()):
            return list(batches[:number])
    return list(batches)


def _gradient_cosines(probed: Probed, seed: int, graph: nx.Graph) -> Matrix | str:
    """Return the cosines of the categories' gradients, and put them on the graph with their interval.

    Over few rows, or at the end of training, a gradient may be all noise; then the reason is returned.
    """
    try:
        sketch = measure_gradients(probed.subject, probed.batches, seed=seed)
        cosines, ends = sketch.cosines(), sketch.interval()
    except ValueError as error:
        return str(error)
    names = list(probed.subject.categories)
    for one, other, facts in graph.edges(data=True):
        at = names.index(one), names.index(other)
        for key, values in zip(("gradient", "gradient_lower", "gradient_upper"), (cosines, *ends), strict=True):
            facts[key] = float(values[at])
    return cosines


def edge_graph(probed: Probed, table: AttributionTable) -> UnitGraph:
    """Return the graph of what flows between experts, or where nothing was split yet, between categories' own units.

    A block of units is a node: an expert's in a site, or those that matter most to one category; a unit of
    several features, as a head is, stands alone. Every node is named by its site and its expert or category.
    """
    names = probed.experts or table.categories
    strongest = strongest_category(table)
    blocks = dict(probed.owners) or {
        site.name: strongest[site.name] for site in probed.subject.sites if site.width == 1
    }
    edges = measure_edges(probed.subject, probed.batches, entries(probed.subject.inner), blocks=blocks)
    graph = UnitGraph.of(table, edges, EveryEdge()).graph
    called = {
        node: f"{facts['site']}/{names[facts['block']] if facts['site'] in blocks else facts['block']}"
        for node, facts in graph.nodes(data=True)
    }
    return UnitGraph(nx.relabel_nodes(graph, called))


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data: a row a method, site, kind of items and stand-in value."""
    return {"rows": [asdict(row) for row in found.rows], "costs": dict(found.costs), "refused": dict(found.refused)}


def summary(found: Found) -> dict[str, Any]:
    """Return what was found as plain data: sites, units that do nothing, each category's strongest units."""
    table = found.table
    report = {site: table.report(site) for site in table.sites}
    return {
        "categories": list(table.categories),
        "tokens": {c: int(n) for c, n in zip(table.categories, table.counts.tolist(), strict=True)},
        "sites": {
            site: {
                "units": sums.units,
                "dead": table.dead(site).nonzero().flatten().tolist(),
                "without_gradient": table.without_gradient(site).nonzero().flatten().tolist(),
                "strongest": {
                    category: [
                        {"unit": int(unit), "nats": float(report[site][unit, c])}
                        for unit in report[site][:, c].argsort(descending=True, stable=True)[:5]
                    ]
                    for c, category in enumerate(table.categories)
                },
            }
            for site, sums in table.sites.items()
        },
        "affinity": found.affinity.tolist(),
        "gradient_cosines": None if isinstance(found.cosines, str) else found.cosines.tolist(),
        "agreement": None if found.agreement is None else as_json(found.agreement),
    }


def print_found(title: str, found: Found, unit: str, stream: TextIO) -> None:
    """Print each site's strongest unit for every category, what does nothing, and how alike the categories are."""
    console, table = console_for(stream), found.table
    total = int(table.counts.sum())
    console.print(f"{title} · {len(table.categories)} categories · {total:,} {unit}s", style="bold")
    console.print("\nEach category's strongest unit", style="bold")
    for chunk in in_columns(console, table.categories, 14, 18):
        grid = table_for(console, "site", "units", *chunk)
        for site, sums in table.sites.items():
            report_UC = table.report(site)
            best = [report_UC[:, table.categories.index(c)].max(0) for c in chunk]
            grid.add_row(site, f"{sums.units:,}", *(f"{int(b.indices)}: {float(b.values):+.4f}" for b in best))
        console.print(grid)
    console.print(f"number of the unit: estimated rise of the loss without it, nats per {unit}", style="dim")
    for flag, what in SILENT.items():
        silent = {site: int(getattr(table, flag)(site).sum()) for site in table.sites}
        if any(silent.values()):
            told = ", ".join(f"{site} {count}" for site, count in silent.items() if count)
            console.print(f"units {what.format(told)}", style="yellow")
    title = f"Affinity of the categories' units ({found.score}; 1: the same, 0: chance)"
    _print_matrix(console, title, found.affinity, table.categories)
    if isinstance(found.cosines, str):
        console.print(f"No cosines of gradients: {found.cosines}", style="dim")
    else:
        _print_matrix(console, "Cosine of the categories' gradients", found.cosines, table.categories)
    if found.agreement:
        _print_agreement(console, found.agreement)


def _print_matrix(console: Console, title: str, matrix_CC: Matrix, names: Sequence[str]) -> None:
    console.print(f"\n{title}", style="bold")
    for chunk in in_columns(console, names, 14, 9):
        grid = table_for(console, "category", *chunk)
        for row, name in zip(matrix_CC, names, strict=True):
            grid.add_row(name, *(f"{float(row[names.index(c)]):+.2f}" for c in chunk))
        console.print(grid)


def _print_agreement(console: Console, found: Comparison) -> None:
    """Print one table for single units and one for sets, zeroed."""
    titles: dict[Items, str] = {
        "units": "Single units: rank correlation with the rise of the loss when one is zeroed",
        "sets": "Sets of units: correlation with the rise of the loss when one is zeroed",
    }
    for of, title in titles.items():
        rows = [row for row in found.rows if row.of == of and row.value == "zero" and row.site != EVERY]
        if not rows:
            continue
        console.print(f"\n{title}", style="bold")
        sites, counts = {row.site for row in rows}, [row.items for row in rows]
        by_method = {method: list(mine) for method, mine in groupby(sorted(rows, key=_method), key=_method)}
        order = sorted(by_method, key=lambda method: -_key(found, method, of))
        grid = table_for(console, "method", "all sites", "lowest", "highest", "top 10 %", "true/predicted", "cost")
        for method in order:
            mine = by_method[method]
            figures = [_figure(row, of) for row in mine]
            slopes = sorted(row.slope.value for row in mine if row.slope)
            mean = found.mean(method, of, "zero")
            grid.add_row(
                method,
                f"{_key(found, method, of):.3f} ±{_half_width(found, method, mine):.3f}",
                f"{min(figures):.2f}",
                f"{max(figures):.2f}",
                f"{mean.overlap:.0%}",
                f"{slopes[len(slopes) // 2]:.3g}" if slopes else "-",
                f"{found.costs[method]:.1f}",
            )
        console.print(grid)
        each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        console.print(f"{counted(len(sites), 'site')}, {each} {of} each", style="dim")
    console.print(
        f"±: 95 % bootstrap interval; lowest, highest: of the sites; top 10 %: of the strongest tenth, the share "
        f"found; true/predicted: 1 where calibrated; cost: in forward passes of the same rows "
        f"(exact ablation of single units {found.costs['ablation']:,.0f})",
        style="dim",
    )
    for method, reason in found.refused.items():
        console.print(f"{method} left out: {reason}", style="dim")


def _method(row: Agreement) -> str:
    return row.method


def _figure(row: Agreement, of: Items) -> float:
    return row.spearman.value if of == "units" else row.pearson.value


def _key(found: Comparison, method: str, of: Items) -> float:
    """Return the figure of all sites: of their units together, or the mean over their sets."""
    pooled = found.pooled(method, "zero")
    return pooled.spearman.value if pooled and of == "units" else found.mean(method, of, "zero").pearson


def _half_width(found: Comparison, method: str, rows: Sequence[Agreement]) -> float:
    """Return half the interval of that figure; the draws of different sites are independent."""
    pooled = found.pooled(method, "zero")
    if pooled and rows[0].of == "units":
        return (pooled.spearman.high - pooled.spearman.low) / 2
    squares = torch.tensor([((row.pearson.high - row.pearson.low) / 2) ** 2 for row in rows])
    return float(squares.nan_to_num().sum().sqrt()) / len(rows)
