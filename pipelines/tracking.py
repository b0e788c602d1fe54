"""MLflow as a reader of the journal: a run, a child run for each round, their curves, plots and files.

Delivery can stop and begin again anywhere. Runs are found again by their tags, metrics carry the journal's own
times and steps, so that the store knows a point it already has, and files and tags overwrite themselves: what is
delivered twice shows once. MLflow is imported by the thread that delivers, while the run already works.
"""

import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from moeify.config import RunConfig
from moeify.events import Artifact, Evaluated, Event, Failed, Finished, RoundEnded, Started, Step
from moeify.result import Result
from pipelines import plots
from pipelines.journal import read_events
from pipelines.runs import RunFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Set where the user has not: an absent server costs a few seconds instead of four minutes."""

_LONGEST_PARAM = 6000
_LONGEST_TAG = 8000
_LONGEST_KEY = 250
"""Characters that MLflow takes."""
_MOST_METRICS = 1000
_MOST_PARAMS = 100
"""Items that MLflow takes at once."""

Point = tuple[str, float, int]
"""Metric's key, value, step."""


class Progress(BaseModel):
    """How far one run was delivered to one MLflow; saved after every batch."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    uri: str
    """Of the tracking store, without a password."""
    experiment: str = ""
    """MLflow's id of the experiment; empty before the first contact."""
    parent: str = ""
    """MLflow's id of the run."""
    children: dict[int, str] = {}
    """Round -> MLflow's id of its child run."""
    offset: int = 0
    """Bytes of the journal that were delivered."""
    unit: str = "unit"
    """What speed is counted by: token or example."""

    @classmethod
    def load(cls, path: Path, uri: str) -> Self:
        """Return what is saved of that store, or a beginning."""
        try:
            saved = cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValueError):  # never delivered, or damaged: delivering again does no harm
            return cls(uri=uri)
        return saved if saved.uri == uri else cls(uri=uri)

    def save(self, path: Path) -> None:
        """Write whole or not at all."""
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        draft.replace(path)


