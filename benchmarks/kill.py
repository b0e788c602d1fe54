"""Kill a run anywhere: it must end with the same bits, and a damaged checkpoint must never pass for a good one.

Short runs of a shrunken digits recipe are SIGKILLed at moments drawn over the length of an undisturbed one, each a few
times, and started again with the same command until they end. Four things are killed: the driver of a run in one
process (``local``), the driver of a run on Ray (``driver``), a Ray Train worker (``worker``), and the MLflow server
that a run is tracked by, which is started again (``server``). A run is wrong unless it has the undisturbed run's

- weights and optimizer state of all arms in the last checkpoint (hashes), partitions and rounds;
- test losses and tree;
- journal: the same events, each once, every line whole;
- points in MLflow, each once;

and leaves no half checkpoint and no process behind. Then every file of a checkpoint is cut short, flipped, emptied and
removed in turn: that must be seen and told, the checkpoint before it used, and a run resumed from there must end with
the same bits.

The full benchmark kills more than a hundred times (``--kills N``) and takes about half an hour on two idle cores;
--quick kills a few times in one process.
"""

import hashlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.report import Figure, parser, report
from moeify.store import FolderStore
from pipelines.journal import read_events
from pipelines.runs import RunFolder

RECIPE = """name: kill
data: {{kind: digits}}
model: {{kind: autoencoder, hidden: 32, code: 4}}
training: {{steps: 120, rows: 20}}
attribution: {{rows: 16, rows_at_once: 20}}
partition: {{multiple: 2, min_units: 2}}
rounds:
  - {{train: 30, recover: 20, separation: 0.2}}
  - {{train: 15, recover: 20, separation: 0.3}}
evaluation: {{validation_rows: 16, test_rows: 16, rows_at_once: 20}}
checkpoints: {{every: 10, keep: 3}}
cluster: {{workers: {workers}, threads: 1, retries: 9}}
tracking: {{every: 5}}
"""
KILLS = 110
RAY_SHARE, SERVER_SHARE = 0.12, 0.04
"""Shares of the kills that hit a run on Ray (half of them its driver, half a worker), and MLflow's server."""
PER_RUN = 5
LONGEST = 900.0
"""Seconds of one attempt, before it counts as hung."""
MARK = "MOEIFY_BENCHMARK_KILL"
"""Environment variable that every process of the benchmark inherits."""

Target = Literal["local", "driver", "worker", "server"]


@dataclass
class Tally:
    """What was killed when, and what came out."""

    kills: Counter[tuple[Target, str]] = field(default_factory=Counter)
    """By target and the phase that the journal told last."""
    runs: Counter[Target] = field(default_factory=Counter)
    wrong: Counter[Target] = field(default_factory=Counter)


@dataclass(frozen=True)
class Outcome:
    """All that two runs of one recipe must share."""

    checkpoint: str
    result: str
    journal: tuple[str, ...]
    points: tuple[tuple[Any, ...], ...]


def main() -> None:
    """Kill, resume and compare; then damage and compare."""
    parsed = parser(__doc__)
    parsed.add_argument("--kills", type=int, metavar="N", help=f"at least so many ({KILLS}; 3 where quick)")
    parsed.add_argument("--seed", type=int, default=0, help="of the moments")
    parsed.add_argument("--only", choices=("local", "server", "ray"), help="what is killed; otherwise each its share")
    asked = parsed.parse_args()
    kills = asked.kills or (3 if asked.quick else KILLS)
    tally, draw = Tally(), random.Random(asked.seed)
    os.environ[MARK] = token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="mk-") as place:
        home = Path(place)
        _prepare(home)
        ray, server = (0, 0) if asked.quick else (round(kills * RAY_SHARE), max(1, round(kills * SERVER_SHARE)))
        if asked.only:
            ray, server = kills * (asked.only == "ray"), kills * (asked.only == "server")
        corruptions = missed = 0
        if asked.only != "ray":
            calm = _in_process(home)
            calm.check(1)
            calm.sync(1)
            length, wanted = calm.length(1), calm.outcome(1)
            _storm(calm, wanted, length, kills - ray - server, draw, tally, "local", first=10)
            if server:
                _storm_server(home, wanted, length, server, draw, tally)
            corruptions, missed = _corrupt(calm, wanted, draw, tally, quick=asked.quick)
        if ray:
            _storm_ray(home, ray, draw, tally)
        left_behind = _left_behind(token)
    rows: list[dict[str, str | int]] = [
        {"killed": target, "phase": phase, "kills": count} for (target, phase), count in sorted(tally.kills.items())
    ]
    outcomes: list[dict[str, str | int]] = [
        {"killed": target, "runs": count, "wrong": tally.wrong[target]} for target, count in tally.runs.items()
    ]
    figures = [
        Figure("kills", sum(tally.kills.values()), ">= 100 in full"),
        Figure("runs_wrong", sum(tally.wrong.values()), "0"),
        Figure("processes_left", left_behind, "0"),
        Figure("corruptions", corruptions, "every file, four ways and more"),
        Figure("corruptions_missed", missed, "0"),
    ]
    report("kill", [*rows, *outcomes], figures, asked.json, quick=asked.quick)


