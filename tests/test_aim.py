"""Kills are aimed: what a journal tells of a run says when it is in a phase, and each phase gets its kill."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.aim import CLOSING, START, Aims, Length, outlived, past, phase_of, told
from benchmarks.killable import Tally
from moeify.events import Artifact, Finished, Phase
from pipelines.journal import line_of
from pipelines.runs import RunFolder


class Attempt:
    """What is waited for, until it is over."""

    going = True
    pid = os.getpid()

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


def test_a_resumed_run_is_prepared_until_it_tells_more(folder: RunFolder) -> None:
    tell(folder, "prepare", 0)
    tell(folder, "train", 1)
    since = told(folder)
    resumed = Phase(id="resumed/00000010/2.5", time=2.5, phase="prepare", round=0, note="going on")
    with folder.journal.open("ab") as file:
        file.write(line_of(resumed))
    assert phase_of(folder, since) == "prepare"
    with folder.journal.open("ab") as file:
        file.write(line_of(Artifact(id="artifact/page", time=3.0, path="page")))
    assert phase_of(folder, since) == "train"  # which it does not tell again


def test_what_outlived_workers_tell_is_not_of_the_next_attempt(folder: RunFolder) -> None:
    tell(folder, "train", 0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        ended = threading.Timer(0.2, lambda: (tell(folder, "evaluate", 1), worker.kill()))
        ended.start()
        since = outlived(Attempt(), [psutil.Process(worker.pid)], folder)  # type: ignore[arg-type]
        ended.join()
    assert since == told(folder)
    assert phase_of(folder, since) == START


def test_a_run_that_has_its_result_is_past_every_phase_though_not_past_killing(folder: RunFolder) -> None:
    assert not past("train", folder)
    folder.result.write_text("{}")
    assert past("train", folder)
    assert past(CLOSING, folder)
    assert not past(None, folder)


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


class Drawn(random.Random):
    """Draws the lower end, and keeps the upper."""

    def __init__(self) -> None:
        super().__init__(0)
        self.upper: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.upper.append(b)
        return a


def test_an_aim_waits_for_its_phase_and_is_repeated_earlier(folder: RunFolder) -> None:
    length, draw = undisturbed(folder), Drawn()
    folder.journal.unlink()
    aims = Aims("local", length, Tally(), draw)
    waiting = threading.Thread(target=aims.wait, args=("evaluate", Attempt(), folder, 0))
    waiting.start()
    for when, phase in enumerate(["prepare", "train"]):
        tell(folder, phase, when)
        time.sleep(0.05)
        assert waiting.is_alive()
    tell(folder, "evaluate", 2)
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    aims.wait("evaluate", Attempt(), folder, 0)  # type: ignore[arg-type]
    aims.wait(START, Attempt(), folder, 0)  # type: ignore[arg-type]
    aims.wait(None, Attempt(), folder, 0)  # type: ignore[arg-type]
    assert draw.upper == [length.phases["evaluate"], length.phases["evaluate"] / 2, length.phases[START], length.whole]
