"""Two pictures of a run: where attribution lies in the tree, and what separation costs.

Drawn from the run's own files with matplotlib's object interface: no display, no global figure.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from attribution.heatmap import DECADES, NEVER, save_png, thinned
from attribution.heatmap import figure as figure_of
from moeify.events import RoundEnded, Started
from moeify.recipe import strict_yaml
from moeify.result import MEAN, Result
from pipelines.journal import read_events
from pipelines.round_files import OwningNode, attribution_file, read_map
from pipelines.runs import RunFolder
from pipelines.wording import STANDARD_ERRORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Axes of arrays: U units, C categories.

_FAR = 4.0
"""Times the largest tax that a budget may be and still have its line in the picture."""
_MOST_COLUMNS = 8
"""Sites side by side."""
_WIDE_LEGEND = 8.0
"""Inches of a figure that hold both entries of the map's legend side by side."""
_LEAST_GAP = 0.031
"""Fraction of a site's height below which two experts' names would run into each other."""
SPLIT, RANDOM, DENSE, TOLD, BUDGET = "#0072B2", "#D55E00", "#555555", "#009E73", "#CC79A7"
"""Of the Okabe-Ito palette, which colour-blind readers can tell apart."""


def attribution_path(folder: RunFolder, round_: int) -> Path:
    """Return where a round's attribution is drawn."""
    return folder.plots / f"attribution-round-{round_}.png"


def tax_path(folder: RunFolder) -> Path:
    """Return where tax against separation is drawn."""
    return folder.plots / "tax-separation.png"


def draw(folder: RunFolder, round_: int) -> list[Path]:
    """Draw what the end of a round adds; a round that left no attribution adds no map."""
    drawn = [tax_separation(folder)]
    if attribution_file(folder, round_).is_file():
        drawn.append(attribution_map(folder, round_))
    return drawn


def attribution_map(folder: RunFolder, round_: int) -> Path:
    """Draw every site's units x categories, experts outlined, and return the picture's path.

    Categories stand in leaf order and units in tree order, so that what an expert owns and serves is one rectangle;
    within an expert the units with the largest attribution come first. The scale is logarithmic: units differ by
    orders of magnitude, within a layer and between layers. Attribution is measured before the round's cut, so a
    category still runs what the cut takes away from it, and what earlier cuts took away is grey.
    """
    found = read_map(folder, round_)
    tables_UC, ownership, leaves = found.tables_UC, found.ownership, found.leaves

    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    top = max(float(table.max()) for table in tables_UC.values())
    top = top if top > 0.0 else 1.0
    norm = LogNorm(vmin=top / 10**DECADES, vmax=top, clip=True)
    across = min(_MOST_COLUMNS, len(tables_UC))
    down = math.ceil(len(tables_UC) / across)
    longest = max(len(node.name) for node in ownership.nodes)
    wide = 0.3 * len(leaves) + 0.062 * min(longest, 24) + 0.7
    figure = figure_of(max(6.5, wide * across + 1.2), 3.8 * down + 1.0)
    grid = figure.subplots(down, across, squeeze=False)
    axes = list(grid.flat)
    for spare in axes[len(tables_UC) :]:
        spare.remove()
    image: Any = None
    for axis, (site, owners) in zip(axes, ownership.owners.items(), strict=False):
        owners_U = np.asarray(owners, dtype=np.int64)
        image = _site(axis, tables_UC[site], owners_U, ownership.nodes, norm)
        axis.set_title(f"{site}\n{len(owners_U):,} units", fontsize=9)
    colours = figure.colorbar(
        image, ax=axes[: len(tables_UC)], extend="min", shrink=min(1.0, 1.4 / down), aspect=30, pad=0.02
    )
    colours.set_label(f"attribution ({found.score}), nats per {_unit(folder)}", fontsize=8)
    colours.ax.tick_params(labelsize=7)
    figure.suptitle(f"How much each unit matters to each category\n{folder.id}, round {round_}", fontsize=10)
    frame = Patch(facecolor="white", edgecolor="black", label="an expert after this round's cut; measured before it")
    zero = Patch(facecolor=NEVER, label="exactly 0: the category does not run the unit, or it never fires")
    zeros = any((table == 0.0).any() for table in tables_UC.values())
    figure.legend(
        handles=[frame, zero] if zeros else [frame],
        loc="outside lower center",
        ncols=2 if figure.get_figwidth() > _WIDE_LEGEND else 1,
        fontsize=7.5,
        frameon=False,
    )
    return save_png(figure, attribution_path(folder, round_))


