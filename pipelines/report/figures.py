"""The report's curves: what separation costs, whether J foresaw it, how training went."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.heatmap import figure as figure_of
from moeify.events import Step
from moeify.recipe.arms import Arm
from pipelines.plots import DENSE, RANDOM, SPLIT, TOLD, budget_of, tax_figure
from pipelines.report.recorded import Recorded
from pipelines.report.svg import inline
from pipelines.wording import STANDARD_ERRORS, nats, two_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARM_WORDS: dict[Arm, str] = {
    "dense": "dense twin",
    "told": "told twin",
    "split": "split model",
    "random": "random split",
}
_LOOKS: dict[Arm, tuple[str, str, str]] = {
    "dense": (DENSE, "--", "D"),
    "told": (TOLD, "-.", "v"),
    "split": (SPLIT, "-", "o"),
    "random": (RANDOM, ":", "s"),
}
"""Arm -> colour, line and marker: who sees no colours tells them apart by the others."""
_MOST_POINTS = 240
"""Of a curve; of more, neighbours are averaged."""
_WARM = 0.06
"""Fraction of the steps whose losses, high above all later ones, may lie outside of the picture."""
_MOST_PANELS = 16
"""Categories that get a curve of their own."""

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and losses."""


def tax(run: Recorded) -> str | None:
    """Draw tax against separation; None before the first round was judged."""
    if not run.rounds:
        return None
    figure = tax_figure(run.rounds, run.result, run.unit, budget_of(run.folder, run.rounds))
    points = "; ".join(
        f"round {e.round}: separation {e.separation:.1%}, tax {nats(e.tax, signed=True)}" for e in run.rounds
    )
    return inline(figure, "tax", f"Tax against separation. {points}.")


