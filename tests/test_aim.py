"""Kills are aimed: what a journal tells of a run says when it is in a phase, and each phase gets its kill."""

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aim
from benchmarks.aim import CLOSING, START, Aims, Length, phase_of, told
from benchmarks.killable import Tally
from moeify.events import Finished, Phase
from pipelines.journal import line_of
from pipelines.runs import RunFolder


class Attempt:
    """What is waited for, until it is over."""

    going = True

    def is_alive(self) -> bool:
        return self.going


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def tell(folder: RunFolder, phase: Any, when: float) -> None:
    with folder.journal.open("ab") as file:
        file.write(line_of(Phase(id=f"phase/{when}", time=when, phase=phase, round=0)))


def undisturbed(folder: RunFolder) -> Length:
    for when, phase in enumerate(["prepare", "train", "evaluate", "train"]):
        tell(folder, phase, when * (when + 1) / 2)
    with folder.journal.open("ab") as file:
        file.write(line_of(Finished(id="finished", time=8.0, seconds=8.0)))
    return Length.of(folder, start=0.5, closing=0.25)


def test_phases_are_as_long_as_their_longest_stretch_in_the_order_of_a_run(folder: RunFolder) -> None:
    length = undisturbed(folder)
    assert list(length.phases.items()) == [(START, 0.5), ("prepare", 1), ("train", 2), ("evaluate", 3), (CLOSING, 0.25)]
    assert length.whole == pytest.approx(1.3 * 8 + 1)


def test_a_run_is_in_the_phase_that_it_told_last_once_it_goes_on(folder: RunFolder) -> None:
    assert phase_of(folder, told(folder)) == START
    tell(folder, "train", 1)
    assert phase_of(folder, 0) == "train"
    since = told(folder)
    assert phase_of(folder, since) == START  # of another attempt, which has told nothing
    tell(folder, "evaluate", 2)
    assert phase_of(folder, since) == "evaluate"
    folder.result.write_text("{}")
    assert phase_of(folder, since) == CLOSING


def test_every_phase_is_aimed_at_until_it_was_hit_or_given_up(folder: RunFolder) -> None:
    tally = Tally()
    aims = Aims("worker", undisturbed(folder), tally, random.Random(0))
    assert aims.of_run(2) == [START, "prepare"]
    tally.kills["worker", "prepare"] += 1
    tally.kills["driver", START] += 1
    assert aims.left() == [START, "train", "evaluate", CLOSING]
    over = Attempt()
    over.going = False
    for _ in range(20):
        aims.wait(CLOSING, over, folder, 0)  # type: ignore[arg-type]
    assert aims.left() == [START, "train", "evaluate"]
    for phase in (START, "train", "evaluate"):
        tally.kills["worker", phase] += 1
    assert aims.of_run(2) == [None, None]
    assert tally.lacking() == {("worker", CLOSING)}
    assert tally.of("worker") == 4


def test_where_not_every_phase_is_asked_for_any_moment_will_do(folder: RunFolder) -> None:
    tally = Tally()
    assert Aims("local", undisturbed(folder), tally, random.Random(0), every=False).of_run(1) == [None]
    assert tally.lacking() == set()


def test_an_aim_waits_for_its_phase(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    length = undisturbed(folder)
    folder.journal.unlink()
    waited: list[float] = []
    monkeypatch.setattr(aim, "wait", lambda _, seconds: waited.append(seconds))
    aims = Aims("local", length, Tally(), random.Random(0))
    waiting = threading.Thread(target=aims.wait, args=("evaluate", Attempt(), folder, 0))
    waiting.start()
    for when, phase in enumerate(["prepare", "train"]):
        tell(folder, phase, when)
        time.sleep(0.05)
        assert not waited
    tell(folder, "evaluate", 2)
    waiting.join(timeout=30)
    assert len(waited) == 1
    assert 0 <= waited[0] <= length.phases["evaluate"]
