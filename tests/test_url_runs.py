"""Runs behind an S3 URL, through the command line: from other machines, killed, refused, and with no secret told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipelines.cli import main
from tests.finished_runs import TINY
from tests.stores import credentials, s3_server

LONG = TINY.replace("steps: 12", "steps: 60").replace(
    "rows: 8}\nattribution", "rows: 8}\ncheckpoints: {every: 2}\nattribution"
)
TEMPORARY = Path("/tmp")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


class Machine:
    """A folder that stands for a machine: all it shares with others is the URL and its environment."""

    def __init__(self, place: Path, url: str, endpoint: str) -> None:
        place.mkdir()
        self.place = place
        self.environment = {
            **credentials(endpoint),
            "MOEIFY_HOME": url,
            "MOEIFY_CACHE": str(place / "cache"),
            "COLUMNS": "80",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            cwd=self.place,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    def call(self, *arguments: str, **more: str) -> Result:
        return CliRunner().invoke(main, arguments, env={**self.environment, **more})

    @property
    def home(self) -> Path:
        (home,) = (self.place / "cache/homes").iterdir()
        return home
