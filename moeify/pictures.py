"""Pictures of a split: its tree, what its units matter to, what removing its experts costs, how it was trained.

matplotlib's object interface alone, imported when something is drawn: no display, no global figure. Every function
returns a figure, which a notebook shows where it is a cell's last value. Axes of arrays: U units, C categories.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from attribution.heatmap import DECADES, NEVER, figure, thinned
from moeify.events import Step
from moeify.splitting.partition import Partition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Figure

_MOST_COLUMNS = 8
"""Sites side by side."""
_WIDE_LEGEND = 8.0
"""Inches of a figure that hold both entries of the map's legend side by side."""
_LEAST_GAP = 0.031
"""Fraction of a site's height below which two experts' names would run into each other."""
_LEAST_BOX = 0.045
"""Fraction of the tree's height that holds a line of text."""
_NUMBERS = 150
"""Cells of a matrix that have their number written in them, at most."""
_ARMS = {"dense": "#555555", "told": "#009E73", "split": "#0072B2", "random": "#D55E00"}
"""Of the Okabe-Ito palette, which colour-blind readers can tell apart."""


class Owning(Protocol):
    """An expert, as a picture needs it."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def categories(self) -> tuple[str, ...]:
        """What it serves, in leaf order."""
        ...


def tree(partition: Partition) -> "Figure":
    """Draw the expert tree over the categories it serves; a box is as high as the expert owns units.

    Experts stand on those above them, so that a column of boxes is a category's route, and its height the units that a
    row of the category runs; the dashed line is what the dense network runs.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    experts, total = partition.tree.nodes, sum(partition.owned)
    made = figure(max(5.0, 0.75 * len(partition.tree.categories) + 1.8), 4.2)
    axis = made.subplots()
    bottoms: list[int] = []
    depths: list[int] = []
    for node, units in zip(experts, partition.owned, strict=True):
        depth = 0 if node.parent is None else depths[node.parent] + 1
        bottom = 0 if node.parent is None else bottoms[node.parent]
        bottoms.append(bottom + units)
        depths.append(depth)
        first, last = partition.tree.span(experts.index(node))
        colour = colormaps["Blues"](min(0.2 + 0.17 * depth, 0.75))
        axis.add_patch(
            Rectangle((first, bottom), last - first, units, facecolor=colour, edgecolor="white", linewidth=2)
        )
        if units >= _LEAST_BOX * total:
            room = 11 * (last - first) - len(f" {units:,}")
            label = f"{_shortened(node.name, room)} {units:,}" if room > 3 else f"{units:,}"
            dark = "white" if depth > 1 else "black"
            middle = (first + last) / 2, bottom + units / 2
            axis.text(*middle, label, ha="center", va="center", fontsize=8, color=dark, parse_math=False)
    axis.axhline(total, color=_ARMS["dense"], linestyle="--", linewidth=1.2)
    axis.text(0.04, total, f"dense: {total:,} units", fontsize=8, va="bottom", color=_ARMS["dense"])
    _columns(axis, partition.tree.categories)
    axis.set(xlim=(0, len(partition.tree.categories)), ylim=(0, 1.09 * total), ylabel="units that a row runs")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"Expert tree: {partition.separation:.0%} of the units are off", fontsize=10)
    return made


