"""The journal: whole lines, each event once, delivered by followers that can fail as they like."""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.events import Event, Phase, Step, Tracker
from pipelines import journal
from pipelines.journal import JournalError, JournalTracker, follow, read_events


def phase(number: int, note: str = "") -> Phase:
    return Phase(id=f"phase/{number}", time=float(number), phase="train", round=number, note=note)


class Listener:
    """Keeps what it is handed, after an optional disturbance."""

    def __init__(self, disturb: Callable[[], None] = lambda: None, offset: int = 0) -> None:
        self.offset = offset
        self.events: list[Event] = []
        self.closed = False
        self.disturb = disturb

    def take(self, events: Sequence[Event]) -> None:
        self.disturb()
        self.events += events

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def test_events_come_back_as_they_went_in_even_where_a_loss_is_not_finite(path: Path) -> None:
    step = Step(
        id="s",
        time=1.5,
        arm="split",
        round=1,
        step=7,
        work=0.25,
        loss={"a": float("inf"), "b": 0.1 + 0.2},
        learning_rate=1e-3,
        units_per_second=3.0,
    )
    with JournalTracker(path) as tracker:
        port: Tracker = tracker
        port.emit(step)
        port.emit(phase(1, note="zwei\nZeilen — é\udcff"))
    events, end = read_events(path, 0)
    assert events[0] == step
    assert events[1] == phase(1, note="zwei\nZeilen — é?")
    assert end == path.stat().st_size


