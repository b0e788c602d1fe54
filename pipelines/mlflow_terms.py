"""A run in MLflow's terms: points of curves, parameters, a summary in markdown. Pure; knows no server.

Losses are ``train/<arm>/<category>``, ``validation/...`` and ``test/...`` in nats per unit, at the optimizer step they
were measured, with ``mean`` over categories beside them; ``tax/...`` is of the rounds, on validation data, and
``test/tax/...`` of the end, ``tax_told`` above the told twin where there is one. At a cut ``validation`` has two points
at one step, before and after: the curve drops or jumps there. MLflow makes a section of charts of what comes before a
key's last slash.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from moeify.events import Evaluated, Event, Mishap, RoundEnded, Step
from moeify.recipe.arms import Arm
from moeify.result import MEAN, Result
from pipelines.journal import read_events
from pipelines.runs import RunFolder
from pipelines.wording import nats, percent, two_digits

_LONGEST_PARAM = 6000
_LONGEST_KEY = 250
"""Characters that MLflow takes."""

_ARM_WORDS: dict[Arm, str] = {
    "dense": "dense twin",
    "told": "told twin",
    "split": "split",
    "random": "random split",
}
_TAX_WORDS = {"tax": "tax", "tax_random": "random split's tax", "tax_told": "above the told twin"}

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
            if event.tax_error is not None:
                yield "tax_error/mean", event.tax_error, event.step
            for category, tax in event.tax_by_category.items():
                yield _key("tax", category), tax, event.step
            for category, error in event.tax_error_by_category.items():
                yield _key("tax_error", category), error, event.step
            if event.expected is not None:
                yield "tax_expected/mean", event.expected, event.step
            if event.budget_used is not None:
                yield "budget_used", event.budget_used, event.step
            if event.budget_error is not None:
                yield "budget_used/error", event.budget_error, event.step
            if event.tax_random is not None:
                yield "tax_random/mean", event.tax_random, event.step
            if event.tax_told is not None:
                yield "tax_told/mean", event.tax_told, event.step
            if not event.uncut:
                yield "predicted_J/split", event.predicted, event.step
            if event.predicted_random is not None:
                yield "predicted_J/random", event.predicted_random, event.step
            yield "accepted", float(event.accepted), event.step
        case _:
            return


def final_points(result: Result) -> Iterable[Point]:
    """Yield what a result adds to its losses: tax on test data, accuracy, what share of units and operations runs."""
    if result.tax_error is not None:
        yield _key("test/tax_error", MEAN), result.tax_error, result.steps
    for category in (*result.categories, MEAN):
        for name, tax in _taxes(result):
            yield _key("test", name, category), tax[category], result.steps
        yield _key("test/active_fraction", category), result.active_fraction[category], result.steps
        if result.active_flops is not None:
            yield _key("test/active_flops", category), result.active_flops[category], result.steps
        for arm, shares in (result.accuracy or {}).items():
            yield _key("test/accuracy", arm, category), shares[category], result.steps


def loss_points(result: Result) -> Iterable[Point]:
    """Yield a result's losses on test data, which a run tells as they are measured."""
    for arm, loss in result.test_loss.items():
        for category, each in loss.items():
            yield _key("test", arm, category), each, result.steps


def _taxes(result: Result) -> Iterable[tuple[str, dict[str, float]]]:
    """Yield the name and the figures of every tax that the run's controls give."""
    yield "tax", result.tax
    if result.tax_random is not None:
        yield "tax_random", result.tax_random
    if result.tax_told is not None:
        yield "tax_told", result.tax_told


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
        result = Result.model_validate_json(folder.result.read_bytes())
        lines += [f"Stopped: {result.stopped}.", ""] if result.stopped else []
        lines += _result_table(result)
    if rounds:
        lines += _rounds_table(rounds)
    if mishaps := [event for event in events if isinstance(event, Mishap)]:
        told = [f"- {event.arm}, {event.what}; {event.done}" for event in mishaps]
        lines += ["**Numbers that went wrong**, and how the run went on", "", *told, ""]
    kept = [event.tree for event in rounds if event.accepted]
    if kept:
        lines += ["**Expert tree**, units", "", "```text", *_tree_lines(kept[-1]), "```"]
    return "\n".join(lines)


def _rounds_table(rounds: Sequence[RoundEnded]) -> list[str]:
    random = any(event.tax_random is not None for event in rounds)
    told = any(event.tax_told is not None for event in rounds)
    heads = ["round", "separation", "tax"]
    heads += ["random split's tax"] * random + ["above the told twin"] * told + ["J"] + ["random split's J"] * random
    lines = [
        "**Rounds**, validation, nats; tax: above the dense twin after recovery; J: predicted from the cut alone",
        "",
        _row([*heads, "outcome"]),
        f"|---|{'--:|' * (len(heads) - 1)}---|",
    ]
    for event in rounds:
        cells = [str(event.round), percent(event.separation), nats(event.tax, signed=True)]
        cells += [nats(event.tax_random, signed=True)] * random + [nats(event.tax_told, signed=True)] * told
        cells += [two_digits(event.predicted)] + [two_digits(event.predicted_random)] * random
        lines.append(_row([*cells, event.outcome]))
    return [*lines, ""]


def _result_table(result: Result) -> list[str]:
    taxes = dict(_taxes(result))
    heads = [*(_ARM_WORDS[arm] for arm in result.test_loss), *(_TAX_WORDS[name] for name in taxes)]
    lines = [
        f"**Test loss**, nats per {result.unit}; tax: above the dense twin; active: share of the units that run",
        "",
        _row(["category", *heads, "active"]),
        f"|---|{'--:|' * (len(heads) + 1)}",
    ]
    for category in (*result.categories, MEAN):
        losses = (dict(_with_mean(loss))[category] for loss in result.test_loss.values())
        cells = [
            category,
            *(nats(loss) for loss in losses),
            *(nats(tax[category], signed=True) for tax in taxes.values()),
            percent(result.active_fraction[category]),
        ]
        lines.append(_row(cells))
    return [*lines, ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tree_lines(node: dict[str, Any], depth: int = 0) -> Iterable[str]:
    yield f"{'  ' * depth}{node['name']}: {node['units']:,}"
    for child in node["children"]:
        yield from _tree_lines(child, depth + 1)


def _key(*parts: str) -> str:
    return _safe("/".join(parts))


def _safe(key: str) -> str:
    """Replace what MLflow does not take in the name of a metric or parameter."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)[:_LONGEST_KEY]
