"""What a person sees while a run goes on, on a terminal and in a log."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_runs import fake_run, story, tell
from pydantic import TypeAdapter
from rich.console import Console

from moeify.events import Evaluated, Event, Failed, Finished, Mishap, Phase, RoundEnded, Started, Step
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from pipelines.cli import main
from pipelines.display import PlainDisplay, RunState, TerminalDisplay, choose_display, milestones

STARTED = Started(
    id="started",
    time=0.0,
    categories=("python", "prose"),
    unit="token",
    steps=600,
    parameters=473_000,
    sites={"layers.0.ffn": 384, "layers.1.ffn": 384},
    rounds=2,
)


def step(work: float, time: float, arm: Arm = "split", number: int = 150) -> Step:
    return Step(
        id=f"step/{work}/{arm}",
        time=time,
        arm=arm,
        round=1,
        step=number,
        work=work,
        loss={"python": 3.0, "prose": 4.0},
        learning_rate=1e-3,
        units_per_second=12_345.0,
    )


def ended(number: int = 1, accepted: bool = True) -> RoundEnded:
    return RoundEnded(
        id=f"round/{number}",
        time=9.0,
        round=number,
        step=300,
        separation=0.3,
        tax=0.0123,
        tax_by_category={"python": 0.01},
        tax_random=-0.0456,
        predicted=0.034,
        predicted_random=0.12,
        accepted=accepted,
        seconds=9.0,
        tree={"name": "core", "categories": ["a"], "units": 4, "children": []},
    )


def test_a_round_is_told_with_the_controls_that_it_has() -> None:
    (usual,) = milestones(ended())
    assert "tax +0.012 nats, random -0.046, J 0.034" in usual
    (told,) = milestones(ended().model_copy(update={"tax_random": None, "tax_told": 0.1}))
    assert "tax +0.012 nats, over told +0.100, J 0.034" in told


def phase(number: int, name: Any = "train", note: str = "") -> Phase:
    return Phase(id=f"{name}/{number}", time=1.0, phase=name, round=number, note=note)


RECIPE = RunConfig.model_validate(
    {
        "name": "told",
        "data": {"kind": "digits"},
        "model": {"kind": "autoencoder"},
        "training": {"steps": 600, "rows": 10},
        "rounds": [{"train": 100, "recover": 100, "separation": separation} for separation in (0.3, 0.4)],
        "controls": [],
    }
)


def plain(events: Sequence[Event], earlier: int = 0) -> list[str]:
    stream = io.StringIO()
    display = PlainDisplay(stream, earlier, RECIPE)
    for event in events:
        display.take([event])
    display.close()
    return stream.getvalue().splitlines()


def test_plain_lines_tell_plan_phases_rounds_and_the_end() -> None:
    assert plain(
        [
            STARTED,
            phase(0, "prepare"),
            phase(1, note="all arms"),
            ended(),
            ended(2, accepted=False),
            Evaluated(
                id="t", time=1.0, arm="dense", round=2, step=600, moment="test", split="test", loss={"a": 1.0, "b": 2.0}
            ),
            Finished(id="finished", time=9.0, seconds=3725.2),
            Failed(id="failed", time=9.0, reason="no data"),
        ]
    ) == [
        "2 categories (python, prose), 473,000 parameters, 768 units in 2 sites, 600 steps an arm",
        "prepare",
        "round 1/2 · train · all arms",
        "round 1 kept: separation 30.0%, tax +0.012 nats, random -0.046, J 0.034",
        "round 2 rolled back: separation 30.0%, tax +0.012 nats, random -0.046, J 0.034",
        "test loss of dense: 1.500 nats, mean over categories",
        "finished in 1:02:05",
        "failed: no data",
    ]


def test_steps_are_told_once_in_a_twentieth_of_the_work_and_at_the_end() -> None:
    steps = [step(count / 100, float(count), "dense", count) for count in range(1, 101)]
    lines = plain([STARTED, *steps])[1:]
    assert [line.split("%")[0].strip() for line in lines] == [str(percent) for percent in range(5, 101, 5)]
    assert lines[0] == "  5% · dense step 5/600 · loss 3.500 · 12.3k tokens/s · 20:50 left"


def test_what_earlier_attempts_did_is_one_line() -> None:
    before = [STARTED, phase(1), step(0.3, 1.0), ended(), phase(2)]
    later = [step(0.31, 100.0, "dense", 310), step(0.36, 105.0, "dense", 360)]
    lines = plain([*before, phase(2, "recover"), *later], earlier=5)
    assert lines == [
        "resumed: 1 of 2 rounds and 30% of the work were done before",
        "round 2/2 · recover",
        " 36% · dense step 360/600 · loss 3.500 · 12.3k tokens/s · 1:14 left",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_live_lines_fit_the_terminal(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None, markup=False, highlight=False)
    display = TerminalDisplay(console, config=RECIPE)
    display.take([STARTED, phase(1), step(0.1, 0.0), step(0.4, 30.0, number=180), ended(accepted=False)])
    rendered = io.StringIO()
    Console(file=rendered, width=width, force_terminal=True, color_system=None).print(display._render())
    display.close()
    display.close()
    where, bar = rendered.getvalue().splitlines()
    assert where.startswith("round 1/2 · train · split step 180/600 · loss 3.500 · 12.3k tokens/s")
    assert max(len(where), len(bar)) <= width
    assert re.search(r"40%  0:00 gone  \d+:\d\d left$", bar.rstrip())
    printed = stream.getvalue()
    assert "round 1 rolled back: separation 30.0%" in printed
    assert printed.rstrip().endswith("\x1b[2K")  # the live lines are gone


def test_a_terminal_catches_up_with_earlier_attempts_in_one_line() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    display = TerminalDisplay(console, earlier=3)
    display.take([STARTED, step(0.5, 1.0), ended()])
    display.close()
    assert "resumed: 1 of 2 rounds and 50% of the work were done before" in stream.getvalue()
    assert "kept" not in stream.getvalue()


def test_no_line_of_a_round_is_wider_than_80_columns() -> None:
    assert all(len(line) <= 80 for line in plain([ended(9), ended(9, accepted=False)]))


def test_the_display_fits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert choose_display(True, Terminal()) is None
    assert isinstance(choose_display(False, io.StringIO()), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose_display(False, Terminal()), PlainDisplay)
    monkeypatch.setenv("TERM", "xterm")
    live = choose_display(False, Terminal())
    assert isinstance(live, TerminalDisplay)
    live.close()


def test_after_the_end_the_live_line_says_what_is_waited_for() -> None:
    state = RunState()
    assert state.phase_line() == "starting workers"
    for event in (STARTED, phase(1), step(1.0, 30.0), Finished(id="finished", time=9.0, seconds=30.0)):
        state.take(event)
    assert state.phase_line() == "closing: workers stop, tracking catches up"
    assert state.step_line() == ""
    state.take(phase(1))
    assert state.phase_line() == "round 1/2 · train"


def test_numbers_that_went_wrong_are_told_with_how_the_run_went_on() -> None:
    event = Mishap(id="mishap/split/1", time=0.0, arm="split", round=1, step=8, what="step 9: x", done="it is skipped")
    assert list(milestones(event)) == ["split, step 9: x; it is skipped"]


def test_logs_as_json_are_the_events_of_the_journal(tmp_path: Path) -> None:
    events = story()
    tell(fake_run(tmp_path), events)
    said = CliRunner().invoke(main, ["logs", "last", "--json"], env={"MOEIFY_HOME": str(tmp_path)})
    assert said.exit_code == 0, said.output
    read: TypeAdapter[Event] = TypeAdapter(Event)
    assert [read.validate_json(line) for line in said.output.splitlines()] == events