# --- runs -----------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """Runs of one recipe in one home, tracked by one MLflow; started in one of two ways."""

    home: Path
    recipe: Path
    start: Callable[[Sequence[str], Path], "ForkServerProcess | subprocess.Popen[bytes]"]
    database: Path
    """MLflow's."""
    local: bool = True

    def folder(self, number: int) -> RunFolder:
        """Return the folder of a run."""
        kind = 0 if self.local else 1
        return RunFolder(self.home / "runs" / f"kill-20260101-{kind:02d}{number // 60:02d}{number % 60:02d}-abcd")

    def attempt(self, number: int) -> "ForkServerProcess | subprocess.Popen[bytes]":
        """Start the run, or go on with it."""
        words = ["run", str(self.recipe), "--quiet", "--id", self.folder(number).id]
        return self.start([*words, *["--local"] * self.local], self.home / "told.txt")

    def check(self, number: int) -> None:
        """Let the run come to its end; raise where it does not."""
        if (code := _ended(self.attempt(number))) != 0:
            raise WrongError(f"exit code {code}: {_tail(self.home / 'told.txt')}")

    def length(self, number: int) -> float:
        """Return the seconds in which a finished run can be killed: from its first event to a while after its last."""
        events, _ = read_events(self.folder(number).journal, 0)
        return 1.3 * (events[-1].time - events[0].time) + 1.0

    def sync(self, number: int) -> None:
        """Deliver to MLflow what is left."""
        if (code := _ended(self.start(["sync", self.folder(number).id], self.home / "told.txt"))) != 0:
            raise WrongError(f"sync: exit code {code}: {_tail(self.home / 'told.txt')}")

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


def _prepare(home: Path) -> None:
    """Set the environment of all runs, and the process that runs fork from."""
    os.environ |= {
        "MOEIFY_HOME": str(home / "runs"),
        "MOEIFY_CACHE": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    for name, workers in (("local", 1), ("ray", 2)):
        (home / f"{name}.yaml").write_text(RECIPE.format(workers=workers), encoding="utf-8")
    loaded = ["torch", "mlflow", "matplotlib.pyplot", "sklearn.datasets", "moeify.loop", "moeify.tasks.build"]
    multiprocessing.set_forkserver_preload([*loaded, "pipelines.worker", "pipelines.launch", "pipelines.report.page"])


def _in_process(home: Path) -> Runs:
    return Runs(home, home / "local.yaml", _forked, home / "runs" / "mlflow.db")


def _forked(arguments: Sequence[str], told: Path) -> ForkServerProcess:
    """Start moeify in a fork of a process that has imported what it needs: dozens of starts cost no minute each."""
    process = multiprocessing.get_context("forkserver").Process(target=_moeify, args=(list(arguments), str(told)))
    process.start()
    return process


def _moeify(arguments: list[str], told: str) -> None:
    with Path(told).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from pipelines.cli import main as moeify

    moeify(arguments, prog_name="moeify")


def _spawned(arguments: Sequence[str], told: Path) -> "subprocess.Popen[bytes]":
    """Start moeify as a person does."""
    with told.open("w", encoding="utf-8") as file:
        return subprocess.Popen([sys.executable, "-m", "pipelines", *arguments], stdout=file, stderr=file)


def _alive(process: "ForkServerProcess | subprocess.Popen[bytes]") -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def _ended(process: "ForkServerProcess | subprocess.Popen[bytes]") -> int | None:
    """Wait for the end of an attempt; return its exit code."""
    deadline = time.monotonic() + LONGEST
    while _alive(process):
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
    """Return what MLflow's database has of a run: round, key, step, value; a point twice is there twice."""
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "select coalesce(r.value, ''), m.key, m.step, m.value, m.is_nan from metrics m "
            "join tags t on t.run_uuid = m.run_uuid and t.key = 'moeify.run' "
            "left join tags r on r.run_uuid = m.run_uuid and r.key = 'moeify.round' "
            "where t.value = ? and m.key not like '%_per_second%'",
            (run,),
        ).fetchall()
    connection.close()
    return tuple(sorted(found))


