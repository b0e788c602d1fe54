"""A run in MLflow's terms: points of curves, parameters, a summary in markdown. Pure; knows no server.

Losses are ``train/<arm>/<category>``, ``validation/...`` and ``test/...`` in nats per unit, at the optimizer step they
were measured. At a cut ``validation`` has two points at one step, before and after: the curve drops or jumps there.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from moeify.events import Evaluated, Event, RoundEnded, Step
from moeify.result import Result
from pipelines.journal import read_events
from pipelines.runs import RunFolder

_LONGEST_PARAM = 6000
_LONGEST_KEY = 250
"""Characters that MLflow takes."""

Point = tuple[str, float, int]
"""Metric's key, value, step."""


def points_of(event: Event, unit: str) -> Iterable[Point]:
    """Yield what an event adds to MLflow's curves, at the optimizer step it happened."""
    match event:
        case Step():
            for category, loss in event.loss.items():
                yield _key("train", event.arm, category), loss, event.step
            yield _key(f"{unit}s_per_second", event.arm), event.units_per_second, event.step
            yield _key("learning_rate", event.arm), event.learning_rate, event.step
        case Evaluated():
            for category, loss in event.loss.items():
                yield _key(event.split, event.arm, category), loss, event.step
        case RoundEnded():
            yield "separation", event.separation, event.step
            yield "tax/mean", event.tax, event.step
            for category, tax in event.tax_by_category.items():
                yield _key("tax", category), tax, event.step
            yield "tax_random", event.tax_random, event.step
            yield "predicted", event.predicted, event.step
            yield "predicted_random", event.predicted_random, event.step
            yield "accepted", float(event.accepted), event.step
        case _:
            return


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
    """Return the run in a few lines of markdown: its rounds, and its result where there is one."""
    lines = [f"**{folder.id}**: {status}", ""]
    if folder.result.is_file():
        lines += _result_table(Result.model_validate_json(folder.result.read_bytes()))
    rounds = [event for event in read_events(folder.journal, 0)[0] if isinstance(event, RoundEnded)]
    if rounds:
        lines += ["| round | separation | tax, nats | random split | kept |", "|---|---|---|---|---|"]
        for event in rounds:
            kept = "yes" if event.accepted else "rolled back"
            lines.append(
                f"| {event.round} | {event.separation:.3f} | {event.tax:+.4f} | {event.tax_random:+.4f} | {kept} |"
            )
    return "\n".join(lines)


def _result_table(result: Result) -> list[str]:
    lines = [
        f"Test loss, nats per {result.unit}",
        "",
        "| category | dense twin | split | random split | tax | active |",
        "|---|---|---|---|---|---|",
    ]
    for category in result.categories:
        losses = " | ".join(f"{result.test_loss[arm][category]:.4f}" for arm in ("dense", "split", "random"))
        lines.append(
            f"| {category} | {losses} | {result.tax[category]:+.4f} | {result.active_fraction[category]:.1%} |"
        )
    return [*lines, ""]


def _key(*parts: str) -> str:
    return _safe("/".join(parts))


def _safe(key: str) -> str:
    """Replace what MLflow does not take in the name of a metric or parameter."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)[:_LONGEST_KEY]