def test_an_event_is_kept_once_however_often_it_is_told_and_by_whom(path: Path) -> None:
    with JournalTracker(path) as tracker:
        tracker.emit(phase(1))
        tracker.emit(phase(1))
    with JournalTracker(path) as tracker:
        tracker.emit(phase(1))
        tracker.emit(phase(2))
    assert read_events(path, 0)[0] == [phase(1), phase(2)]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_kill_at_any_byte_loses_at_most_the_event_being_written(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        with JournalTracker(path) as tracker:
            for number in range(3):
                tracker.emit(phase(number))
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert read_events(path, 0)[0] == [phase(number) for number in range(kept)]
        assert path.stat().st_size == cut  # reading repairs nothing
        with JournalTracker(path) as tracker:
            for number in range(3):
                tracker.emit(phase(number))
        assert path.read_bytes() == whole


def test_a_line_that_is_no_event_is_named(path: Path) -> None:
    with JournalTracker(path) as tracker:
        for number in range(4):
            tracker.emit(phase(number))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\0\0\0\n", *lines[3:]]))
    with pytest.raises(JournalError, match=r"journal.jsonl, line 3 is not an event \(.*\); the file was changed"):
        read_events(path, len(lines[0]))
    with pytest.raises(JournalError, match="line 3"):
        JournalTracker(path)


def test_reading_goes_on_where_it_stopped(path: Path) -> None:
    assert read_events(path, 0) == ([], 0)
    with JournalTracker(path) as tracker:
        for number in range(5):
            tracker.emit(phase(number))
    first, offset = read_events(path, 0, most=2)
    rest, end = read_events(path, offset)
    assert first + rest == [phase(number) for number in range(5)]
    assert read_events(path, end) == ([], end)


def test_a_full_disk_is_raised_and_leaves_no_torn_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with JournalTracker(path) as tracker:
        tracker.emit(phase(1))
        write = os.write
        calls = iter(["part", "full"])

        def full(fd: int, data: bytes) -> int:
            if next(calls) == "part":
                return write(fd, data[:9])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                tracker.emit(phase(2))
        tracker.emit(phase(2))
    assert read_events(path, 0)[0] == [phase(1), phase(2)]


def test_followers_get_every_event_in_order_and_are_closed(path: Path) -> None:
    one, two = Listener(), Listener()
    with follow(path, [one, two], poll_seconds=0.01), JournalTracker(path) as tracker:
        for number in range(50):
            tracker.emit(phase(number))
    for listener in (one, two):
        assert listener.events == [phase(number) for number in range(50)]
        assert listener.closed
        assert listener.offset == path.stat().st_size


def test_a_follower_begins_at_its_own_offset(path: Path) -> None:
    with JournalTracker(path) as tracker:
        for number in range(5):
            tracker.emit(phase(number))
    late = Listener(offset=read_events(path, 0, most=3)[1])
    with follow(path, [late], poll_seconds=0.01):
        pass
    assert late.events == [phase(3), phase(4)]


def test_a_long_journal_is_handed_over_in_batches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BATCH", 10)
    sizes: list[int] = []

    class Counting(Listener):
        def take(self, events: Sequence[Event]) -> None:
            sizes.append(len(events))
            super().take(events)

    with JournalTracker(path) as tracker:
        for number in range(25):
            tracker.emit(phase(number))
    listener = Counting()
    with follow(path, [listener], poll_seconds=0.01):
        pass
    assert sizes == [10, 10, 5]
    assert listener.events == [phase(number) for number in range(25)]


def test_a_failing_follower_is_reported_once_and_loses_nothing(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failures = iter(range(3))

    def fail() -> None:
        if next(failures, None) is not None:
            raise ConnectionError("server\naway")

    listener, steady = Listener(fail), Listener()
    with follow(path, [listener, steady], poll_seconds=0.01), JournalTracker(path) as tracker:
        tracker.emit(phase(1))
        wait_until(lambda: bool(listener.events))
        tracker.emit(phase(2))
    assert listener.events == steady.events == [phase(1), phase(2)]
    assert capfd.readouterr().err == (
        "moeify: warning: Listener failed and will be tried again (ConnectionError: server away)\n"
    )


@pytest.mark.parametrize("gone", [OSError(9, "Bad file descriptor"), ValueError("I/O operation on closed file")])
def test_a_failing_follower_is_tried_again_though_nobody_is_left_to_be_told(
    gone: Exception, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(3))
    written: list[str] = []

    class Gone(io.StringIO):
        def write(self, line: str) -> int:
            written.append(line)
            raise gone

    def fail() -> None:
        if next(failures, None) is not None:
            raise ConnectionError

    monkeypatch.setattr(sys, "stderr", Gone())
    listener = Listener(fail)
    with follow(path, [listener], poll_seconds=0.01), JournalTracker(path) as tracker:
        tracker.emit(phase(1))
        wait_until(lambda: bool(listener.events))
    assert listener.events == [phase(1)]
    assert len(written) == 1


def test_a_follower_that_always_fails_is_given_up_after_the_run_and_never_stops_it(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ConnectionError("server away")

    listener = Listener(fail)
    with follow(path, [listener], poll_seconds=0.01), JournalTracker(path) as tracker:
        tracker.emit(phase(1))
    assert listener.closed
    assert listener.offset == 0
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == f"moeify: warning: Listener gave up (ConnectionError: server away); what it missed stays in {path}"


def test_a_slow_follower_holds_up_neither_the_run_nor_the_others(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stuck = threading.Event()
    slow, quick = Listener(lambda: void(stuck.wait(30))), Listener()
    began = time.monotonic()
    with follow(path, [slow, quick], poll_seconds=0.01, drain_seconds=0.2), JournalTracker(path) as tracker:
        tracker.emit(phase(1))
        wait_until(lambda: bool(quick.events))
    assert time.monotonic() - began < 10
    assert quick.closed
    assert not slow.closed
    assert "Listener is still busy 0.2 s after the run" in capfd.readouterr().err
    stuck.set()
    wait_until(lambda: slow.closed)


def test_an_error_of_the_run_passes_through_and_the_journal_is_still_delivered(path: Path) -> None:
    listener = Listener()

    def body() -> None:
        with follow(path, [listener], poll_seconds=0.01), JournalTracker(path) as tracker:
            tracker.emit(phase(1))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        body()
    assert listener.events == [phase(1)]
    assert listener.closed


def void(_: object) -> None:
    return None


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_journal_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = JournalTracker(path)
    with pytest.raises(JournalError, match="still written by a worker of an earlier attempt"):
        JournalTracker(path, wait_seconds=0.05)
    late = threading.Timer(0.2, first.close)
    late.start()
    with JournalTracker(path):
        assert not late.is_alive() or late.finished.is_set()
    late.join()
