"""Two pictures of a run: where attribution lies in the tree, and what separation costs.

Drawn from the run's own files with matplotlib's object interface: no display, no global figure.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.heatmap import figure as figure_of
from attribution.heatmap import save_png
from moeify.events import RoundEnded, Started
from moeify.pictures import ownership_map
from moeify.recipe import strict_yaml
from moeify.result import MEAN, Result
from pipelines.journal import read_events
from pipelines.round_files import attribution_file, read_map
from pipelines.runs import RunFolder
from pipelines.wording import STANDARD_ERRORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FAR = 4.0
"""Times the largest tax that a budget may be and still have its line in the picture."""
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
    ownership = found.ownership
    figure = ownership_map(
        found.tables_UC,
        {site: np.asarray(owners, dtype=np.int64) for site, owners in ownership.owners.items()},
        ownership.nodes,
        scale=f"attribution ({found.score}), nats per {_unit(folder)}",
        frame="an expert after this round's cut; measured before it",
    )
    figure.suptitle(f"How much each unit matters to each category\n{folder.id}, round {round_}", fontsize=10)
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
    """Return the recipe's budget as it is written there; None without one, and where what is there is none."""
    recipe = strict_yaml.read(folder.resolved.read_text(encoding="utf-8"))
    budget = recipe.get("budget") if isinstance(recipe, dict) else None
    return budget if isinstance(budget, dict) and isinstance(budget.get("tax"), str | int | float) else None


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
