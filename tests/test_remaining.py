"""The time that is left, on the recorded course of a run of the recipe ``digits`` (processor time, one thread)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeify.events import Evaluated, Event, Finished, Phase, RoundEnded, Started, Step
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe
from pipelines.remaining import Remaining

TIMES = Path(__file__).parent / "data" / "digits_times.txt"
NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_recipe(Path(__file__).parents[1] / "pipelines" / "recipes" / "digits.yaml")


def course(begin: float = 0.0, slower: float = 1.0) -> Iterator[Event]:
    """Yield the events of the run as they came, each step of it so many times slower."""
    for number, line in enumerate(TIMES.read_text().splitlines()):
        when, kind, *rest = line.split()
        known: dict[str, Any] = {"id": str(number), "time": begin + slower * float(when)}
        match kind, rest:
            case "started", _:
                plan = {"unit": "example", "steps": 1000, "parameters": 1, "sites": {"hidden": 128}, "rounds": 3}
                yield Started(categories=NAMES, **plan, **known)
            case "phase", [phase, round_]:
                yield Phase(phase=phase, round=int(round_), **known)
            case "step", [arm, round_, step]:
                figures = {"work": 0.0, "loss": {}, "learning_rate": 0.0, "units_per_second": 0.0}
                yield Step(arm=arm, round=int(round_), step=int(step), **figures, **known)
            case "evaluated", [arm, round_, moment]:
                split = "test" if moment == "test" else "validation"
                yield Evaluated(arm=arm, round=int(round_), step=0, moment=moment, split=split, loss={}, **known)
            case "round", [round_, experts]:
                leaf = {"name": "x", "categories": [], "units": 1, "children": []}
                tree = {**leaf, "children": [leaf] * int(experts)}
                figures = {"step": 0, "separation": 0.3, "tax": 0.0, "tax_by_category": {}, "tax_random": None}
                more = {"predicted": 0.0, "predicted_random": None, "accepted": True, "seconds": 1.0, "tree": tree}
                yield RoundEnded(round=int(round_), **figures, **more, **known)
            case _:
                yield Finished(seconds=1.0, **known)


def told(config: RunConfig, events: list[Event]) -> list[tuple[Event, float]]:
    """Return every event from which on the time left was known, and the total that it makes with what is gone."""
    remaining, found = Remaining(config), []
    for event in events:
        remaining.take(event)
        if (left := remaining.seconds(event.time)) is not None:
            found.append((event, event.time - events[0].time + left))
    return found


@pytest.mark.parametrize("slower", [1.0, 50.0])
def test_the_first_estimate_is_a_fifth_off_at_most_and_comes_before_the_first_cut(
    config: RunConfig, slower: float
) -> None:
    events = list(course(1.7e9, slower))
    total = events[-1].time - events[0].time
    found = told(config, events)
    first, estimate = found[0]
    assert isinstance(first, Step)
    assert first.step <= 40
    assert estimate == pytest.approx(total, rel=0.2)
    assert all(each == pytest.approx(total, rel=0.2) for _, each in found)
    late = events[0].time + total / 2
    assert all(each == pytest.approx(total, rel=0.06) for event, each in found if event.time > late)


def test_cuts_judgements_and_the_closing_test_count(config: RunConfig) -> None:
    events = list(course())
    before = next(left for event, left in told(config, events) if isinstance(event, Step) and event.step == 140)
    more = {"attribution": {"rows": 800}, "evaluation": {"validation_rows": 640, "test_rows": 640, "null_draws": 19}}
    for section, settings in more.items():
        changed = {**config.model_dump(), section: {**config.model_dump()[section], **settings}}
        longer = told(RunConfig.model_validate(changed), events)
        after = next(left for event, left in longer if isinstance(event, Step) and event.step == 140)
        assert after > before + 1.0, section
    null = {**config.model_dump()["partition"], "null_test": {"permutations": 19}}
    longer = told(RunConfig.model_validate({**config.model_dump(), "partition": null}), events)
    assert next(left for event, left in longer if isinstance(event, Step) and event.step == 140) > before + 1.0


def test_the_time_goes_down_while_nothing_is_said_and_never_below_none(config: RunConfig) -> None:
    remaining = Remaining(config)
    for event in list(course())[:40]:
        remaining.take(event)
        last = event
    left = remaining.seconds(last.time)
    assert left is not None
    assert remaining.seconds(last.time + 2.0) == pytest.approx(left - 2.0)
    assert remaining.seconds(last.time + 1e6) == 0.0


def test_an_attempt_starts_with_a_pace_of_its_own(config: RunConfig) -> None:
    """The first half ran 50 times slower, on a day before."""
    slow, quick = list(course(0.0, 50.0)), list(course(1e6))
    half = len(slow) // 2
    resumed = Phase(id="resumed/x", time=quick[half].time, phase="prepare", round=0, note="going on from checkpoint x")
    remaining = Remaining(config)
    for event in [*slow[:half], resumed]:
        remaining.take(event)
    assert remaining.seconds(resumed.time) is None
    for event in quick[half : half + 20]:
        remaining.take(event)
    left = remaining.seconds(event.time)
    assert left == pytest.approx(quick[-1].time - event.time, rel=0.25)