def _tail(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split())[-300:] if path.exists() else ""


# --- killing --------------------------------------------------------------------------------------------


def _storm(
    runs: Runs,
    wanted: Outcome,
    length: float,
    kills: int,
    draw: random.Random,
    tally: Tally,
    target: Target,
    first: int,
) -> None:
    """Kill drivers at random moments, ``PER_RUN`` times a run, until there were so many kills."""
    number = first
    while (left := kills - sum(n for (t, _), n in tally.kills.items() if t == target)) > 0:
        number += 1
        with _judged(runs, number, wanted, tally, target):
            for _ in range(min(PER_RUN, left)):
                began = time.monotonic()
                process = runs.attempt(number)
                _wait(process, draw.uniform(0.0, length))
                if not _alive(process):
                    length = min(length, time.monotonic() - began)  # the machine is less busy than it was
                    break
                process.kill()
                _ended(process)
                tally.kills[target, _phase(runs.folder(number))] += 1
            runs.check(number)


@contextmanager
def _judged(runs: Runs, number: int, wanted: Outcome, tally: Tally, target: Target) -> Iterator[None]:
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


def _wait(process: "ForkServerProcess | subprocess.Popen[bytes]", seconds: float) -> None:
    until = time.monotonic() + seconds
    while _alive(process) and time.monotonic() < until:
        time.sleep(0.005)


def _phase(folder: RunFolder) -> str:
    """Return the phase that a run's journal told last."""
    with suppress(OSError, ValueError):
        phases = [event.phase for event in read_events(folder.journal, 0)[0] if event.kind == "phase"]
        if folder.result.exists():
            return "closing"
        return phases[-1] if phases else "start"
    return "start"


def _storm_server(home: Path, wanted: Outcome, length: float, kills: int, draw: random.Random, tally: Tally) -> None:
    """Kill the MLflow server of a run, and start it again; once a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    os.environ |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    database = home / "server.db"
    runs = Runs(home, home / "local.yaml", _tracked(address), database)
    server = _server(database, address)
    try:
        for number in range(3000, 3000 + kills):
            with _judged(runs, number, wanted, tally, "server"):
                process = runs.attempt(number)
                _wait(process, draw.uniform(0.0, length))
                phase = _phase(runs.folder(number))
                _kill_tree(server)
                tally.kills["server", phase] += 1
                time.sleep(draw.uniform(0.0, 2.0))
                server = _server(database, address)
                if (code := _ended(process)) != 0:
                    raise WrongError(f"exit code {code}: {_tail(home / 'told.txt')}")
    finally:
        _kill_tree(server)
        del os.environ["MLFLOW_TRACKING_URI"]


def _tracked(address: str) -> Callable[[Sequence[str], Path], ForkServerProcess]:
    def start(arguments: Sequence[str], told: Path) -> ForkServerProcess:
        target, context = _moeify_tracked, multiprocessing.get_context("forkserver")
        process = context.Process(target=target, args=(address, list(arguments), str(told)))
        process.start()
        return process

    return start


def _moeify_tracked(address: str, arguments: list[str], told: str) -> None:
    os.environ |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    _moeify(arguments, told)


def _server(database: Path, address: str) -> "subprocess.Popen[bytes]":
    """Start MLflow's server and wait until it answers."""
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.parent / "files")]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    process = subprocess.Popen(command, env=environment, **quiet)  # type: ignore[call-overload]
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return process
        time.sleep(0.3)
    _kill_tree(process)
    raise SystemExit("MLflow's server does not answer")


def _kill_tree(process: "subprocess.Popen[bytes]") -> None:
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        for each in (psutil.Process(process.pid), *below):
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    process.wait()


