"""Jobs that were run side by side in MLflow: an experiment, a run for the whole, and in it a child run for each job.

Everything is delivered from kept results, and found again by tags: what is delivered twice shows once, and what MLflow
could not take is delivered when the same command is given again. While jobs run, a thread delivers.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.mlflow_store import (
    LONGEST_TAG,
    address,
    experiment_named,
    first_contact,
    log_metrics,
    log_params,
    milliseconds,
    new_run,
    told_as_delivery_error,
    tracking_uri,
)
from pipelines.one_line import one_line, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True)
class Whole:
    """What the jobs belong to."""

    kind: str
    """One word, e.g. ``comparison``."""
    id: str
    where: str
    """The folder or URL where it is whole."""
    home: Path
    """The folder of all runs."""
    experiment: str
    """MLflow's, its own."""
    command: str
    """That makes it."""
    way_out: str
    """What to do where that experiment was deleted."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Of all runs."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Of the run for the whole."""


@dataclass(frozen=True)
class EndedJob:
    """A job as MLflow shows it."""

    key: str
    """Tells it from the others."""
    name: str
    params: Mapping[str, str]
    points: Mapping[str, float] = field(default_factory=dict)
    """Its figures; one that comes later is added."""
    step: int = 0
    """Of the points."""
    result: Path | None = None
    """The result's file, named by its content too; None of a job that failed."""
    seconds: float = 0.0
    problem: str = ""
    """Why it failed."""


@dataclass
class _Child:
    """What MLflow has of a job."""

    run: str
    result: str
    """The name of the result's file; empty before there is one."""
    points: set[str]
    """The figures that are there."""


class JobTracker:
    """Delivers; no method but ``finish`` raises."""

    def __init__(self, whole: Whole) -> None:
        self._whole = whole
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._parent = ""
        self._children: dict[str, _Child] = {}
        self._began = time.time()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._last: Future[None] | None = None
        self._away = False

    def tell(self, ended: Iterable[EndedJob], note: str) -> None:
        """Have the thread deliver what has ended, unless it is still busy, or MLflow was away before.

        ``note``: markdown that describes the whole.
        """
        if self._away or (self._last and not self._last.done()):
            return
        self._last = self._thread.submit(self._try, tuple(ended), note)

    def finish(self, ended: Iterable[EndedJob], note: str, files: Sequence[Path]) -> None:
        """Deliver what is missing, and the files there are; raises ``DeliveryError`` where MLflow takes it not."""
        self._thread.shutdown()
        jobs = tuple(ended)
        stays = f"the {self._whole.kind} is whole in {self._whole.where}, and the same command delivers it"
        with told_as_delivery_error(self._whole.home, stays):
            self._deliver(jobs, note)
            assert self._client
            for path in files:
                if path.is_file():
                    self._client.log_artifact(self._parent, str(path))
            failed = any(job.problem for job in jobs)
            self._client.set_terminated(self._parent, "FAILED" if failed else "FINISHED")

    def stop(self) -> None:
        """Say that it was interrupted, where MLflow has heard of it."""
        self._thread.shutdown(cancel_futures=True)
        if self._client and not self._away:
            try:
                self._client.set_terminated(self._parent, "KILLED")
            except Exception as error:
                warn(f"MLflow was not told of the interruption ({one_line(error, 150, kind=True)})")

    @property
    def where_to_look(self) -> str:
        """The command line that shows the runs, or their address on the server."""
        return address(tracking_uri(self._whole.home), self._experiment, self._parent)

    def _try(self, ended: Sequence[EndedJob], note: str) -> None:
        try:
            self._deliver(ended, note)
        except Exception as error:  # never the jobs' trouble
            self._away = True
            warn(f"MLflow will be tried again at the end ({one_line(error, 150, kind=True)})")

    def _deliver(self, ended: Sequence[EndedJob], note: str) -> None:
        client = self._connected()
        for job in ended:
            if job.result is None:
                self._deliver_failure(client, job)
            else:
                self._deliver_result(client, job, job.result)
        client.set_tag(self._parent, "mlflow.note.content", note[:LONGEST_TAG])

    # --- contact ------------------------------------------------------------------------------------------

    def _connected(self) -> "MlflowClient":
        """Return a client, the experiment and the run for the whole found or made."""
        if self._client is not None:
            return self._client
        whole = self._whole
        with first_contact(whole.home) as client:
            self._experiment = experiment_named(client, whole.experiment, whole.home, whole.way_out)
            query = f"tags.`moeify.kind` = '{whole.kind}'"
            found = client.search_runs([self._experiment], query, max_results=1)
            self._parent = found[0].info.run_id if found else self._new(client, whole.id, whole.kind, {})
            if not found:
                log_params(client, self._parent, whole.params)
        client.update_run(self._parent, status="RUNNING")
        for run in self._runs(client):
            key, result = run.data.tags["moeify.job"], run.data.tags.get("moeify.result", "")
            finished = run.info.status == "FINISHED"
            self._children[key] = _Child(run.info.run_id, result if finished else "", set(run.data.metrics))
        self._client = client
        return client

    def _runs(self, client: "MlflowClient") -> "list[Run]":
        """Return the child runs."""
        runs: list[Run] = []
        token = None
        while True:
            query = f"tags.`mlflow.parentRunId` = '{self._parent}'"
            page = client.search_runs([self._experiment], query, max_results=500, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _new(self, client: "MlflowClient", name: str, kind: str, tags: dict[str, str], began: float = 0.0) -> str:
        whole = self._whole
        tags = {
            "moeify.kind": kind,
            f"moeify.{whole.kind}": whole.id,
            "mlflow.source.name": whole.command,
            **whole.tags,
            **tags,
        }
        return new_run(client, self._experiment, name, began or self._began, tags)

    # --- delivery -----------------------------------------------------------------------------------------

    def _child(self, client: "MlflowClient", job: EndedJob, began: float = 0.0) -> _Child:
        """Return the job's run; one that speaks of another result of the same job gives way to a new one."""
        known = self._children.get(job.key)
        if known and known.result not in ("", job.result.name if job.result else ""):
            client.delete_run(known.run)
            known = None
        if known is None:
            tags = {"mlflow.parentRunId": self._parent, "moeify.job": job.key}
            known = self._children[job.key] = _Child(self._new(client, job.name, "job", tags, began), "", set())
            log_params(client, known.run, job.params)
        return known

    def _deliver_result(self, client: "MlflowClient", job: EndedJob, result: Path) -> None:
        from mlflow.entities import Metric

        over = result.stat().st_mtime
        child = self._child(client, job, over - job.seconds)
        if child.result and child.points >= set(job.points):
            return
        points = [Metric(k, v, milliseconds(over), job.step) for k, v in job.points.items() if k not in child.points]
        log_metrics(client, child.run, points)
        client.log_artifact(child.run, str(result))
        client.set_tag(child.run, "moeify.result", result.name)
        client.set_terminated(child.run, "FINISHED", end_time=milliseconds(over))
        child.result, child.points = result.name, child.points | set(job.points)

    def _deliver_failure(self, client: "MlflowClient", job: EndedJob) -> None:
        child = self._child(client, job)
        client.set_tag(child.run, "moeify.last_failure", job.problem[:LONGEST_TAG])
        client.set_terminated(child.run, "FAILED")