def tax_separation(folder: RunFolder) -> Path:
    """Draw tax against separation over the journal's rounds and at the run's end, and return the picture's path."""
    rounds = [event for event in read_events(folder.journal, 0)[0] if isinstance(event, RoundEnded)]
    end = Result.model_validate_json(folder.result.read_bytes()) if folder.result.is_file() else None
    figure = tax_figure(rounds, end, _unit(folder), budget_of(folder, rounds))
    figure.suptitle("What separation costs", fontsize=11)
    figure.axes[0].set_title(f"{folder.id}; below 0: better than the dense twin", fontsize=7, color=DENSE)
    return save_png(figure, tax_path(folder))


def tax_figure(rounds: Sequence[RoundEnded], end: Result | None, unit: str, budget: float | None) -> "Figure":
    """Return the figure of tax against separation, without titles; bars are 95 % intervals over rows.

    Rounds are judged on validation data while training goes on; the end is on test data, when it is over. The told
    twin, which has no separation, is a line at its last tax; controls that the recipe leaves out are not drawn.
    ``budget``: the largest tax of a round that is kept, nats per unit.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = figure_of(6.6, 4.4)
    axis = figure.subplots()
    axis.axhline(0.0, color=DENSE, linewidth=1.2, linestyle="--", label="dense twin")
    if budget is not None:
        seen = max((abs(event.tax) for event in rounds), default=0.0)
        if budget <= _FAR * seen:
            axis.axhline(budget, color=BUDGET, linewidth=1.2, linestyle=":", label="budget of a round")
        else:  # a line so far away would press the rounds together
            axis.plot([], [], color=BUDGET, linestyle=":", label=f"budget of a round: {budget:g}, above the picture")
    if (told := _told(rounds, end)) is not None:
        axis.axhline(told[0], color=TOLD, linewidth=1.2, linestyle="-.", label=f"told twin, {told[1]}")
    random_end = end.tax_random[MEAN] if end and end.tax_random else None
    arms = (
        ("split model", SPLIT, "o", [event.tax for event in rounds], end.tax[MEAN] if end else None),
        ("random split, same sizes", RANDOM, "s", [event.tax_random for event in rounds], random_end),
    )
    errors = [(e.separation, e.tax, e.tax_error) for e in rounds if e.tax_error is not None]
    errors += [(1.0 - end.active_fraction[MEAN], end.tax[MEAN], end.tax_error)] if end and end.tax_error else []
    for place, tax, error in errors:
        axis.errorbar(place, tax, yerr=STANDARD_ERRORS * error, fmt="none", ecolor=SPLIT, elinewidth=1.0, alpha=0.6)
    for label, colour, marker, taxes, last in arms:
        known = [(e.separation, t, e.accepted) for e, t in zip(rounds, taxes, strict=True) if t is not None]
        axis.plot([s for s, *_ in known], [t for _, t, _ in known], color=colour, linewidth=1.2, alpha=0.7)
        for kept in (True, False):
            points = [(s, t) for s, t, accepted in known if accepted == kept]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    linestyle="none",
                    marker=marker,
                    markersize=7,
                    color=colour,
                    markerfacecolor=colour if kept else "white",
                    label=f"{label}, after recovery" if kept else f"{label}, rolled back",
                )
        if end and last is not None and math.isfinite(last):
            axis.plot(
                1.0 - end.active_fraction[MEAN],
                last,
                linestyle="none",
                marker="*",
                markersize=13,
                color=colour,
                markeredgecolor="black",
                markeredgewidth=0.6,
                label=f"{label}, end of the run (test)",
            )
    _name_rounds(axis, rounds)
    axis.margins(x=0.12, y=0.15)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.set_xlabel("separation: mean share of the units that a category does not run", fontsize=9)
    axis.set_ylabel(f"tax: nats per {unit} above the dense twin", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8.5, frameon=False, loc="outside lower center", ncols=2)
    return figure


def budget_of(folder: RunFolder, rounds: Sequence[RoundEnded]) -> float | None:
    """Return the largest mean tax that a kept round may have, nats per unit.

    None without a budget, for one that every category has to keep, and for a share of the dense twin's loss before a
    round has said how much that is.
    """
    budget = recipe_budget(folder)
    if not budget or budget.get("per", "mean") != "mean":
        return None
    if not isinstance(budget["tax"], str):
        return float(budget["tax"])
    shares = [event.tax / event.budget_used for event in rounds if event.budget_used]
    return shares[-1] if shares else None


def recipe_budget(folder: RunFolder) -> dict[str, Any] | None:
    """Return the recipe's budget as it is written there; None without one."""
    recipe = strict_yaml.read(folder.resolved.read_text(encoding="utf-8"))
    return recipe.get("budget") if isinstance(recipe, dict) else None


