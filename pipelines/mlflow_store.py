"""The MLflow that everything is delivered to: where it is, how it is asked for quickly, what it takes at once."""

import getpass
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipelines.one_line import one_line, public

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    _RETRIES: "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Set where the user has not: an absent server costs seconds instead of four minutes, and MLflow prints nothing."""

_ONE_BY_ONE = Lock()
"""For those who change a setting for one request."""

LONGEST_TAG = 8000
"""Characters that MLflow takes."""
_MOST_METRICS = 1000
_MOST_PARAMS = 100
"""Items that MLflow takes at once."""


class DeliveryError(OSError):
    """MLflow cannot be reached, or takes no more."""


def open_mlflow() -> Any:
    """Import MLflow with short timeouts and without its chatter."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def tracking_uri(home: Path) -> str:
    """Return where runs of this home go: ``MLFLOW_TRACKING_URI``, or a database beside them."""
    asked = os.environ.get("MLFLOW_TRACKING_URI")
    return asked.rstrip("/") if asked else f"sqlite:///{(home / 'mlflow.db').absolute()}"


def artifact_root(home: Path) -> str:
    """Return where the files of a home's own database lie, whoever makes an experiment in it: a client or a server."""
    return (home / "mlflow-artifacts").absolute().as_uri()


def address(uri: str, experiment: str, run: str) -> str:
    """Return the command line that shows MLflow, or a run's address on the server, as far as the ids are known."""
    uri = public(uri)
    if not uri.startswith(("http://", "https://")):
        return "moeify ui"
    return f"{uri}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning" if run else uri


@contextmanager
def first_contact(home: Path) -> Iterator["MlflowClient"]:
    """Give a client to make experiments and runs with, to one process at a time: each might lay out the database."""
    mlflow, uri = open_mlflow(), tracking_uri(home)
    lay_out(uri, home)
    with FileLock(home / ".mlflow.lock", timeout=60):
        yield mlflow.MlflowClient(tracking_uri=uri)


def lay_out(uri: str, home: Path) -> None:
    """Make a database that is a file and is not there yet, whole or not at all.

    MLflow makes its tables one by one, and never again opens a database that a kill or a full disk left without some.
    Raises DeliveryError where it cannot be made.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:////") or "?" in uri or _holds_something(path):
        return
    open_mlflow()
    from mlflow.store.db.utils import _initialize_tables  # of which 'mlflow db upgrade' consists
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.exc import SQLAlchemyError

    draft = path.with_name(f".{path.name}.draft")
    with FileLock(home / ".mlflow.lock", timeout=60):
        if not _holds_something(path):
            draft.unlink(missing_ok=True)
            try:
                _initialize_tables(create_engine(f"sqlite:///{draft}", poolclass=NullPool))
            except SQLAlchemyError as error:
                draft.unlink(missing_ok=True)
                raise DeliveryError(f"MLflow cannot make its database {path} ({one_line(error, 200)})") from error
            draft.replace(path)


def _holds_something(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def experiment_named(client: "MlflowClient", name: str, home: Path, way_out: str) -> str:
    """Return the id of the experiment, made where there is none; ``way_out``: what to do where it was deleted."""
    found = client.get_experiment_by_name(name)
    uri = tracking_uri(home)
    if found is None:
        artifacts = artifact_root(home) if uri.startswith("sqlite") else None
        return client.create_experiment(name, artifact_location=artifacts)
    if found.lifecycle_stage != "active":
        raise ValueError(f"MLflow's experiment {name!r} was deleted; restore it or {way_out}")
    check_reach(name, found.experiment_id, found.artifact_location, uri)
    return found.experiment_id


def check_reach(name: str, experiment: str, location: str, uri: str) -> None:
    """Raise ValueError where an experiment's files go through the server that made it, and ``uri`` is a database."""
    if location.startswith("mlflow-artifacts:") and not uri.startswith(("http://", "https://")):
        rename = ["mlflow", "experiments", "rename", "--experiment-id", experiment, "--new-name", f"{name}-served"]
        raise ValueError(
            f"MLflow's experiment {name!r} keeps its files behind the server that made it ({location}); set "
            f"MLFLOW_TRACKING_URI to that server, or let a new one be made: MLFLOW_TRACKING_URI={public(uri)} "
            f"{shlex.join(rename)}"
        )


def new_run(client: "MlflowClient", experiment: str, name: str, began: float, tags: Mapping[str, str]) -> str:
    """Make a run that began then, in seconds since the epoch, and return its id; its tags say who made it.

    MLflow's client is kept from asking again by itself: where only the answer was lost, that would make a second run.
    """
    tags = {"mlflow.source.type": "LOCAL", **tags}
    with suppress(KeyError, OSError):  # a user id without a name
        tags["mlflow.user"] = getpass.getuser()
    with _asked_once():
        return client.create_run(experiment, start_time=milliseconds(began), run_name=name, tags=tags).info.run_id


@contextmanager
def _asked_once() -> Iterator[None]:
    with _ONE_BY_ONE:
        before = os.environ.get(_RETRIES)
        os.environ[_RETRIES] = "0"
        try:
            yield
        finally:
            os.environ.pop(_RETRIES)
            if before is not None:
                os.environ[_RETRIES] = before


def log_params(client: "MlflowClient", run: str, params: Mapping[str, str]) -> None:
    """Log parameters, as many at once as MLflow takes."""
    from mlflow.entities import Param

    each = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(each), _MOST_PARAMS):
        client.log_batch(run, params=each[start : start + _MOST_PARAMS])


def log_metrics(client: "MlflowClient", run: str, metrics: "Sequence[Metric]") -> None:
    """Log points, as many at once as MLflow takes."""
    for start in range(0, len(metrics), _MOST_METRICS):
        client.log_batch(run, metrics=metrics[start : start + _MOST_METRICS])


@contextmanager
def told_as_delivery_error(home: Path, what_stays: str) -> Iterator[None]:
    """Say what went wrong with MLflow in one line, and what is not lost by it; errors of ours pass."""
    open_mlflow()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        why = one_line(error, 200)
        raise DeliveryError(f"MLflow at {public(tracking_uri(home))} did not take it ({why}); {what_stays}") from error


def milliseconds(seconds: float) -> int:
    """Return a time as MLflow counts it."""
    return round(seconds * 1000)
