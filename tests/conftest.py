"""What tests of several files start from."""

import os
import warnings
from pathlib import Path

import pytest

# Tests run side by side, a file at a time: one thread each, set before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, and those that start a Ray too: two cores cannot bear two of them."""
    for item in items:
        alone = any(item.get_closest_marker(name) for name in ("ray", "main_path"))
        item.add_marker(pytest.mark.xdist_group("ray" if alone else item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder of published data that the project does not carry."""
    folder = Path(os.environ.get("MOEIFY_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("MOEIFY_DATA does not name a folder of published data")
    return folder


@pytest.fixture(scope="session")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: to lay one out takes longer than any test that needs it."""
    from pipelines.mlflow_store import open_mlflow

    home = tmp_path_factory.mktemp("laid_out")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow = open_mlflow()
        mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db").search_experiments()
    return home / "mlflow.db"
