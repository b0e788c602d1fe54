"""Short runs that may be killed at any moment: how they are started, and all that must come out of them alike."""

import hashlib
import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import psutil

from moeify.store import FolderStore
from pipelines.journal import read_events
from pipelines.runs import RunFolder

RECIPE = """name: kill
data: {{kind: digits}}
model: {{kind: autoencoder, hidden: 32, code: 4}}
training: {{steps: {steps}, rows: 20}}
attribution: {{rows: 16, rows_at_once: 20}}
partition: {{multiple: 2, min_units: 2}}
rounds:
  - {{train: 30, recover: 20, separation: 0.2}}
  - {{train: {train}, recover: 20, separation: 0.3}}
evaluation: {{validation_rows: 16, test_rows: 16, rows_at_once: 20}}
checkpoints: {{every: 10, keep: 3}}
cluster: {{workers: {workers}, threads: 1, retries: 9}}
tracking: {{every: 5}}
"""
_SHORT, _LONG = {"steps": 120, "train": 15}, {"steps": 370, "train": 150}
"""Steps of the whole and of the second round's training: in one process, and on Ray, where the workers of a killed
driver go on for two or three seconds. They would end a run that is as short as the others, which none would resume."""
LONGEST = 900.0
"""Seconds of one attempt, before it counts as hung."""

Target = Literal["local", "driver", "worker", "node", "server"]


@dataclass
class Tally:
    """What was killed when, and what came out."""

    kills: Counter[tuple[Target, str]] = field(default_factory=Counter)
    """By target and the phase that the journal told last."""
    runs: Counter[Target] = field(default_factory=Counter)
    wrong: Counter[Target] = field(default_factory=Counter)
    asked: set[tuple[Target, str]] = field(default_factory=set)
    """Targets and phases that there has to be a kill of."""

    def of(self, target: Target) -> int:
        """Return the kills of a target."""
        return sum(count for (each, _), count in self.kills.items() if each == target)

    def lacking(self) -> set[tuple[Target, str]]:
        """Return the targets and phases that have no kill, and have to."""
        return {each for each in self.asked if not self.kills[each]}


@dataclass(frozen=True)
class Outcome:
    """All that two runs of one recipe must share."""

    checkpoint: str
    result: str
    journal: tuple[str, ...]
    points: tuple[tuple[Any, ...], ...]


Attempt = ForkServerProcess | subprocess.Popen[bytes]


@dataclass
class Runs:
    """Runs of one recipe in one home, tracked by one MLflow; started in one of two ways."""

    home: Path
    recipe: Path
    start: Callable[[Sequence[str], Path], Attempt]
    database: Path
    """MLflow's."""
    local: bool = True

    def folder(self, number: int) -> RunFolder:
        """Return the folder of a run."""
        kind = 0 if self.local else 1
        return RunFolder(self.home / "runs" / f"kill-20260101-{kind:02d}{number // 60:02d}{number % 60:02d}-abcd")

    def attempt(self, number: int) -> Attempt:
        """Start the run, or go on with it."""
        words = ["run", str(self.recipe), "--quiet", "--id", self.folder(number).id]
        return self.start([*words, *["--local"] * self.local], self.home / "told.txt")

    def check(self, number: int) -> None:
        """Let the run come to its end; raise where it does not."""
        if (code := ended(self.attempt(number))) != 0:
            raise WrongError(f"exit code {code}: {tail(self.home / 'told.txt')}")

    def sync(self, number: int) -> None:
        """Deliver to MLflow what is left."""
        if (code := ended(self.start(["sync", self.folder(number).id], self.home / "told.txt"))) != 0:
            raise WrongError(f"sync: exit code {code}: {tail(self.home / 'told.txt')}")

    def outcome(self, number: int) -> Outcome:
        """Return what came out of a finished run; raise where there are leftovers."""
        folder = self.folder(number)
        if hidden := [path.name for path in folder.checkpoints.iterdir() if path.name.startswith(".")]:
            raise WrongError(f"half checkpoints are left: {hidden}")
        store = FolderStore(folder.path, keep=3)
        found = store.newest()
        if found is None or found.damaged:
            raise WrongError(f"the last checkpoint is not whole: {found}")
        kept = json.loads((folder.checkpoints / found.name / "manifest.json").read_text(encoding="utf-8"))["body"]
        result = json.loads(folder.result.read_text(encoding="utf-8"))
        events, end = read_events(folder.journal, 0)
        if end != folder.journal.stat().st_size:
            raise WrongError("the journal ends in half a line")
        ids = [event.id for event in events]
        if twice := [id_ for id_, count in Counter(ids).items() if count > 1]:
            raise WrongError(f"events stand twice in the journal: {twice[:3]}")
        lasting = sorted(id_ for id_ in ids if not id_.startswith(("resumed/", "failed/")))
        return Outcome(_hash(kept), _hash(result), tuple(lasting), _points(self.database, folder.id))


