"""A run in MLflow's terms: points of curves, parameters, a summary in markdown. Pure; knows no server.

Losses are ``train/<arm>/<category>``, ``validation/...`` and ``test/...`` in nats per unit, at the optimizer step they
were measured, with ``mean`` over categories beside them; ``tax/...`` is of the rounds, on validation data, and
``test/tax/...`` of the end. At a cut ``validation`` has two points at one step, before and after: the curve drops or
jumps there. MLflow makes a section of charts of what comes before a key's last slash.
"""

import json
import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from moeify.events import Evaluated, Event, RoundEnded, Step
from moeify.result import MEAN, Result
from pipelines.journal import read_events
from pipelines.runs import RunFolder
from pipelines.wording import nats, percent, two_digits

_LONGEST_PARAM = 6000
_LONGEST_KEY = 250
"""Characters that MLflow takes."""

Point = tuple[str, float, int]
"""Metric's key, value, step."""


def points_of(event: Event, unit: str) -> Iterable[Point]:
    """Yield what an event adds to MLflow's curves, at the optimizer step it happened."""
    match event:
        case Step():
            for category, loss in _with_mean(event.loss):
                yield _key("train", event.arm, category), loss, event.step
            yield _key(f"{unit}s_per_second", event.arm), event.units_per_second, event.step
            yield _key("train/learning_rate", event.arm), event.learning_rate, event.step
        case Evaluated():
            for category, loss in _with_mean(event.loss):
                yield _key(event.split, event.arm, category), loss, event.step
        case RoundEnded():
            yield "separation", event.separation, event.step
            yield "tax/mean", event.tax, event.step
            for category, tax in event.tax_by_category.items():
                yield _key("tax", category), tax, event.step
            yield "tax_random/mean", event.tax_random, event.step
            yield "predicted_J/split", event.predicted, event.step
            yield "predicted_J/random", event.predicted_random, event.step
            yield "accepted", float(event.accepted), event.step
        case _:
            return


def final_points(result: Result) -> Iterable[Point]:
    """Yield what a result adds to its losses: the tax on test data, and what share of the units runs."""
    for category in (*result.categories, MEAN):
        yield _key("test/tax", category), result.tax[category], result.steps
        yield _key("test/tax_random", category), result.tax_random[category], result.steps
        yield _key("test/active_fraction", category), result.active_fraction[category], result.steps


def _with_mean(loss: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    yield from loss.items()
    if loss:
        yield MEAN, fmean(loss.values())


def flat(recipe: dict[str, Any]) -> dict[str, str]:
    """Turn a nested recipe into parameters ``a.b.0.c -> value``, cut to what MLflow takes."""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk(f"{path}.{key}" if path else str(key), below)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, below in enumerate(value):
                walk(f"{path}.{index}", below)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[_safe(path)] = text[:_LONGEST_PARAM]

    walk("", recipe)
    return found


def summary(folder: RunFolder, status: str) -> str:
    """Return the run in a few lines of markdown: its result and its tree where there are any, and its rounds."""
    lines = [f"**{folder.id}**: {status}", ""]
    events, _ = read_events(folder.journal, 0)
    rounds = [event for event in events if isinstance(event, RoundEnded)]
    if folder.result.is_file():
        lines += _result_table(Result.model_validate_json(folder.result.read_bytes()))
    if rounds:
        lines += [
            "**Rounds**, validation, nats; tax: above the dense twin after recovery; J: predicted from the cut alone",
            "",
            "| round | separation | tax | random split's tax | J | random split's J | outcome |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for event in rounds:
            outcome = "kept" if event.accepted else "rolled back"
            lines.append(
                f"| {event.round} | {percent(event.separation)} | {nats(event.tax, signed=True)} "
                f"| {nats(event.tax_random, signed=True)} | {two_digits(event.predicted)} "
                f"| {two_digits(event.predicted_random)} | {outcome} |"
            )
        lines.append("")
    kept = [event.tree for event in rounds if event.accepted]
    if kept:
        lines += ["**Expert tree**, units", "", "```text", *_tree_lines(kept[-1]), "```"]
    return "\n".join(lines)


def _result_table(result: Result) -> list[str]:
    lines = [
        f"**Test loss**, nats per {result.unit}; tax: above the dense twin; active: share of the units that run",
        "",
        "| category | dense twin | split | random split | tax | random split's tax | active |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for category in (*result.categories, MEAN):
        losses = (dict(_with_mean(result.test_loss[arm]))[category] for arm in ("dense", "split", "random"))
        taxes = (result.tax[category], result.tax_random[category])
        cells = [
            category,
            *(nats(loss) for loss in losses),
            *(nats(tax, signed=True) for tax in taxes),
            percent(result.active_fraction[category]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _tree_lines(node: dict[str, Any], depth: int = 0) -> Iterable[str]:
    yield f"{'  ' * depth}{node['name']}: {node['units']:,}"
    for child in node["children"]:
        yield from _tree_lines(child, depth + 1)


def _key(*parts: str) -> str:
    return _safe("/".join(parts))


def _safe(key: str) -> str:
    """Replace what MLflow does not take in the name of a metric or parameter."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)[:_LONGEST_KEY]
