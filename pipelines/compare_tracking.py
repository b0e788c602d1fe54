"""A comparison in MLflow: an experiment of its own, a run for the whole, and in it a child run for each job.

Everything is delivered from the results, and found again by tags: what is delivered twice shows once, and what MLflow
could not take is delivered when the same command is given again. While jobs run, a thread delivers.
"""

import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moeify.comparison import Job, losses
from moeify.jobs import Ended
from moeify.recipe.config import RunConfig
from pipelines.compare import Broken, Comparison, ComparisonFolder
from pipelines.compare_report import figures, markdown
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
from pipelines.mlflow_terms import final_points, flat, loss_points

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass
class _Child:
    """What MLflow has of a job."""

    run: str
    result: str
    """The name of the result's file; empty before there is one."""
    told: bool
    """Whether the figure above the told twin is there."""


class ComparisonTracker:
    """Delivers one comparison; no method but ``finish`` raises."""

    def __init__(self, folder: ComparisonFolder, config: RunConfig) -> None:
        self._folder = folder
        self._config = config
        self._client: MlflowClient | None = None
        self._experiment = ""
        self._parent = ""
        self._children: dict[str, _Child] = {}
        self._began = time.time()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._last: Future[None] | None = None
        self._away = False

    def tell(self, comparison: Comparison) -> None:
        """Have the thread deliver what has ended, unless it is still busy, or MLflow was away before."""
        if self._away or (self._last and not self._last.done()):
            return
        self._last = self._thread.submit(self._try, replace(comparison, ended=dict(comparison.ended)))

    def finish(self, comparison: Comparison) -> None:
        """Deliver what is missing, the table and the picture; raises ``DeliveryError`` where MLflow takes it not."""
        self._thread.shutdown()
        stays = f"the comparison is whole in {self._folder.path}, and the same command delivers it"
        with told_as_delivery_error(self._folder.home, stays):
            self._deliver(comparison)
            assert self._client
            for path in (self._folder.recipe, self._folder.summary, self._folder.picture):
                if path.is_file():
                    self._client.log_artifact(self._parent, str(path))
            self._client.set_terminated(self._parent, "FAILED" if comparison.broken else "FINISHED")

    def stop(self) -> None:
        """Say that the comparison was interrupted, where MLflow has heard of it."""
        self._thread.shutdown(cancel_futures=True)
        if self._client and not self._away:
            try:
                self._client.set_terminated(self._parent, "KILLED")
            except Exception as error:
                _warn(f"was not told of the interruption ({_one_line(error)})")

    @property
    def where_to_look(self) -> str:
        """The command line that shows the comparison, or its address on the server."""
        return address(tracking_uri(self._folder.home), self._experiment, self._parent)

    def _try(self, comparison: Comparison) -> None:
        try:
            self._deliver(comparison)
        except Exception as error:  # never the comparison's trouble
            self._away = True
            _warn(f"will be tried again at the end ({_one_line(error)})")

    def _deliver(self, comparison: Comparison) -> None:
        client = self._connected()
        told = losses(comparison.results, "told")
        for job, ended in comparison.ended.items():
            match ended:
                case Ended():
                    self._deliver_result(client, job, ended, told.get(job.seed))
                case Broken():
                    self._deliver_failure(client, job, ended)
        client.set_tag(self._parent, "mlflow.note.content", markdown(comparison)[:LONGEST_TAG])

    # --- contact ------------------------------------------------------------------------------------------

    def _connected(self) -> "MlflowClient":
        """Return a client, the experiment and the comparison's run found or made."""
        if self._client is not None:
            return self._client
        with first_contact(self._folder.home) as client:
            name = f"{self._config.tracking.experiment}/compare/{self._folder.id}"
            way_out = "change tracking.experiment in the recipe"
            self._experiment = experiment_named(client, name, self._folder.home, way_out)
            query = "tags.`moeify.kind` = 'comparison'"
            found = client.search_runs([self._experiment], query, max_results=1)
            self._parent = found[0].info.run_id if found else self._new(client, self._folder.id, "comparison", {})
            if not found:
                log_params(client, self._parent, flat(self._config.model_dump(mode="json")))
        client.update_run(self._parent, status="RUNNING")
        for run in self._runs(client):
            key, result = run.data.tags["moeify.job"], run.data.tags.get("moeify.result", "")
            finished = run.info.status == "FINISHED"
            self._children[key] = _Child(run.info.run_id, result if finished else "", "tax_told" in run.data.metrics)
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
        tags = {
            "moeify.kind": kind,
            "moeify.comparison": self._folder.id,
            "moeify.recipe": self._config.name,
            "mlflow.source.name": f"moeify compare {self._config.name}",
            **tags,
        }
        return new_run(client, self._experiment, name, began or self._began, tags)

    # --- delivery -----------------------------------------------------------------------------------------

    def _child(self, client: "MlflowClient", job: Job, result: str, began: float = 0.0) -> _Child:
        """Return the job's run; one that speaks of other data under the same recipe gives way to a new one."""
        known = self._children.get(str(job))
        if known and known.result not in ("", result):
            client.delete_run(known.run)
            known = None
        if known is None:
            tags = {"mlflow.parentRunId": self._parent, "moeify.job": str(job)}
            name = f"{job.method}, seed {job.seed}, {job.separation:.3g}"
            known = self._children[str(job)] = _Child(self._new(client, name, "job", tags, began), "", False)
            params = {"method": job.method, "seed": str(job.seed), "separation": f"{job.separation:g}"}
            log_params(client, known.run, params)
        return known

    def _deliver_result(self, client: "MlflowClient", job: Job, done: Ended, told: float | None) -> None:
        from mlflow.entities import Metric

        over = done.path.stat().st_mtime
        child = self._child(client, job, done.path.name, over - done.result.seconds)
        if child.result and (child.told or told is None):
            return
        result = done.result
        own = {key: value for key, value in figures(result, told).items() if isinstance(value, float)}
        points = {**own, "reached_separation": 1.0 - own["active"]}
        points |= {key: value for key, value, _ in (*loss_points(result), *final_points(result))}
        log_metrics(client, child.run, [Metric(k, v, milliseconds(over), result.steps) for k, v in points.items()])
        client.log_artifact(child.run, str(done.path))
        client.set_tag(child.run, "moeify.result", done.path.name)
        client.set_terminated(child.run, "FINISHED", end_time=milliseconds(over))
        child.result, child.told = done.path.name, told is not None

    def _deliver_failure(self, client: "MlflowClient", job: Job, broken: Broken) -> None:
        child = self._child(client, job, "")
        client.set_tag(child.run, "moeify.last_failure", broken.reason[:LONGEST_TAG])
        client.set_terminated(child.run, "FAILED")


def _warn(what: str) -> None:
    sys.stderr.write(f"moeify: warning: MLflow {what}\n")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]
