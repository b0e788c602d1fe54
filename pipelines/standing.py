"""Where a run stands, in a few lines, and how the process that drives it is stopped."""

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from moeify.events import Event, Failed
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe
from pipelines.copies import refresh
from pipelines.display import JsonDisplay, PlainDisplay, RunState
from pipelines.journal import read_events
from pipelines.runs import RunFolder, Status, status
from pipelines.wording import clock, counted

_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.25
_REMOTE_POLL_SECONDS = 2.0


def standing(folder: RunFolder) -> dict[str, Any]:
    """Return run, status, where it is, the fraction 0..1 of the work that is done, the seconds that are left where that
    is known, and why it failed if it did."""
    events, state = _read(folder)
    now = status(folder)
    reason = events[-1].reason if events and isinstance(events[-1], Failed) and now == "failed" else None
    return {
        "run": folder.id,
        "status": now,
        "work": 1.0 if now == "finished" else state.work,
        "where": state.phase_line() if now == "running" else "",
        "step": state.step_line() if now == "running" else "",
        "left": state.seconds_left(time.time()) if now == "running" else None,
        "rounds": state.rounds,
        "reason": reason,
        "folder": folder.address,
    }


def last_heard(folder: RunFolder) -> str:
    """Return where the run was when its journal ends; empty where it has told nothing."""
    events, state = _read(folder)
    return " · ".join(filter(None, (state.phase_line(), state.step_line()))) if events else ""


def _read(folder: RunFolder) -> tuple[list[Event], RunState]:
    events, _ = read_events(folder.journal, 0)
    state = RunState(recipe_of(folder))
    for event in events:
        state.take(event)
    return events, state


def recipe_of(folder: RunFolder) -> RunConfig | None:
    """Return the recipe that a run goes by; None where it cannot be read, as from another version."""
    with suppress(ValueError, OSError):
        return load_recipe(folder.resolved)
    return None


def lines(stands: dict[str, Any]) -> list[str]:
    """Return the same for people."""
    rounds = counted(stands["rounds"], "round")
    told = [f"{stands['run']} · {stands['status']} · {stands['work']:.0%} of the work · {rounds} done"]
    doing = " · ".join(filter(None, (stands["where"], stands["step"])))
    told += [f"now:     {doing}"] * bool(doing)
    told += [f"left:    {clock(left)}" for left in [stands.get("left")] if left is not None]
    told += [f"reason:  {stands['reason']}"] * bool(stands["reason"])
    return [*told, *[f"files:   {stands['folder']}"] * bool(stands["folder"])]


def tell(folder: RunFolder, display: PlainDisplay | JsonDisplay, *, follow: bool) -> None:
    """Tell a run's journal; with ``follow`` until nobody drives the run any more."""
    while True:
        driven = follow and status(folder) == "running"  # before reading: what was written until then is told
        refresh([folder] if follow else [])
        events, display.offset = read_events(folder.journal, display.offset)
        display.take(events)
        if not driven:
            return
        time.sleep(_REMOTE_POLL_SECONDS if folder.remote else _POLL_SECONDS)


def stop(folder: RunFolder) -> Status:
    """Ask the process that drives the run to end, with a checkpoint where there is time (``stopping``), and wait.

    Return where the run stands then: it may have finished meanwhile.

    Raises:
        ValueError: nobody drives it, or a process that is not on this machine.
        OSError: it does not end.
    """
    if (now := status(folder)) != "running":
        raise ValueError(f"run {folder.id} is {now}, so there is nothing to stop")
    pid, where = _driver(folder)
    if pid is None:
        raise ValueError(f"run {folder.id} is driven {where}; stop it there, or give --address")
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while (now := status(folder)) == "running":
        if time.monotonic() > deadline:
            raise OSError(f"process {pid}, which drives {folder.id}, has not ended in {_STOP_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)
    return now


def _driver(folder: RunFolder) -> tuple[int | None, str]:
    """Return the process that drives the run, where it is one of this machine that has the run's lock open."""
    try:
        known = json.loads(folder.driver.read_text(encoding="utf-8"))
        host, pid = str(known["host"]), int(known["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, "by a process that did not say which"
    with suppress(psutil.Error):
        if host == socket.gethostname() and _has_open(psutil.Process(pid), folder.lock):
            return pid, ""
    return None, f"by process {pid} on {host}"


def _has_open(process: psutil.Process, path: Path) -> bool:
    return any(Path(file.path) == path.resolve() for file in process.open_files())
