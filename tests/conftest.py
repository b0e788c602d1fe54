"""What tests of several files start from."""

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from jaxtyping import config

# Tests run side by side, a file at a time: one thread each, set before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# They start many processes: each would compile what it imports anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# The same examples everywhere, so that a change is to blame for what fails; benchmarks.fuzz draws others.
settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, and those that start a Ray too: two cores cannot bear two of them.

    Ray's come first: they take longest, and what is left when they end is divided.
    """

    def with_ray(item: pytest.Item) -> bool:
        return any(item.get_closest_marker(name) for name in ("ray", "main_path"))

    items.sort(key=lambda item: not with_ray(item))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("ray" if with_ray(item) else item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session", autouse=True)
def _power_stays_on() -> Iterator[None]:
    """What is written need not reach the disk: to wait for that takes a tenth of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def shapes_unchecked() -> Iterator[None]:
    """For files of whole runs, which call what has checked shapes a million times: that takes longer than the runs.

    Other files call the same functions with their shapes checked, and so does a whole run in tests/test_loop.py.
    """
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def shapes_checked() -> Iterator[None]:
    """For a test that has them checked in such a file."""
    config.update("jaxtyping_disable", False)
    yield
    config.update("jaxtyping_disable", True)


@pytest.fixture(scope="module")
def pictures_left_blank() -> Iterator[None]:
    """For files that ask where pictures go, and not what is on them: to draw them takes longer than all else there."""

    def blank(_: object, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a picture")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.plots.save_png", blank)
        patch.setattr("pipelines.report.figures.inline", lambda *_, **__: "<svg></svg>")
        yield


@pytest.fixture(scope="module")
def few_rows_to_fit() -> Iterator[None]:
    """For files whose routers need not be good: on all the rows they may have, some would learn for ten seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeify.routers.classifiers._MOST_ROWS", 1024)
        yield


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of published data that the project does not carry."""
    folder = Path(os.environ.get("MOEIFY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("MOEIFY_DATA does not name a folder of published data")
    return folder


@pytest.fixture(scope="session")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: to lay one out takes longer than any test that needs it.

    Processes that test side by side share it.
    """
    own = tmp_path_factory.getbasetemp()
    ready = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "laid_out.db"
    with FileLock(f"{ready}.lock"):
        if not ready.exists():
            _lay_out(tmp_path_factory.mktemp("laid_out") / "mlflow.db").rename(ready)
    return ready


def _lay_out(database: Path) -> Path:
    from pipelines.mlflow_store import lay_out

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        lay_out(f"sqlite:///{database}", database.parent)
    return database