def _told(rounds: Sequence[RoundEnded], end: Result | None) -> tuple[float, str] | None:
    """Return the told twin's mean loss above the dense twin's and when it was that; None without a told twin.

    It is what is left of ``tax`` without ``tax_told``, the split model's loss above either twin's.
    """
    if end:
        if end.tax_told is None:
            return None
        tax, when = end.tax[MEAN] - end.tax_told[MEAN], "end of the run (test)"
    elif rounds and (over := rounds[-1].tax_told) is not None:
        tax, when = rounds[-1].tax - over, f"round {rounds[-1].round}"
    else:
        return None
    return (tax, when) if math.isfinite(tax) else None


def _name_rounds(axis: "Axes", rounds: Sequence[RoundEnded]) -> None:
    """Write each round's number above its points; rounds at one place share the words."""
    places: dict[float, list[RoundEnded]] = defaultdict(list)
    for event in rounds:
        places[round(event.separation, 2)].append(event)
    for events in places.values():
        highest = max(events, key=_highest)
        numbers = ", ".join(str(event.round) for event in events)
        axis.annotate(
            f"round {numbers}" if len(events) == 1 else f"rounds {numbers}",
            (highest.separation, _highest(highest)),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=DENSE,
        )


def _highest(event: RoundEnded) -> float:
    return event.tax if event.tax_random is None else max(event.tax, event.tax_random)


def _unit(folder: RunFolder) -> str:
    """Return what losses are counted by: token or example."""
    first = (event for event in read_events(folder.journal, 0)[0] if isinstance(event, Started))
    return next((event.unit for event in first), "unit")


def _site(
    axis: "Axes",
    table_UC: Float[np.ndarray, "U C"],
    owners_U: Int[np.ndarray, " U"],
    nodes: tuple[OwningNode, ...],
    norm: Any,
) -> Any:
    """Draw one site: its heat map, and each expert as the rectangle of its units and its categories."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    units, categories = table_UC.shape
    order_U = np.lexsort((-table_UC.sum(axis=1), owners_U))
    thin = thinned(table_UC[order_U])
    image = axis.imshow(
        np.ma.masked_equal(thin, 0.0),
        aspect="auto",
        cmap=colormaps["viridis"].with_extremes(bad=NEVER),
        norm=norm,
        interpolation="nearest",
        extent=(0, categories, units, 0),
    )
    bounds = np.searchsorted(owners_U[order_U], np.arange(len(nodes) + 1))
    leaves = nodes[0].categories
    labels: list[tuple[int, float, str]] = []
    for node, (first, behind) in zip(nodes, pairwise(bounds), strict=True):
        if first == behind:
            continue
        left = leaves.index(node.categories[0])
        box = (left, first), len(node.categories), behind - first
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="black", linewidth=2.6, clip_on=False))
        axis.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=1.3, clip_on=False))
        labels.append((behind - first, (first + behind) / 2, _shortened(node.name)))
    _name_experts(axis, labels, units)
    leaning = max(map(len, leaves)) > 2
    turn: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if leaning else {}
    axis.set_xticks(np.arange(categories) + 0.5, list(leaves), fontsize=7, **turn)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _name_experts(axis: "Axes", labels: Sequence[tuple[int, float, str]], units: int) -> None:
    """Write (units, middle, name) left of a site; names that were too close stand apart, with a line to their expert.

    Where there are more names than the height holds, those of the smallest experts are left out.
    """
    gap = _LEAST_GAP * units
    kept = sorted(sorted(labels, reverse=True)[: int(units / gap)], key=lambda label: label[1])
    places = _spread([middle for _, middle, _ in kept], gap, units - gap / 2)
    moved = [abs(place - middle) > gap / 4 for place, (_, middle, _) in zip(places, kept, strict=True)]
    axis.set_yticks(places, [name for *_, name in kept], fontsize=7)
    axis.tick_params(axis="y", pad=11 if any(moved) else 4)
    for place, (_, middle, _), apart in zip(places, kept, moved, strict=True):
        if apart:
            axis.annotate(
                "",
                xy=(0, middle),
                xycoords=("axes fraction", "data"),
                xytext=(-0.035, place),
                textcoords=("axes fraction", "data"),
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": DENSE, "shrinkA": 0, "shrinkB": 2},
            )


def _spread(wanted: Sequence[float], gap: float, most: float) -> list[float]:
    """Return rising places at least ``gap`` apart, as near to those wanted as that allows; the last at ``most``."""
    pools: list[tuple[int, float]] = []  # labels that touch, and the middle of them
    for place in wanted:
        count, middle = 1, min(place, most)
        while pools and middle - pools[-1][1] < gap * (count + pools[-1][0]) / 2:
            before, centre = pools.pop()
            middle = (count * middle + before * centre) / (count + before)
            count += before
            middle = min(middle, most - gap * (count - 1) / 2)
        pools.append((count, middle))
    return [middle + gap * (index - (count - 1) / 2) for count, middle in pools for index in range(count)]