def predicted(run: Recorded) -> str | None:
    """Draw J, which is known at the cut, against the rise of loss at once and the tax after recovery."""
    rises = _rises_at_the_cut(run)
    points: dict[Arm, list[tuple[int, float, float | None, float]]] = {"split": [], "random": []}
    for event in run.rounds:
        if event.uncut:
            continue
        points["split"].append((event.round, event.predicted, rises.get(("split", event.round)), event.tax))
        if event.predicted_random is not None and event.tax_random is not None:
            rise = rises.get(("random", event.round))
            points["random"].append((event.round, event.predicted_random, rise, event.tax_random))
    known = [j for each in points.values() for _, j, *_ in each if j > 0.0 and math.isfinite(j)]
    if not known:
        return None
    from matplotlib.ticker import NullLocator

    figure = figure_of(6.6, 4.4)
    at_once, recovered = figure.subplots(1, 2)
    tips: dict[str, str] = {}
    for axis, place, title in ((at_once, 0, "at the cut"), (recovered, 1, "after recovery: tax")):
        for arm, each in points.items():
            colour, _, marker = _LOOKS[arm]
            for round_, j, *measured in each:
                value = measured[place]
                if value is None or not math.isfinite(value) or j <= 0.0:
                    continue
                gid = f"j-{place}-{arm}-{round_}"
                axis.plot(j, value, marker=marker, color=colour, markersize=7, gid=gid)
                axis.annotate(str(round_), (j, value), (6, 3), textcoords="offset points", fontsize=9, color=DENSE)
                tips[gid] = (
                    f"{ARM_WORDS[arm]}, round {round_}: J {two_digits(j)}, measured {nats(value, signed=True)} nats"
                )
        axis.set_xscale("log")
        ticks = np.unique(np.geomspace(min(known), max(known), 3))
        axis.set_xticks(ticks, [two_digits(float(tick)) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.2, y=0.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("J of the cut", fontsize=9.5)
        _finish(axis)
    at_once.set_ylabel(f"measured, nats per {run.unit}", fontsize=9.5)
    arms: list[Arm] = [arm for arm, each in points.items() if each]
    _legend(figure, arms, markers=True)
    return inline(figure, "predicted", "J of every cut against the measured rise of loss and against the tax", tips)


def expected(run: Recorded) -> str | None:
    """Draw the tax that was foreseen at each cut against the tax after recovery; None where none was foreseen."""
    known = [(e, e.expected) for e in run.rounds if e.expected is not None]
    known = [(e, foreseen) for e, foreseen in known if math.isfinite(foreseen) and math.isfinite(e.tax)]
    if not known:
        return None
    figure = figure_of(6.6, 4.4)
    axis = figure.subplots()
    colour, _, marker = _LOOKS["split"]
    tips: dict[str, str] = {}
    for event, foreseen in known:
        gid, face = f"e-{event.round}", "white" if event.outcome == "rolled back" else colour
        if event.tax_error is not None:
            reach = STANDARD_ERRORS * event.tax_error
            axis.errorbar(foreseen, event.tax, yerr=reach, fmt="none", ecolor=SPLIT, elinewidth=1.0, alpha=0.6)
        axis.plot(foreseen, event.tax, marker=marker, color=colour, markerfacecolor=face, markersize=7, gid=gid)
        words, at = f"round {event.round}", (foreseen, event.tax)
        axis.annotate(words, at, (7, 3), textcoords="offset points", fontsize=9, color=DENSE)
        tips[gid] = (
            f"{words}, {event.outcome}: expected {nats(foreseen, signed=True)}, measured {nats(event.tax, signed=True)}"
        )
    reaches = [STANDARD_ERRORS * (event.tax_error or 0.0) for event, _ in known]
    seen = [foreseen for _, foreseen in known]
    seen += [event.tax + side * reach for (event, _), reach in zip(known, reaches, strict=True) for side in (-1, 1)]
    low, high = min(0.0, *seen), max(0.0, *seen)
    ends = low - 0.12 * (high - low or 1.0), high + 0.12 * (high - low or 1.0)
    axis.plot(ends, ends, color=DENSE, linestyle="--", linewidth=1.0)
    axis.set_xlim(*ends)
    axis.set_ylim(*ends)
    axis.set_xlabel(f"tax expected at the cut, nats per {run.unit}", fontsize=9.5)
    axis.set_ylabel("tax after recovery", fontsize=9.5)
    _finish(axis)
    return inline(figure, "expected", "The tax expected at each cut against the tax measured after recovery", tips)


def _rises_at_the_cut(run: Recorded) -> dict[tuple[Arm, int], float]:
    """Return (arm, round) -> mean rise of validation loss in nats from before the cut to after it."""
    means = {(e.arm, e.round, e.moment): fmean(e.loss.values()) for e in run.evaluated if e.loss}
    return {
        (arm, round_): after - means[arm, round_, "before_cut"]
        for (arm, round_, moment), after in means.items()
        if moment == "after_cut" and (arm, round_, "before_cut") in means
    }


def training(run: Recorded) -> str | None:
    """Draw every arm's training loss, mean over categories, and how far it is above the dense twin's."""
    curves = _curves(run.steps, None)
    if not curves:
        return None
    figure = figure_of(6.6, 5.0)
    whole, apart = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_curves(whole, {arm: thinned(curve, _MOST_POINTS) for arm, curve in curves.items()})
    ends = [losses[steps >= _WARM * steps[-1]] for steps, losses in curves.values()]
    low, high = min(each.min() for each in ends), max(each.max() for each in ends)
    if high > low:
        whole.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    _draw_curves(apart, _above_dense(curves, _MOST_POINTS // 4))
    apart.axhline(0.0, color=DENSE, linewidth=1.0, linestyle="--")
    _mark_cuts(whole, run, named=True)
    _mark_cuts(apart, run, named=False)
    apart.set_xlabel("optimizer steps of each arm", fontsize=9.5)
    whole.set_ylabel(f"nats per {run.unit}", fontsize=9.5)
    apart.set_ylabel("above the dense twin", fontsize=9.5)
    _legend(figure, list(curves))
    return inline(figure, "training", "Training loss of every arm over its optimizer steps")


def training_by_category(run: Recorded) -> str | None:
    """Draw how far each arm is above the dense twin, a panel a category; None for too many, or before the first cut."""
    categories = run.started.categories if run.started else ()
    if not 1 < len(categories) <= _MOST_PANELS:
        return None
    drawn = {category: _above_dense(_curves(run.steps, category), _MOST_POINTS // 8) for category in categories}
    if not all(drawn.values()):
        return None
    across = min(3 if len(categories) <= 9 else 4, len(categories))
    down = math.ceil(len(categories) / across)
    figure = figure_of(6.6, 1.6 * down + 0.6)
    axes = list(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    for axis, (category, curves) in zip(axes, drawn.items(), strict=False):
        _draw_curves(axis, curves, width=1.0)
        axis.axhline(0.0, color=DENSE, linewidth=0.8, linestyle="--")
        axis.set_title(_shortened(category), fontsize=9.5, parse_math=False)
        axis.tick_params(labelsize=8)
    for spare in axes[len(categories) :]:
        spare.remove()
    _legend(figure, list(next(iter(drawn.values()))))
    return inline(figure, "bycategory", "Training loss above the dense twin's, a panel for each category")


def _above_dense(curves: Mapping[Arm, Curve], most: int) -> dict[Arm, Curve]:
    """Return the other arms' losses less the dense twin's at the same step, on the same rows."""
    dense = dict(zip(*curves["dense"], strict=True)) if "dense" in curves else {}
    found: dict[Arm, Curve] = {}
    for arm, (steps, losses) in curves.items():
        gaps = {int(step): loss - dense[step] for step, loss in zip(steps, losses, strict=True) if step in dense}
        if arm != "dense" and gaps:
            found[arm] = thinned(_sorted(gaps), most)
    return found


def _draw_curves(axis: "Axes", curves: Mapping[Arm, Curve], width: float = 1.4) -> None:
    for arm, (steps, losses) in curves.items():
        colour, line, _ = _LOOKS[arm]
        axis.plot(steps, losses, color=colour, linestyle=line, linewidth=width)
    _finish(axis)


def _mark_cuts(axis: "Axes", run: Recorded, *, named: bool) -> None:
    """Draw a line where each round's cut was, and its number."""
    cuts = {event.step: event.round for event in run.evaluated if event.moment == "after_cut"}
    for step, round_ in sorted(cuts.items()):
        axis.axvline(step, color=DENSE, linewidth=0.7, alpha=0.7)
        if named:
            words: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "fontsize": 8.5,
            }
            axis.annotate(f"cut {round_}", (step, 1.0), (3, -9), color=DENSE, **words)


def _curves(steps: Sequence[Step], category: str | None) -> dict[Arm, Curve]:
    """Return arm -> its curve; without a category the mean over them."""
    found: dict[Arm, dict[int, float]] = defaultdict(dict)
    for event in steps:
        values = list(event.loss.values()) if category is None else [v for c, v in event.loss.items() if c == category]
        if values and all(map(math.isfinite, values)):
            found[event.arm][event.step] = fmean(values)
    return {arm: _sorted(found[arm]) for arm in _LOOKS if arm in found}


def _sorted(points: Mapping[int, float]) -> Curve:
    places = sorted(points)
    return np.array(places, dtype=np.float64), np.array([points[place] for place in places])


def thinned(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """Average neighbouring points of a curve where there are more than ``most``; the first and the last stay."""
    steps, losses = curve
    if len(steps) <= most:
        return curve
    starts = np.unique(np.concatenate([[0, 1], np.linspace(1, len(steps) - 1, most - 1).astype(int)]))
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(losses, starts) / counts


def _legend(figure: "Figure", arms: Sequence[Arm], *, markers: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for arm in arms:
        colour, line, marker = _LOOKS[arm]
        look: dict[str, Any] = {"marker": marker, "linestyle": "none"} if markers else {"linestyle": line}
        handles.append(Line2D([], [], color=colour, label=ARM_WORDS[arm], **look))
    figure.legend(handles=handles, fontsize=9.5, frameon=False, loc="outside lower center", ncols=4)


def _finish(axis: "Axes") -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def drawn(run: Recorded) -> dict[str, str | None]:
    """Return every figure as SVG under its name; None for what the run has no data of (yet)."""
    return {
        "tax": tax(run),
        "predicted": predicted(run),
        "expected": expected(run),
        "training": training(run),
        "by_category": training_by_category(run),
    }
