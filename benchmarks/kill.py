"""Kill a run anywhere: it must end with the same bits, and a damaged checkpoint must never pass for a good one.

Short runs of a shrunken digits recipe are SIGKILLed, each a few times, and started again with the same command until
they end: at a random moment of every phase first, and then at moments drawn over a run's whole length. Five things are
killed: the driver of a run in one process (``local``), the driver of a run on Ray (``driver``), a Ray Train worker
(``worker``), a whole node of a Ray cluster with all that runs on it (``node``; another one joins, and the run must go
on by itself), and the MLflow server that a run is tracked by, which is started again (``server``). A run is wrong
unless it has the undisturbed run's

- weights and optimizer state of all arms in the last checkpoint (hashes), partitions and rounds;
- test losses and tree;
- journal: the same events, each once, every line whole;
- points in MLflow, each once;

and leaves no half checkpoint and no process behind. Then every file of a checkpoint is cut short, flipped, emptied and
removed in turn: that must be seen and told, the checkpoint before it used, and a run resumed from there must end with
the same bits.

The full benchmark kills more than a hundred times (``--kills N``) and takes about an hour on two idle cores;
--quick kills a few times in one process, at any moment; with --only what is named there.
"""

import multiprocessing
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from benchmarks.aim import Aims, Length, outlived, past, phase_of, wait
from benchmarks.damage import damage
from benchmarks.killable import (
    LONGEST,
    Attempt,
    Outcome,
    Runs,
    Tally,
    WrongError,
    alive,
    ended,
    in_process,
    judged,
    moeify_in,
    prepare,
    spawned,
    tail,
    workers_below,
)
from benchmarks.killed_nodes import storm_nodes
from benchmarks.report import Figure, parser, report

KILLS = 110
RAY_SHARE, NODE_SHARE, SERVER_SHARE = 0.12, 0.04, 0.04
"""Shares of the kills that hit a run on Ray (half of them its driver, half a worker), a node, and MLflow's server."""
PER_RUN = 5
"""Kills of one run's drivers, ..."""
WORKERS_PER_RUN = 3
"""... and of its workers, at most."""
MARK = "MOEIFY_BENCHMARK_KILL"
"""Environment variable that every process of the benchmark inherits."""


def main() -> None:
    """Kill, resume and compare; then damage and compare."""
    parsed = parser(__doc__)
    parsed.add_argument("--kills", type=int, metavar="N", help=f"at least so many ({KILLS}; 3 where quick)")
    parsed.add_argument("--seed", type=int, default=0, help="of the moments")
    parsed.add_argument(
        "--only", choices=("local", "server", "ray", "node"), help="what is killed; otherwise each its share"
    )
    asked = parsed.parse_args()
    kills = asked.kills or (3 if asked.quick else KILLS)
    tally, draw = Tally(), random.Random(asked.seed)
    os.environ[MARK] = token = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="mk-") as place:
        home = Path(place)
        prepare(home)
        shares = {"ray": RAY_SHARE, "node": NODE_SHARE, "server": SERVER_SHARE}
        wanted_of = {kind: 0 if asked.quick else max(1, round(kills * share)) for kind, share in shares.items()}
        if asked.only:
            wanted_of = {kind: kills * (asked.only == kind) for kind in shares}
        ray, node, server = wanted_of.values()
        every = not asked.quick
        corruptions = missed = 0
        if asked.only not in ("ray", "node"):
            calm = in_process(home)
            calm.check(1)
            calm.sync(1)
            wanted, length = calm.outcome(1), Length.of(calm.folder(1), start=0.3, closing=1.5)
            if local := kills - ray - node - server:
                _storm(calm, wanted, local, Aims("local", length, tally, draw, every), first=10)
            if server:
                _storm_server(home, wanted, server, Aims("server", length, tally, draw, every))
            corruptions, missed = damage(calm, wanted, draw, tally, quick=asked.quick)
        if ray:
            _storm_ray(home, ray, draw, tally, every=every)
        if node:
            storm_nodes(home, node, draw, tally, every=every)
        left_behind = _left_behind(token)
    for target, phase in sorted(tally.lacking()):
        print(f"no kill of {target} in {phase}", file=sys.stderr)
    rows: list[dict[str, str | int]] = [
        {"killed": target, "phase": phase, "kills": count} for (target, phase), count in sorted(tally.kills.items())
    ]
    outcomes: list[dict[str, str | int]] = [
        {"killed": target, "runs": count, "wrong": tally.wrong[target]} for target, count in tally.runs.items()
    ]
    figures = [
        Figure("kills", sum(tally.kills.values()), ">= 100 in full"),
        Figure("runs_wrong", sum(tally.wrong.values()), "0"),
        Figure("phases_without_a_kill", len(tally.lacking()), "0; not asked where quick"),
        Figure("processes_left", left_behind, "0"),
        Figure("corruptions", corruptions, "every file, four ways and more"),
        Figure("corruptions_missed", missed, "0"),
    ]
    report("kill", [*rows, *outcomes], figures, asked.json, quick=asked.quick)


