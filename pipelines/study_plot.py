"""The picture of a study: a panel for each measure with every arm's interval, or the scatter that it asks for.

Measures that are not held against the reference arm, such as costs, are left to the table.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

from attribution.heatmap import figure as figure_of
from attribution.heatmap import save_png
from pipelines.studies.study import ArmJob, Column, Measures, Row, Scatter, Study, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _GREY = "#0072B2", "#555555"
_ACROSS = 3
"""Panels side by side."""
_APART = 100
"""How often the median is in the largest mean of a panel whose scale is logarithmic."""


def draw(study: Study, found: Mapping[ArmJob, Measures], name: str, question: str, path: Path) -> Path:
    """Draw what has ended, and return the picture's path."""
    rows = table(study, found)
    if study.scatter:
        figure = figure_of(6.4, 5.2)
        _scatter(figure.subplots(), study.scatter, found)
    else:
        asked = [column for column in study.columns if column.against or not study.reference]
        shown = [column for column in asked if any(column.measure in row.cells for row in rows)]
        across = min(_ACROSS, len(shown))
        down = math.ceil(len(shown) / across)
        longest = max(len(row.arm) for row in rows)
        figure = figure_of(2.8 * across + 0.075 * longest, (0.27 * len(rows) + 0.9) * down + 0.7)
        references = [row.arm for row in rows if study.reference and not study.held_against(row.arm)]
        axes = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
        for axis, column in zip(axes, shown, strict=False):
            _panel(axis, column, rows, references)
        for spare in axes[len(shown) :]:
            spare.set_visible(False)
    seeds = max(row.seeds for row in rows)
    shown_as = "one seed" if seeds == 1 else f"means of {seeds} seeds"
    bars = ", bars: 95 % intervals" if seeds > 1 and not study.scatter else ""
    figure.suptitle(f"{question}\n{name}; {shown_as}{bars}", fontsize=8.5)
    return save_png(figure, path)


def _panel(axis: "Axes", column: Column, rows: Sequence[Row], references: Sequence[str]) -> None:
    places = {row.arm: place for place, row in enumerate(rows)}
    for row in rows:
        if cell := row.cells.get(column.measure):
            mean, half = cell.value
            axis.errorbar(
                mean,
                places[row.arm],
                xerr=0.0 if math.isnan(half) else half,
                color=_GREY if row.arm in references else _BLUE,
                marker="D" if row.arm in references else "o",
                markersize=4.5,
                elinewidth=1.1,
                capsize=2,
            )
            if [row.arm] == references and column.against:
                axis.axvline(mean, color=_GREY, linewidth=0.8, linestyle="--", zorder=0)
    means = [cell.value.mean for row in rows if (cell := row.cells.get(column.measure))]
    if min(means) > 0 and max(means) > _APART * median(means):  # or all but the largest lie on one spot
        axis.set_xscale("log")
    else:
        axis.locator_params(axis="x", nbins=5)
    axis.set_yticks(list(places.values()), list(places), fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_title(column.title, fontsize=8.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _scatter(axis: "Axes", asked: Scatter, found: Mapping[ArmJob, Measures]) -> None:
    first = next(iter(found)).arm
    runs = [measures for job, measures in found.items() if job.arm == first]
    start = f"{asked.x}/"
    labels = [name.removeprefix(start) for name in runs[0] if name.startswith(start)]

    def means(kind: str) -> list[float]:
        return [fmean(run[f"{kind}/{label}"] for run in runs if f"{kind}/{label}" in run) for label in labels]

    x, y = means(asked.x), means(asked.y)
    axis.scatter(x, y, color=_BLUE, s=14, zorder=3)
    for label, *place in zip(labels, x, y, strict=True):
        axis.annotate(label, (place[0], place[1]), xytext=(3, 3), textcoords="offset points", fontsize=6, color=_GREY)
    axis.set_xlabel(asked.x_title, fontsize=8.5)
    axis.set_ylabel(asked.y_title, fontsize=8.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