class MlflowFollower:
    """Draws the run's plots and delivers its journal to MLflow."""

    def __init__(self, folder: RunFolder, config: RunConfig) -> None:
        self._folder = folder
        self._config = config
        self._progress = Progress.load(folder.tracking, _public(_tracking_uri(folder)))
        self._client: MlflowClient | None = None
        self._ended: Finished | Failed | None = None
        self._drawn: set[str] = set()

    @property
    def offset(self) -> int:
        """Bytes of the journal that were delivered, by this follower or an earlier one; saved when set."""
        return self._progress.offset

    @offset.setter
    def offset(self, value: int) -> None:
        self._progress.offset = value
        self._progress.save(self._folder.tracking)

    def take(self, events: Sequence[Event]) -> None:
        """Draw and deliver; raises when MLflow cannot be reached, and may then be handed the same events again."""
        for event in events:
            if isinstance(event, RoundEnded) and event.id not in self._drawn:
                plots.draw(self._folder, event.round)
                self._drawn.add(event.id)
        client = self._connected()
        for event in events:
            if isinstance(event, Started):
                self._progress.unit = event.unit
            elif not isinstance(event, Finished | Failed):
                self._ended = None  # a later attempt went on
        self._deliver_points(client, events)
        for event in events:
            match event:
                case RoundEnded():
                    self._deliver_round(client, event)
                case Artifact():
                    self._upload(client, self._run_of(client, event.round), self._folder.path / event.path)
                case Finished() | Failed():
                    self._ended = event
                case _:
                    pass

    def close(self) -> None:
        """Say how the run ended: its status, summary and result."""
        client = self._connected()
        parent = self._progress.parent
        match self._ended:
            case Finished() as event:
                self._upload(client, parent, self._folder.result)
                status = "FINISHED"
            case Failed() as event:
                client.set_tag(parent, "moeify.reason", event.reason[:_LONGEST_TAG])
                status = "FAILED"
            case None:
                event, status = None, "KILLED"
        client.set_tag(parent, "mlflow.note.content", summary(self._folder, status.lower())[:_LONGEST_TAG])
        client.set_tag(parent, "moeify.status", status.lower())
        client.set_terminated(parent, status, end_time=_milliseconds(event.time) if event else None)
        self._progress.save(self._folder.tracking)

    # --- contact ------------------------------------------------------------------------------------------

    def _connected(self) -> "MlflowClient":
        """Return a client, the experiment and the run found or made."""
        if self._client is not None:
            return self._client
        mlflow = _mlflow()
        uri = _tracking_uri(self._folder)
        home = self._folder.path.parent
        with FileLock(home / ".mlflow.lock", timeout=60):  # two first runs at once would both lay out the database
            client = mlflow.MlflowClient(tracking_uri=uri)
            if not self._progress.experiment:
                self._progress.experiment = self._experiment(client, home if uri.startswith("sqlite") else None)
            if not self._progress.parent:
                self._progress.parent = self._found_or_made(client, self._folder.id, {"moeify.run": self._folder.id})
                self._describe(client)
                self._progress.save(self._folder.tracking)
        client.update_run(self._progress.parent, status="RUNNING")
        client.set_tag(self._progress.parent, "moeify.status", "running")
        self._client = client
        return client

    def _experiment(self, client: "MlflowClient", local: Path | None) -> str:
        name = self._config.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            artifacts = (local / "mlflow-artifacts").absolute().as_uri() if local else None
            return client.create_experiment(name, artifact_location=artifacts)
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"MLflow's experiment {name!r} was deleted; restore it or change tracking.experiment in the recipe"
            )
        return found.experiment_id

    def _found_or_made(self, client: "MlflowClient", name: str, tags: dict[str, str]) -> str:
        """Return the run with these tags; make it where none has been made."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        if "mlflow.parentRunId" not in tags:
            query += " and tags.`moeify.kind` = 'run'"
        found = client.search_runs([self._progress.experiment], query, max_results=1)
        if found:
            return found[0].info.run_id
        tags = tags | {"moeify.kind": "round" if "mlflow.parentRunId" in tags else "run"}
        return client.create_run(self._progress.experiment, run_name=name, tags=tags).info.run_id

    def _describe(self, client: "MlflowClient") -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(key, value) for key, value in flat(self._config.model_dump(mode="json")).items()]
        tags = [RunTag("moeify.recipe", self._config.name), RunTag("moeify.seed", str(self._config.seed))]
        for start in range(0, len(params), _MOST_PARAMS):
            client.log_batch(self._progress.parent, params=params[start : start + _MOST_PARAMS])
        client.log_batch(self._progress.parent, tags=tags)
        for path in (self._folder.recipe, self._folder.resolved):
            self._upload(client, self._progress.parent, path)

    # --- delivery -----------------------------------------------------------------------------------------

    def _run_of(self, client: "MlflowClient", round_: int | None) -> str:
        """Return the MLflow run of a round, made where there is none yet; without a round, the parent."""
        if not round_:
            return self._progress.parent
        if round_ not in self._progress.children:
            tags = {
                "mlflow.parentRunId": self._progress.parent,
                "moeify.run": self._folder.id,
                "moeify.round": str(round_),
            }
            self._progress.children[round_] = self._found_or_made(client, f"round {round_}", tags)
            self._progress.save(self._folder.tracking)
        return self._progress.children[round_]

    def _deliver_points(self, client: "MlflowClient", events: Iterable[Event]) -> None:
        from mlflow.entities import Metric

        metrics: dict[str, list[Metric]] = defaultdict(list)
        for event in events:
            points = list(points_of(event, self._progress.unit))
            runs = [self._progress.parent]
            if points and (round_ := getattr(event, "round", 0)):
                runs.append(self._run_of(client, round_))
            for run in runs:
                metrics[run] += [Metric(key, value, _milliseconds(event.time), step) for key, value, step in points]
            if isinstance(event, Started):
                client.set_tag(self._progress.parent, "moeify.categories", ", ".join(event.categories)[:_LONGEST_TAG])
        for run, held in metrics.items():
            for start in range(0, len(held), _MOST_METRICS):
                client.log_batch(run, metrics=held[start : start + _MOST_METRICS])

    def _deliver_round(self, client: "MlflowClient", event: RoundEnded) -> None:
        run = self._run_of(client, event.round)
        self._upload(client, run, self._folder.rounds / str(event.round) / "partition.json")
        self._upload(client, run, plots.attribution_path(self._folder, event.round))
        client.log_text(run, json.dumps(event.tree, indent=2), "tree.json")
        self._upload(client, self._progress.parent, plots.tax_path(self._folder))
        client.set_tag(run, "moeify.accepted", str(event.accepted).lower())
        client.set_terminated(run, "FINISHED", end_time=_milliseconds(event.time))
        client.set_tag(
            self._progress.parent, "mlflow.note.content", summary(self._folder, "running")[:_LONGEST_TAG]
        )

    def _upload(self, client: "MlflowClient", run: str, path: Path) -> None:
        """Upload a file of the run's folder; one that is not there (any more) is left out."""
        if not path.resolve().is_relative_to(self._folder.path.resolve()):
            raise ValueError(f"artifact {path} lies outside of the run's folder {self._folder.path}")
        if path.is_file():
            client.log_artifact(run, str(path))