# --- killing --------------------------------------------------------------------------------------------


def _storm(runs: Runs, wanted: Outcome, kills: int, aims: Aims, first: int) -> None:
    """Kill drivers, ``PER_RUN`` times a run, until there were so many kills and one in each phase."""
    number = first
    while (left := max(kills - aims.tally.of(aims.target), len(aims.left()))) > 0:
        number += 1
        with judged(runs, number, wanted, aims.tally, aims.target):
            folder, process, workers = runs.folder(number), runs.attempt(number), list[psutil.Process]()
            for phase in aims.of_run(min(PER_RUN, left)):
                since = outlived(process, workers, folder)
                if past(phase, folder):
                    break
                workers = aims.wait(phase, process, folder, since)
                now = phase_of(folder, since)
                if not alive(process):
                    break
                process.kill()
                ended(process)
                aims.tally.kills[aims.target, now] += 1
                process = runs.attempt(number)
            if (code := ended(process)) != 0:
                raise WrongError(f"exit code {code}: {tail(runs.home / 'told.txt')}")


def _storm_server(home: Path, wanted: Outcome, kills: int, aims: Aims) -> None:
    """Kill the MLflow server of a run, and start it again; once a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    os.environ |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    database = home / "server.db"
    runs = Runs(home, home / "local.yaml", _tracked(address), database)
    server, number = _server(database, address), 3000
    try:
        while aims.tally.of("server") < kills or aims.left():
            with judged(runs, number, wanted, aims.tally, "server"):
                process = runs.attempt(number)
                aims.wait(aims.of_run(1)[0], process, runs.folder(number), 0)
                phase, needed = phase_of(runs.folder(number), 0), alive(process)
                _kill_tree(server)
                aims.tally.kills["server", phase] += needed
                time.sleep(aims.draw.uniform(0.0, 2.0))
                server = _server(database, address)
                if (code := ended(process)) != 0:
                    raise WrongError(f"exit code {code}: {tail(home / 'told.txt')}")
            number += 1
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
    moeify_in(arguments, told)


def _server(database: Path, address: str) -> subprocess.Popen[bytes]:
    """Start MLflow's server and wait until it answers."""
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(database.parent / "files")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return process
        time.sleep(0.3)
    _kill_tree(process)
    raise SystemExit("MLflow's server does not answer")


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        for each in (psutil.Process(process.pid), *below):
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    process.wait()


def _storm_ray(home: Path, kills: int, draw: random.Random, tally: Tally, *, every: bool) -> None:
    """Kill the drivers of runs on Ray, each a few times a run; then workers, while the runs' drivers go on."""
    runs = Runs(home, home / "ray.yaml", spawned, home / "runs" / "mlflow.db", local=False)
    runs.check(0)
    runs.sync(0)
    wanted = runs.outcome(0)
    drivers = Aims("driver", Length.of(runs.folder(0), start=10.0, closing=1.5), tally, draw, every)
    _storm(runs, wanted, kills // 2, drivers, first=0)
    workers = Aims("worker", Length.of(runs.folder(0), start=2.0, closing=0.4), tally, draw, every)
    number = 500
    while tally.of("worker") < kills - kills // 2 or workers.left():
        number += 1
        with judged(runs, number, wanted, tally, "worker"):
            process, since = runs.attempt(number), 0
            for phase in workers.of_run(WORKERS_PER_RUN):
                wait(process, LONGEST, partial(_has_workers, process))
                victims = workers.wait(phase, process, runs.folder(number), since)
                now = phase_of(runs.folder(number), since)
                if not alive(process) or not victims:
                    break
                with suppress(psutil.NoSuchProcess):
                    draw.choice(victims).kill()
                    tally.kills["worker", now] += 1
                since = outlived(process, victims, runs.folder(number))
            if (code := ended(process)) != 0:
                raise WrongError(f"exit code {code}: {tail(home / 'told.txt')}")


def _has_workers(process: Attempt) -> bool:
    return bool(workers_below(process.pid))


def _left_behind(token: str, seconds: float = 60.0) -> int:
    """Return how many processes of the runs outlive them by a minute."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        forks = {child.pid for child in psutil.Process().children()}  # the process that runs fork from, and its kin
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                ours = process.environ().get(MARK) == token
                if ours and process.pid not in forks | {os.getpid()} and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(process)
        if not left or time.monotonic() > deadline:
            for process in left:
                print(f"left behind: {process.pid} {process.name()}", file=sys.stderr)
            return len(left)
        time.sleep(1.0)


if __name__ == "__main__":
    main()