class WrongError(Exception):
    """A run did not end as it should; one line."""


def prepare(home: Path) -> None:
    """Set the environment of all runs, and the process that runs fork from."""
    os.environ |= {
        "MOEIFY_HOME": str(home / "runs"),
        "MOEIFY_CACHE": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    for name, workers, steps in (("local", 1, _SHORT), ("ray", 2, _LONG)):
        (home / f"{name}.yaml").write_text(RECIPE.format(workers=workers, **steps), encoding="utf-8")
    loaded = ["torch", "mlflow", "matplotlib.pyplot", "sklearn.datasets", "moeify.loop", "moeify.tasks.build"]
    multiprocessing.set_forkserver_preload([*loaded, "pipelines.worker", "pipelines.launch", "pipelines.report.page"])


def in_process(home: Path) -> Runs:
    """Return runs of one process each."""
    return Runs(home, home / "local.yaml", forked, home / "runs" / "mlflow.db")


def forked(arguments: Sequence[str], told: Path) -> ForkServerProcess:
    """Start moeify in a fork of a process that has imported what it needs: dozens of starts cost no minute each."""
    process = multiprocessing.get_context("forkserver").Process(target=moeify_in, args=(list(arguments), str(told)))
    process.start()
    return process


def moeify_in(arguments: list[str], told: str) -> None:
    """Be moeify, in a process of its own that says what it has to say to a file."""
    with Path(told).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pipelines.cli import main as moeify

    moeify(arguments, prog_name="moeify")


def spawned(arguments: Sequence[str], told: Path) -> "subprocess.Popen[bytes]":
    """Start moeify as a person does."""
    with told.open("w", encoding="utf-8") as file:
        return subprocess.Popen([sys.executable, "-m", "pipelines", *arguments], stdout=file, stderr=file)


def alive(process: Attempt) -> bool:
    """Say whether an attempt goes on."""
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def workers_below(pid: int | None) -> list[psutil.Process]:
    """Return the train workers below a process."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def any_left(processes: Sequence[psutil.Process]) -> bool:
    """Say whether any of these processes still runs; one that nobody has waited for does not."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def ended(process: Attempt) -> int | None:
    """Wait for the end of an attempt; return its exit code."""
    deadline = time.monotonic() + LONGEST
    while alive(process):
        if time.monotonic() > deadline:
            process.kill()
            raise WrongError(f"no end within {LONGEST:g} s")
        time.sleep(0.02)
    return process.returncode if isinstance(process, subprocess.Popen) else process.exitcode


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(_timeless(data), sort_keys=True).encode()).hexdigest()


def _timeless(data: Any) -> Any:
    """Return plain data without what two runs cannot share: times."""
    if isinstance(data, dict):
        return {key: _timeless(value) for key, value in data.items() if key not in ("time", "seconds")}
    return [_timeless(item) for item in data] if isinstance(data, list) else data


def _points(database: Path, run: str) -> tuple[tuple[Any, ...], ...]:
    """Return what MLflow's database has of a run: round, key, step, value; a point twice is there twice.

    What MLflow samples of the machine every ten seconds is left out: two runs share none of that.
    """
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "select coalesce(r.value, ''), m.key, m.step, m.value, m.is_nan from metrics m "
            "join tags t on t.run_uuid = m.run_uuid and t.key = 'moeify.run' "
            "left join tags r on r.run_uuid = m.run_uuid and r.key = 'moeify.round' "
            "where t.value = ? and m.key not like '%_per_second%' and m.key not like 'system/%'",
            (run,),
        ).fetchall()
    connection.close()
    return tuple(sorted(found))


def tail(path: Path) -> str:
    """Return the end of what was said to a file, in one line."""
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split())[-300:] if path.exists() else ""


@contextmanager
def judged(runs: Runs, number: int, wanted: Outcome, tally: Tally, target: Target) -> Iterator[None]:
    """Count a run, and whether it ended as it should."""
    tally.runs[target] += 1
    try:
        yield
        runs.sync(number)
        got = runs.outcome(number)
        for part in ("checkpoint", "result", "journal", "points"):
            if getattr(got, part) != getattr(wanted, part):
                raise WrongError(f"{part} differs{_difference(getattr(got, part), getattr(wanted, part))}")
    except (WrongError, OSError, ValueError) as error:
        tally.wrong[target] += 1
        print(f"{target} {runs.folder(number).id}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(runs.folder(number).path, ignore_errors=True)
    print(
        f"{target}: {sum(tally.kills.values())} kills, {sum(tally.wrong.values())} wrong", file=sys.stderr, flush=True
    )


def _difference(got: Any, wanted: Any) -> str:
    if isinstance(got, str):
        return ""
    more, less = Counter(got) - Counter(wanted), Counter(wanted) - Counter(got)
    return f": {len(more)} more ({next(iter(more), '')}), {len(less)} fewer ({next(iter(less), '')})"