def deliver(folder: RunFolder, config: RunConfig) -> int:
    """Deliver what is left of an ended run's journal; return how many events that were. Raises when MLflow is away."""
    follower = MlflowFollower(folder, config)
    delivered = 0
    while True:
        events, end = read_events(folder.journal, follower.offset, _MOST_METRICS)
        if not events:
            break
        follower.take(events)
        follower.offset = end
        delivered += len(events)
    if delivered:
        follower.close()
    return delivered


def where_to_look(folder: RunFolder) -> str:
    """Return the command line that shows the run in MLflow, or its address on the server."""
    uri = _public(_tracking_uri(folder))
    if not uri.startswith(("http://", "https://")):
        return f"mlflow ui --backend-store-uri {uri}"
    progress = Progress.load(folder.tracking, uri)
    if not progress.parent:
        return uri
    return f"{uri}/#/experiments/{progress.experiment}/runs/{progress.parent}?workflowType=machine_learning"


def points_of(event: Event, unit: str) -> Iterable[Point]:
    """Yield what an event adds to MLflow's curves, at the optimizer step it happened."""
    match event:
        case Step():
            for category, loss in event.loss.items():
                yield _key("train", event.arm, category), loss, event.step
            yield _key(f"{unit}s_per_second", event.arm), event.units_per_second, event.step
            yield _key("learning_rate", event.arm), event.learning_rate, event.step
        case Evaluated():
            for category, loss in event.loss.items():
                yield _key(event.split, event.arm, category), loss, event.step
        case RoundEnded():
            yield "separation", event.separation, event.step
            yield "tax/mean", event.tax, event.step
            for category, tax in event.tax_by_category.items():
                yield _key("tax", category), tax, event.step
            yield "tax_random", event.tax_random, event.step
            yield "predicted", event.predicted, event.step
            yield "predicted_random", event.predicted_random, event.step
            yield "accepted", float(event.accepted), event.step
        case _:
            return


def flat(recipe: dict[str, Any]) -> dict[str, str]:
    """Turn a nested recipe into parameters ``a.b.0.c -> value``, cut to what MLflow takes."""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk(f"{path}.{key}" if path else str(key), below)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for index, below in enumerate(value):
                walk(f"{path}.{index}", below)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[_safe(path)] = text[:_LONGEST_PARAM]

    walk("", recipe)
    return found


def summary(folder: RunFolder, status: str) -> str:
    """Return the run in a few lines of markdown: its rounds, and its result where there is one."""
    lines = [f"**{folder.id}**: {status}", ""]
    if folder.result.is_file():
        lines += _result_table(Result.model_validate_json(folder.result.read_bytes()))
    rounds = [event for event in read_events(folder.journal, 0)[0] if isinstance(event, RoundEnded)]
    if rounds:
        lines += ["| round | separation | tax, nats | random split | kept |", "|---|---|---|---|---|"]
        for event in rounds:
            kept = "yes" if event.accepted else "rolled back"
            lines.append(
                f"| {event.round} | {event.separation:.3f} | {event.tax:+.4f} | {event.tax_random:+.4f} | {kept} |"
            )
    return "\n".join(lines)


def _result_table(result: Result) -> list[str]:
    lines = [
        f"Test loss, nats per {result.unit}",
        "",
        "| category | dense twin | split | random split | tax | active |",
        "|---|---|---|---|---|---|",
    ]
    for category in result.categories:
        losses = " | ".join(f"{result.test_loss[arm][category]:.4f}" for arm in ("dense", "split", "random"))
        lines.append(
            f"| {category} | {losses} | {result.tax[category]:+.4f} | {result.active_fraction[category]:.1%} |"
        )
    return [*lines, ""]


def _mlflow() -> Any:
    """Import MLflow with short timeouts and without its chatter."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _tracking_uri(folder: RunFolder) -> str:
    """Return where runs of this home go: ``MLFLOW_TRACKING_URI``, or a database beside them."""
    asked = os.environ.get("MLFLOW_TRACKING_URI")
    return asked.rstrip("/") if asked else f"sqlite:///{(folder.path.parent / 'mlflow.db').absolute()}"


def _public(uri: str) -> str:
    """Return the address without user and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _key(*parts: str) -> str:
    return _safe("/".join(parts))


def _safe(key: str) -> str:
    """Replace what MLflow does not take in the name of a metric or parameter."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)[:_LONGEST_KEY]


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
