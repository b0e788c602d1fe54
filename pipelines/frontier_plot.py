"""The picture of a comparison: what separation costs, by method, with intervals over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attribution.heatmap import figure as figure_of
from attribution.heatmap import save_png
from moeify.comparison import DENSE, LOOP, TOLD, TWINS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F3C8D")
"""Seven of the Okabe-Ito palette, which colour-blind readers can tell apart, and two more; the loop has the first."""
_MARKERS = "osD^vP*X<>"
_GREY = "#555555"
_APART = 5.0
"""Points (1/72 inch) between two methods at one separation."""
_SPREAD = 1.5
"""How far beyond the means intervals are drawn, in parts of the means' own range; wide ones leave the picture."""


def frontier(rows: Sequence[Row], title: str, unit: str, path: Path) -> Path:
    """Draw every method's tax against its separation, twins as lines, and return the picture's path.

    Methods at one separation stand side by side, each a few points from its true place, so that bars do not hide one
    another. ValueError where there is no method to draw.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    methods = [name for name in dict.fromkeys(row.method for row in rows) if name not in TWINS]
    if not methods:
        raise ValueError("a frontier of no method: got twins alone, or nothing; wanted a job that ended well")
    figure = figure_of(7.4, 5.2)
    axis = figure.subplots()
    axis.axhline(0.0, color=_GREY, linewidth=1.2, linestyle="--", label=DENSE)
    for row in rows:
        if row.method == TOLD and row.tax:  # the same at every separation, but for seeds that are missing
            axis.axhline(row.tax.mean, color=_GREY, linewidth=1.2, linestyle=":", label=TOLD)
            break
    for place, method in enumerate(methods):
        _method(axis, [row for row in rows if row.method == method], place - (len(methods) - 1) / 2, place)
    _limits(axis, rows)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axis.set_xlabel("separation: mean share of the units that a category does not run")
    axis.set_ylabel(f"tax: nats per {unit} above the dense twin, test data")
    figure.suptitle("What separation costs, by method", fontsize=11)
    seeds = max(row.seeds for row in rows)
    bars = f"means of {seeds} seeds, bars: 95 % intervals" if seeds > 1 else "one seed"
    axis.set_title(f"{title}; {bars}; methods at one separation side by side", fontsize=7, color=_GREY)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7.5, frameon=False, loc="outside lower center", ncols=4)
    return save_png(figure, path)


def _method(axis: "Axes", rows: Sequence[Row], aside: float, place: int) -> None:
    from matplotlib.transforms import ScaledTranslation

    points = sorted((1.0 - row.active.mean, row.tax) for row in rows if row.tax)
    shift = ScaledTranslation(aside * _APART / 72, 0.0, axis.figure.dpi_scale_trans)
    axis.errorbar(
        [x for x, _ in points],
        [tax.mean for _, tax in points],
        yerr=[0.0 if math.isnan(tax.half) else tax.half for _, tax in points],
        transform=axis.transData + shift,
        color=_COLOURS[place % len(_COLOURS)],
        marker=_MARKERS[place % len(_MARKERS)],
        markersize=7 if rows[0].method == LOOP else 5,
        linewidth=1.6 if rows[0].method == LOOP else 0.9,
        elinewidth=0.9,
        capsize=2,
        alpha=0.9,
        zorder=3 if rows[0].method == LOOP else 2,
        label=rows[0].method,
    )


def _limits(axis: "Axes", rows: Sequence[Row]) -> None:
    """Make room for means, and for intervals up to ``_SPREAD``; shifted points do not make their own."""
    taxes = [row.tax for row in rows if row.tax]
    low, high = (end(0.0, *(tax.mean for tax in taxes)) for end in (min, max))
    room = _SPREAD * (high - low)
    known = [tax for tax in taxes if not math.isnan(tax.half)]
    bottom = max(low - room, min([low, *(tax.low for tax in known)]))
    top = min(high + room, max([high, *(tax.high for tax in known)]))
    edge = 0.06 * (top - bottom) or 0.01
    axis.set_ylim(bottom - edge, top + edge)
    places = [1.0 - row.active.mean for row in rows if row.method not in TWINS]
    edge = max(0.15 * (max(places) - min(places)), 0.02)
    axis.set_xlim(min(places) - edge, max(places) + edge)
