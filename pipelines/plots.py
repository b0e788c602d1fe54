"""Two pictures of a run: where attribution lies in the tree, and what separation costs.

Drawn from the run's own files with matplotlib's object interface: no display, no global figure.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict

from moeify.events import RoundEnded
from pipelines.journal import read_events
from pipelines.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Axes of arrays: U units, C categories.

_DPI = 150
_MOST_COLUMNS = 8
"""Sites side by side."""
_MOST_ROWS = 400
"""Units drawn apart in a site: about its height in pixels."""
_BRIGHTEST = 99.5
"""Percentile of all attributions at which the colour scale ends."""
_LEAST_LABELLED = 0.035
"""Fraction of a site's units below which an expert's name would run into its neighbours'."""
_SPLIT, _RANDOM, _DENSE = "#0072B2", "#D55E00", "#555555"
"""Of the Okabe-Ito palette, which colour-blind readers can tell apart."""


class _Node(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    parent: int | None
    categories: tuple[str, ...]


class _Ownership(BaseModel):
    """``partition.json``: who owns which unit."""

    model_config = ConfigDict(extra="ignore")

    nodes: tuple[_Node, ...]
    """Depth first; node 0 is the root."""
    owners: dict[str, list[int]]
    """Site, in the network's order -> node of each unit, in tree order."""


def attribution_path(folder: RunFolder, round_: int) -> Path:
    """Return where a round's attribution is drawn."""
    return folder.plots / f"attribution-round-{round_}.png"


def tax_path(folder: RunFolder) -> Path:
    """Return where tax against separation is drawn."""
    return folder.plots / "tax-separation.png"


def draw(folder: RunFolder, round_: int) -> list[Path]:
    """Draw what the end of a round adds; a round that left no attribution adds no map."""
    drawn = [tax_separation(folder)]
    if (folder.rounds / str(round_) / "attribution.safetensors").is_file():
        drawn.append(attribution_map(folder, round_))
    return drawn


def attribution_map(folder: RunFolder, round_: int) -> Path:
    """Draw every site's units x categories, experts outlined, and return the picture's path.

    Categories stand in leaf order and units in tree order, so that what an expert owns and serves is one rectangle;
    within an expert the units with the largest attribution come first.
    """
    tables_UC, categories, score = _read_attribution(folder, round_)
    ownership = _Ownership.model_validate_json((folder.rounds / str(round_) / "partition.json").read_bytes())
    leaves = ownership.nodes[0].categories
    if sorted(leaves) != sorted(categories) or set(ownership.owners) != set(tables_UC):
        raise ValueError(
            f"round {round_}: partition.json and attribution.safetensors speak of different categories or sites "
            f"({list(leaves)} and {categories}; {sorted(ownership.owners)} and {sorted(tables_UC)})"
        )
    columns = [categories.index(category) for category in leaves]

    from matplotlib.colors import PowerNorm

    brightest = float(np.percentile(np.concatenate([t.ravel() for t in tables_UC.values()]), _BRIGHTEST))
    norm = PowerNorm(0.5, vmin=0.0, vmax=brightest if brightest > 0.0 else 1.0, clip=True)
    across = min(_MOST_COLUMNS, len(tables_UC))
    down = math.ceil(len(tables_UC) / across)
    longest = max(len(node.name) for node in ownership.nodes)
    wide = 0.25 * len(leaves) + 0.062 * min(longest, 24) + 0.7
    figure = _figure(max(5.5, wide * across + 1.2), 3.6 * down + 0.9)
    grid = figure.subplots(down, across, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[len(tables_UC) :]:
        spare.remove()
    image: Any = None
    for axis, (site, owners) in zip(axes, ownership.owners.items(), strict=False):
        owners_U = np.asarray(owners, dtype=np.int64)
        image = _site(axis, tables_UC[site][:, columns], owners_U, ownership.nodes, norm)
        axis.set_title(f"{site}\n{len(owners_U):,} units", fontsize=9)
    colours = figure.colorbar(
        image, ax=axes[: len(tables_UC)], extend="max", shrink=min(1.0, 1.4 / down), aspect=30, pad=0.02
    )
    colours.set_label(f"attribution by {score}, nats (square-root scale)", fontsize=8)
    colours.ax.tick_params(labelsize=7)
    figure.suptitle(f"{folder.id}, round {round_}: what each unit matters to each category", fontsize=10)
    return _save(figure, attribution_path(folder, round_))


def tax_separation(folder: RunFolder) -> Path:
    """Draw tax against separation over the journal's rounds, and return the picture's path."""
    rounds = [event for event in read_events(folder.journal, 0)[0] if isinstance(event, RoundEnded)]
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    axis.axhline(0.0, color=_DENSE, linewidth=1.2, linestyle="--", label="dense twin")
    arms = (
        ("split by attribution", _SPLIT, "o", [event.tax for event in rounds]),
        ("random split, same sizes", _RANDOM, "s", [event.tax_random for event in rounds]),
    )
    separation = [event.separation for event in rounds]
    for label, colour, marker, taxes in arms:
        axis.plot(separation, taxes, color=colour, linewidth=1.2, alpha=0.7)
        for kept in (True, False):
            points = [(s, t) for s, t, e in zip(separation, taxes, rounds, strict=True) if e.accepted == kept]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    linestyle="none",
                    marker=marker,
                    markersize=7,
                    color=colour,
                    markerfacecolor=colour if kept else "white",
                    label=label if kept else f"{label}, rolled back",
                )
    for event in rounds:
        axis.annotate(
            f"round {event.round}",
            (event.separation, max(event.tax, event.tax_random)),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=_DENSE,
        )
    axis.margins(x=0.12, y=0.18)
    axis.set_xlabel("separation: 1 - mean active fraction of units")
    axis.set_ylabel("tax: nats above the dense twin")
    axis.set_title(f"{folder.id}: what separation costs", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    return _save(figure, tax_path(folder))


def _read_attribution(folder: RunFolder, round_: int) -> tuple[dict[str, Float[np.ndarray, "U C"]], list[str], str]:
    from safetensors import safe_open

    path = folder.rounds / str(round_) / "attribution.safetensors"
    with safe_open(path, framework="numpy") as file:
        facts = file.metadata() or {}
        tables = {site: file.get_tensor(site) for site in file.keys()}  # noqa: SIM118 - the file is no mapping
    if not tables or "categories" not in facts:
        raise ValueError(f"{path} holds {len(tables)} sites and facts {sorted(facts)}; wanted sites and 'categories'")
    return tables, json.loads(facts["categories"]), facts.get("score", "score")


def _site(
    axis: "Axes",
    table_UC: Float[np.ndarray, "U C"],
    owners_U: Int[np.ndarray, " U"],
    nodes: tuple[_Node, ...],
    norm: Any,
) -> Any:
    """Draw one site: its heat map, and each expert as the rectangle of its units and its categories."""
    from matplotlib.patches import Rectangle

    units, categories = table_UC.shape
    if owners_U.shape != (units,):
        raise ValueError(f"a site has {units} units of attribution and owners for {len(owners_U)}")
    order_U = np.lexsort((-table_UC.sum(axis=1), owners_U))
    image = axis.imshow(
        _thinned(table_UC[order_U]),
        aspect="auto",
        cmap="cividis",
        norm=norm,
        interpolation="nearest",
        extent=(0, categories, units, 0),
    )
    bounds = np.searchsorted(owners_U[order_U], np.arange(len(nodes) + 1))
    leaves = nodes[0].categories
    labels: list[tuple[float, str]] = []
    for node, (first, behind) in zip(nodes, pairwise(bounds), strict=True):
        if first == behind:
            continue
        left = leaves.index(node.categories[0])
        box = (left, first), len(node.categories), behind - first
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="black", linewidth=2.6, clip_on=False))
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=1.3, clip_on=False))
        if behind - first >= _LEAST_LABELLED * units:
            name = node.name if len(node.name) <= 24 else f"{node.name[:23]}…"
            labels.append(((first + behind) / 2, name))
    axis.set_yticks([place for place, _ in labels], [name for _, name in labels], fontsize=7)
    axis.set_xticks(
        np.arange(categories) + 0.5, list(leaves), fontsize=7, rotation=60, ha="right", rotation_mode="anchor"
    )
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def _thinned(table_UC: Float[np.ndarray, "U C"]) -> Float[np.ndarray, "rows C"]:
    """Average neighbouring units where there are more of them than pixels, so that none is skipped."""
    rows = min(len(table_UC), _MOST_ROWS)
    starts = np.arange(rows) * len(table_UC) // rows
    counts = np.diff(np.append(starts, len(table_UC)))
    return np.add.reduceat(table_UC, starts, axis=0) / counts[:, None]


def _figure(width: float, height: float) -> "Figure":
    """Return a figure of so many inches that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png")
    draft.replace(path)
    return path