def _storm_ray(home: Path, kills: int, draw: random.Random, tally: Tally) -> None:
    """Kill the drivers of runs on Ray, and their workers in turn; two kills a run."""
    runs = Runs(home, home / "ray.yaml", _spawned, home / "runs" / "mlflow.db", local=False)
    started = time.perf_counter()
    runs.check(0)
    length = time.perf_counter() - started
    runs.sync(0)
    wanted = runs.outcome(0)
    number, done = 0, 0
    while done < kills:
        number += 1
        target: Target = "worker" if number % 2 else "driver"
        with _judged(runs, number, wanted, tally, target):
            for _ in range(2):
                process = runs.attempt(number)
                _wait(process, draw.uniform(0.2, 0.95) * length)
                if not _alive(process):
                    break
                if target == "worker":
                    victims = _workers(process.pid)  # type: ignore[arg-type]
                    if victims:
                        phase = _phase(runs.folder(number))
                        draw.choice(victims).kill()
                        tally.kills[target, phase] += 1
                        done += 1
                    if (code := _ended(process)) != 0:
                        raise WrongError(f"exit code {code}: {_tail(home / 'told.txt')}")
                    break
                process.kill()
                _ended(process)
                tally.kills[target, _phase(runs.folder(number))] += 1
                done += 1
            runs.check(number)


def _workers(driver: int) -> list[psutil.Process]:
    """Return the train workers below a driver."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def _left_behind(token: str, seconds: float = 60.0) -> int:
    """Return how many processes of the runs outlive them by a minute."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        helpers = {child.pid for child in psutil.Process().children()}  # the process that runs fork from, and its kin
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = process.environ().get(MARK) == token
                if ours and process.pid not in helpers | {os.getpid()} and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        if not left or time.monotonic() > deadline:
            for process in left:
                print(f"left behind: {process.pid} {process.name()}", file=sys.stderr)
            return len(left)
        time.sleep(1.0)


# --- damage ---------------------------------------------------------------------------------------------


def _corrupt(runs: Runs, wanted: Outcome, draw: random.Random, tally: Tally, *, quick: bool) -> tuple[int, int]:
    """Damage every file of the newest checkpoint of a run that was stopped; return damages, and those that were missed.

    Some of them are resumed from, which counts as a run in ``tally``.
    """
    number = 1000
    process = runs.attempt(number)
    folder = runs.folder(number)
    while _alive(process) and len(_checkpoints(folder)) < 3:
        time.sleep(0.002)
    process.kill()
    _ended(process)
    names = _checkpoints(folder)
    newest, before = folder.checkpoints / names[-1], names[-2]
    count = missed = 0
    pristine = runs.home / "pristine"
    shutil.copytree(folder.path, pristine)
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for way, damage in _damages(content, draw, 8 if quick else 40):
            _write(path, damage)
            found = FolderStore(folder.path, keep=3).newest()
            count += 1
            if found is None or found.name != before or len(found.damaged) != 1 or path.name not in found.damaged[0]:
                missed += 1
                print(f"missed: {path.name}, {way}: {found}", file=sys.stderr)
        path.write_bytes(content)
    for place, (way, damage) in enumerate([("emptied", b""), ("removed", None)][: 1 if quick else 2]):
        shutil.rmtree(folder.path, ignore_errors=True)  # gone already where the run before it ended well
        shutil.copytree(pristine, folder.path)
        _write(newest / ("split.safetensors" if place and "split" in names[-1] else "dense.safetensors"), damage)
        with _judged(runs, number, wanted, tally, "local"):
            runs.check(number)
            notes = [event.note for event in read_events(folder.journal, 0)[0] if event.kind == "phase"]
            if not any(newest.name in note and f"going on from checkpoint {before}" in note for note in notes):
                raise WrongError(f"a checkpoint that was {way} is not told of in the journal")
    return count, missed


def _checkpoints(folder: RunFolder) -> list[str]:
    if not folder.checkpoints.is_dir():
        return []
    return sorted(path.name for path in folder.checkpoints.iterdir() if not path.name.startswith("."))


def _damages(content: bytes, draw: random.Random, places: int) -> Iterator[tuple[str, bytes | None]]:
    yield "emptied", b""
    yield "removed", None
    yield "longer by a byte", content + b"\0"
    for place in sorted(draw.sample(range(len(content)), min(places, len(content)))):
        yield f"cut at {place}", content[:place]
        yield (
            f"flipped at {place}",
            content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
        )


def _write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


if __name__ == "__main__":
    main()
