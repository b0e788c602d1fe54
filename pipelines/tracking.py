"""MLflow as a reader of the journal: a run, a child run for each round, their curves, plots and files.

Delivery can stop and begin again anywhere. Runs are found again by their tags, metrics carry the journal's own
times and steps, so that the store knows a point it already has, and files and tags overwrite themselves: what is
delivered twice shows once. MLflow is imported by the thread that delivers, while the run already works.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, ConfigDict

from moeify.events import Artifact, Event, Exported, Failed, Finished, RoundEnded, Started
from moeify.place import Place, checked_url, fetch, is_url
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.result import Result
from pipelines import plots
from pipelines.drawing import Drawing, ended_as, last_event
from pipelines.journal import read_events
from pipelines.mlflow_models import Origin, loader_of, log_model
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
from pipelines.mlflow_system import SystemMetrics
from pipelines.mlflow_tags import log_data, outcome_tags, recipe_tags
from pipelines.mlflow_terms import final_points, flat, points_of, summary
from pipelines.one_line import one_line, public, warn
from pipelines.runs import RunFolder, Status, hold

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REGISTERED: tuple[Arm, ...] = ("dense", "split")
_WORDS: dict[Status, str] = {"finished": "FINISHED", "failed": "FAILED"}
"""How MLflow calls an end; any other one is ``KILLED`` there."""
_MOST_EVENTS = 1000
"""Events read at once when a journal is delivered later."""


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
    closed: bool = False
    """Whether MLflow was told how the run ended."""

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
    """Delivers a run's journal to MLflow, with its pictures and its report.

    ``drawing``: what makes those, here where nothing else does.
    """

    name = "MLflow"

    def __init__(
        self, folder: RunFolder, config: RunConfig, drawing: Drawing | None = None, *, machine: bool = False
    ) -> None:
        self._folder = folder
        self._drawing = drawing or Drawing(folder)
        self._machine = machine
        """Whether how busy this machine is belongs to the run."""
        self._system: SystemMetrics | None = None
        self._config = config
        self._progress = Progress.load(folder.tracking, public(tracking_uri(folder.path.parent)))
        self._client: MlflowClient | None = None

    @property
    def later(self) -> str:
        """The command that delivers what was missed."""
        return f"moeify sync {self._folder.id}"

    @property
    def offset(self) -> int:
        """Bytes of the journal that were delivered, by this follower or an earlier one; saved when set."""
        return self._progress.offset

    @offset.setter
    def offset(self, value: int) -> None:
        self._progress.offset = value
        self._progress.save(self._folder.tracking)

    @property
    def closed(self) -> bool:
        """Whether MLflow knows how the run ended."""
        return self._progress.closed

    def take(self, events: Sequence[Event]) -> None:
        """Draw and deliver; raises when MLflow cannot be reached, and may then be handed the same events again."""
        self._drawing.take(events)
        client = self._connected()
        if self._system:
            self._system.start()
        self._progress.closed = False
        for event in events:
            if isinstance(event, Started):
                self._progress.unit = event.unit
                client.set_tag(self._progress.parent, "moeify.categories", ", ".join(event.categories)[:LONGEST_TAG])
                log_data(client, self._progress.parent, self._config, event)
        self._deliver_points(client, events)
        for event in events:
            match event:
                case RoundEnded():
                    self._deliver_round(client, event)
                case Artifact():
                    self._upload(client, self._run_of(client, event), self._folder.path / event.path)
                case Finished():
                    self._deliver_result(client, event)
                    self._deliver_models(client)
                case Exported():
                    self._deliver_export(client, event)
                case _:
                    pass

    def close(self) -> None:
        """Say how the run ended: its report, status, summary and result."""
        self._drawing.close()
        end = last_event(self._folder)
        status = _WORDS.get(ended_as(end), "KILLED")
        client = self._connected()
        if self._system:
            self._system.stop()
        parent = self._progress.parent
        if isinstance(end, Failed):
            client.set_tag(parent, "moeify.last_failure", end.reason[:LONGEST_TAG])
        self._upload(client, parent, self._folder.report)
        self._summarise(client, status.lower())
        client.set_terminated(parent, status, end_time=milliseconds(end.time) if end else None)
        self._progress.closed = True
        self._progress.save(self._folder.tracking)

    def _summarise(self, client: "MlflowClient", status: str) -> None:
        from mlflow.entities import RunTag

        tags = {"moeify.status": status, **outcome_tags(self._folder)}
        tags["mlflow.note.content"] = summary(self._folder, status)[:LONGEST_TAG]
        client.log_batch(self._progress.parent, tags=[RunTag(key, value) for key, value in tags.items()])

    # --- contact ------------------------------------------------------------------------------------------

    def _connected(self) -> "MlflowClient":
        """Return a client, the experiment and the run found or made."""
        if self._client is not None:
            return self._client
        home = self._folder.path.parent
        with first_contact(home) as client:
            if not self._progress.experiment:
                name = self._config.tracking.experiment
                way_out = "change tracking.experiment in the recipe"
                self._progress.experiment = experiment_named(client, name, home, way_out)
            if not self._progress.parent:
                self._progress.parent = self._found_or_made(
                    client, self._folder.id, self._began(), {"moeify.run": self._folder.id}
                )
                self._describe(client)
                self._progress.save(self._folder.tracking)
        client.update_run(self._progress.parent, status="RUNNING")
        self._summarise(client, "running")
        if self._machine:
            self._system = SystemMetrics(tracking_uri(home), self._progress.parent)
        self._client = client
        return client

    def _began(self) -> float:
        """Return when the run began, in seconds since the epoch: its first event, however late MLflow hears of it."""
        first, _ = read_events(self._folder.journal, 0, 1)
        return first[0].time if first else time.time()

    def _found_or_made(self, client: "MlflowClient", name: str, began: float, tags: dict[str, str]) -> str:
        """Return the run with these tags; make it where none has been made, as one that began then."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        if "mlflow.parentRunId" not in tags:
            query += " and tags.`moeify.kind` = 'run'"
        found = client.search_runs([self._progress.experiment], query, max_results=1)
        if found:
            return found[0].info.run_id
        tags = tags | {"moeify.kind": "round" if "mlflow.parentRunId" in tags else "run"}
        tags |= {"mlflow.source.name": f"moeify run {self._config.name}"}
        return new_run(client, self._progress.experiment, name, began, tags)

    def _describe(self, client: "MlflowClient") -> None:
        from mlflow.entities import RunTag

        log_params(client, self._progress.parent, flat(self._config.model_dump(mode="json")))
        tags = [RunTag(key, value) for key, value in recipe_tags(self._config).items()]
        client.log_batch(self._progress.parent, tags=tags)
        for path in (self._folder.recipe, self._folder.resolved):
            self._upload(client, self._progress.parent, path)

    # --- delivery -----------------------------------------------------------------------------------------

    def _run_of(self, client: "MlflowClient", event: Event) -> str:
        """Return the MLflow run of an event's round, made where there is none yet; without a round, the parent."""
        round_: int | None = getattr(event, "round", None)
        if not round_:
            return self._progress.parent
        if round_ not in self._progress.children:
            tags = {
                "mlflow.parentRunId": self._progress.parent,
                "moeify.run": self._folder.id,
                "moeify.round": str(round_),
            }
            self._progress.children[round_] = self._found_or_made(client, f"round {round_}", event.time, tags)
            self._progress.save(self._folder.tracking)
        return self._progress.children[round_]

    def _deliver_points(self, client: "MlflowClient", events: Iterable[Event]) -> None:
        from mlflow.entities import Metric

        metrics: dict[str, list[Metric]] = defaultdict(list)
        for event in events:
            when = milliseconds(event.time)
            points = [Metric(key, value, when, step) for key, value, step in points_of(event, self._progress.unit)]
            if points:
                for run in {self._progress.parent, self._run_of(client, event)}:  # one, where no round is meant
                    metrics[run] += points
        for run, held in metrics.items():
            log_metrics(client, run, held)

    def _deliver_round(self, client: "MlflowClient", event: RoundEnded) -> None:
        run, parent = self._run_of(client, event), self._progress.parent
        picture = plots.attribution_path(self._folder, event.round)
        self._upload(client, run, picture)
        self._upload(client, parent, plots.tax_path(self._folder))
        self._upload(client, parent, self._folder.report)
        if event.outcome == "kept":  # where the run stands is seen without a look into its rounds
            self._upload(client, parent, picture)
            self._upload(client, parent, self._folder.rounds / str(event.round) / "partition.json")
        client.set_tag(run, "moeify.accepted", str(event.accepted).lower())
        client.set_tag(run, "moeify.outcome", event.outcome)
        client.set_terminated(run, "FINISHED", end_time=milliseconds(event.time))
        self._summarise(client, "running")

    def _deliver_result(self, client: "MlflowClient", event: Finished) -> None:
        from mlflow.entities import Metric

        parent = self._progress.parent
        result = Result.model_validate_json(self._folder.result.read_bytes())
        metrics = [Metric(key, value, milliseconds(event.time), step) for key, value, step in final_points(result)]
        log_metrics(client, parent, metrics)
        if result.stopped:
            client.set_tag(parent, "moeify.stopped", result.stopped)
        for path in (self._folder.result, plots.tax_path(self._folder)):
            self._upload(client, parent, path)

    def _deliver_models(self, client: "MlflowClient") -> None:
        """Log and register the dense twin and the split model; those that are too large, or not there, are left out."""
        if not self._config.tracking.models or not self._folder.checkpoints.is_dir():
            return
        from moeify.split_folder import bytes_in_run, copy_from_run
        from moeify.store import CorruptCheckpointError
        from pipelines.copies import fetch_checkpoint

        try:
            fetch_checkpoint(self._folder)
        except CorruptCheckpointError as error:
            warn(f"no model was logged ({one_line(error)})")
            return
        for arm in _REGISTERED:
            try:
                if bytes_in_run(self._folder.path, arm) > self._config.tracking.models * 10**6:
                    continue
                with TemporaryDirectory(prefix="moeify-model-") as place:
                    copy_from_run(self._folder.path, arm, Path(place) / arm)
                    log_model(client, self._origin(), arm, Path(place) / arm, self._config.training.steps)
            except CorruptCheckpointError as error:
                what = one_line(error)
                warn(f"the {arm} model was not logged ({what})")
            except ValueError:  # never split, or the checkpoints were cleared away
                continue

    def _deliver_export(self, client: "MlflowClient", event: Exported) -> None:
        """Log and register what was exported, if it is still where it was written."""
        with TemporaryDirectory(prefix="moeify-export-") as place:
            folder = Path(event.folder)
            if is_url(event.folder):
                folder = Path(place)
                with suppress(FileNotFoundError):
                    fetch(Place(checked_url(event.folder)), folder)
            if loader_of(folder) is None:
                warn(f"{event.folder} holds no model any more and was not registered")
                return
            log_model(client, self._origin(), event.alias, folder, self._config.training.steps)

    def _origin(self) -> Origin:
        tags = {"moeify.run": self._folder.id, **recipe_tags(self._config)}
        return Origin(self._progress.experiment, self._progress.parent, self._config.name, tags)

    def _upload(self, client: "MlflowClient", run: str, path: Path) -> None:
        """Upload a file of the run's folder; one that is not there (any more) is left out."""
        if not path.resolve().is_relative_to(self._folder.path.resolve()):
            raise ValueError(f"artifact {path} lies outside of the run's folder {self._folder.path}")
        if path.is_file():
            client.log_artifact(run, str(path))


def deliver(folder: RunFolder, config: RunConfig) -> int:
    """Deliver what MLflow missed of a run that nobody drives; return how many events that were.

    Raises ``DeliveryError``, and ``RunBusyError`` while the run is driven: its driver delivers by itself.
    """
    delivered = 0
    stays = f"what is missing stays in {folder.journal}"
    with hold(folder), told_as_delivery_error(folder.path.parent, stays):
        follower = MlflowFollower(folder, config, Drawing(folder, driven=False))
        while True:
            events, end = read_events(folder.journal, follower.offset, _MOST_EVENTS)
            if not events:
                break
            follower.take(events)
            follower.offset = end
            delivered += len(events)
        if not follower.closed:
            follower.close()
    return delivered


def where_to_look(folder: RunFolder) -> str:
    """Return the command line that shows the run in MLflow, or its address on the server."""
    uri = tracking_uri(folder.path.parent)
    progress = Progress.load(folder.tracking, public(uri))
    return address(uri, progress.experiment, progress.parent)
