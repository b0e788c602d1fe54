"""Kill whole nodes of a Ray cluster under runs: the node's own processes and every worker that it holds, at once."""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from benchmarks.aim import Aims, Length, outlived, phase_of
from benchmarks.killable import (
    LONGEST,
    Attempt,
    Runs,
    Tally,
    WrongError,
    alive,
    ended,
    judged,
    spawned,
    tail,
    workers_below,
)

_PER_RUN = 3
"""Kills in one run, at most."""
CORES = 2
"""That each node counts: one that is left alone can hold both workers of a run."""
_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_memory_monitor_refresh_ms": "0",
}
"""A dead node is told from a busy one within seconds, where Ray's own settings take half a minute."""
_STORE_BYTES = 100 * 10**6


def storm_nodes(home: Path, kills: int, draw: random.Random, tally: Tally, *, every: bool) -> None:
    """Kill nodes that hold workers of a run, a few in each, and let others join; the run must end by itself."""
    runs = Runs(home, home / "ray.yaml", spawned, home / "runs" / "mlflow.db", local=False)
    with _cluster() as cluster:
        if not runs.folder(0).result.exists():
            runs.check(0)
            runs.sync(0)
        wanted, number = runs.outcome(0), 1000
        aims = Aims("node", Length.of(runs.folder(0), start=2.0, closing=0.4), tally, draw, every)
        while tally.of("node") < kills or aims.left():
            number += 1
            with judged(runs, number, wanted, tally, "node"):
                process, since = runs.attempt(number), 0
                for phase in aims.of_run(_PER_RUN):
                    _await_worker(process, cluster)
                    aims.wait(phase, process, runs.folder(number), since)
                    workers_on = {node: workers_below(_raylet(node)) for node in cluster.worker_nodes}
                    holding = sorted((node for node, workers in workers_on.items() if workers), key=_raylet)
                    now = phase_of(runs.folder(number), since)
                    if not alive(process) or not holding:
                        break
                    _kill(cluster, draw.choice(holding))
                    tally.kills["node", now] += 1
                    _add_node(cluster)
                    since = outlived(process, [*chain(*workers_on.values())], runs.folder(number))
                if (code := ended(process)) != 0:
                    raise WrongError(f"exit code {code}: {tail(home / 'told.txt')}")


@contextmanager
def _cluster() -> Iterator[Any]:
    """Have a cluster of a head without cores and two nodes, and its address in the environment."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ |= _SETTINGS
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": _STORE_BYTES},
    )
    try:
        for _ in range(2):
            _add_node(cluster)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def _add_node(cluster: Any) -> None:
    cluster.add_node(wait=True, num_cpus=CORES, object_store_memory=_STORE_BYTES)


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _await_worker(process: Attempt, cluster: Any) -> None:
    deadline = time.monotonic() + LONGEST
    while alive(process) and not any(workers_below(_raylet(node)) for node in cluster.worker_nodes):
        if time.monotonic() > deadline:
            raise WrongError(f"no worker within {LONGEST:g} s")
        time.sleep(0.05)


def _kill(cluster: Any, node: Any) -> None:
    """Kill the node's agent and all below it, which a machine that loses its power would not outlive either."""
    raylet = psutil.Process(_raylet(node))
    for process in (raylet, *raylet.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)