def ownership_map(
    tables_UC: Mapping[str, Float[np.ndarray, "_ categories"]],
    owners: Mapping[str, Int[np.ndarray, " _"]],
    nodes: Sequence[Owning],
    *,
    scale: str,
    frame: str,
) -> "Figure":
    """Draw every site's units x categories, experts outlined, without a title.

    Categories of ``tables_UC`` stand in leaf order, units in tree order; ``owners``: the place in ``nodes``, which are
    depth first, of each unit's expert. ``scale`` says what is measured, ``frame`` what is outlined.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    top = max(float(table.max()) for table in tables_UC.values())
    top = top if top > 0.0 else 1.0
    norm = LogNorm(vmin=top / 10**DECADES, vmax=top, clip=True)
    across = min(_MOST_COLUMNS, len(tables_UC))
    down = math.ceil(len(tables_UC) / across)
    longest = max(len(node.name) for node in nodes)
    wide = 0.3 * len(nodes[0].categories) + 0.062 * min(longest, 24) + 0.7
    made = figure(max(6.5, wide * across + 1.2), 3.8 * down + 1.0)
    axes = list(made.subplots(down, across, squeeze=False).flat)
    for spare in axes[len(tables_UC) :]:
        spare.remove()
    image: Any = None
    for axis, (site, owners_U) in zip(axes, owners.items(), strict=False):
        image = _site(axis, tables_UC[site], owners_U, nodes, norm)
        axis.set_title(f"{site}\n{len(owners_U):,} units", fontsize=9, parse_math=False)
    colours = made.colorbar(
        image, ax=axes[: len(tables_UC)], extend="min", shrink=min(1.0, 1.4 / down), aspect=30, pad=0.02
    )
    colours.set_label(scale, fontsize=8)
    colours.ax.tick_params(labelsize=7)
    outline = Patch(facecolor="white", edgecolor="black", label=frame)
    zero = Patch(facecolor=NEVER, label="exactly 0: the category does not run the unit, or it never fires")
    zeros = any((table == 0.0).any() for table in tables_UC.values())
    made.legend(
        handles=[outline, zero] if zeros else [outline],
        loc="outside lower center",
        ncols=2 if made.get_figwidth() > _WIDE_LEGEND else 1,
        fontsize=7.5,
        frameon=False,
    )
    return made


def removals(rises: Mapping[str, Mapping[str, float]], unit: str) -> "Figure":
    """Draw what the removal of each expert costs each category; ``rises``: category -> expert -> nats per ``unit``."""
    categories, experts = list(rises), list(next(iter(rises.values())))
    rise_EC = np.array([[rises[category][expert] for category in categories] for expert in experts])
    most = float(np.abs(rise_EC).max()) or 1.0
    made = figure(max(4.5, 0.6 * len(categories) + 2.6), max(2.4, 0.32 * len(experts) + 1.4))
    axis = made.subplots()
    image = axis.imshow(rise_EC, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    text: dict[str, Any] = {"fontsize": 8, "parse_math": False}
    axis.set_xticks(range(len(categories)), categories, rotation=30, ha="right", rotation_mode="anchor", **text)
    axis.set_yticks(range(len(experts)), [_shortened(expert) for expert in experts], **text)
    axis.set(ylabel="without this expert and all below it")
    if rise_EC.size <= _NUMBERS:
        for (row, column), rise in np.ndenumerate(rise_EC):
            colour = "white" if abs(rise) > 0.6 * most else "black"
            axis.text(column, row, f"{rise:+.2g}" if rise else "·", ha="center", va="center", fontsize=7, color=colour)
    bar = made.colorbar(image, ax=axis, pad=0.02)
    bar.set_label(f"rise of the test loss, nats per {unit}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    axis.set_title("What removing an expert costs", fontsize=10)
    return made


def curves(steps: Collection[Step], unit: str) -> "Figure":
    """Draw the training loss of every arm, the mean over categories."""
    made = figure(6.4, 3.8)
    axis = made.subplots()
    for arm in dict.fromkeys(step.arm for step in steps):
        mine = [step for step in steps if step.arm == arm]
        losses = [sum(step.loss.values()) / len(step.loss) for step in mine]
        axis.plot([step.step for step in mine], losses, label=arm, color=_ARMS[arm], linewidth=1.4)
    axis.set(xlabel="optimizer step", ylabel=f"training loss, nats per {unit}")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return made


def _columns(axis: "Axes", names: Sequence[str]) -> None:
    """Name columns of width 1 below the picture."""
    leaning = max(map(len, names)) > 2
    turn: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if leaning else {}
    axis.set_xticks(np.arange(len(names)) + 0.5, list(names), fontsize=7, parse_math=False, **turn)
    axis.tick_params(length=0)


def _site(
    axis: "Axes",
    table_UC: Float[np.ndarray, "U C"],
    owners_U: Int[np.ndarray, " U"],
    nodes: Sequence[Owning],
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
    _columns(axis, leaves)
    axis.spines[:].set_visible(False)
    return image


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _name_experts(axis: "Axes", labels: Sequence[tuple[int, float, str]], units: int) -> None:
    """Write (units, middle, name) left of a site; names that were too close stand apart, with a line to their expert.

    Where there are more names than the height holds, those of the smallest experts are left out.
    """
    gap = _LEAST_GAP * units
    kept = sorted(sorted(labels, reverse=True)[: int(units / gap)], key=lambda label: label[1])
    places = _spread([middle for _, middle, _ in kept], gap, units - gap / 2)
    moved = [abs(place - middle) > gap / 4 for place, (_, middle, _) in zip(places, kept, strict=True)]
    axis.set_yticks(places, [name for *_, name in kept], fontsize=7, parse_math=False)
    axis.tick_params(axis="y", pad=11 if any(moved) else 4)
    for place, (_, middle, _), apart in zip(places, kept, moved, strict=True):
        if apart:
            axis.annotate(
                "",
                xy=(0, middle),
                xycoords=("axes fraction", "data"),
                xytext=(-0.035, place),
                textcoords=("axes fraction", "data"),
                arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": _ARMS["dense"], "shrinkA": 0, "shrinkB": 2},
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
