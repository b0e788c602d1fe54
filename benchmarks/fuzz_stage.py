"""What spoiled cases play on: finished things to spoil copies of, and the command line called in this process."""

import contextlib
import json
import os
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

TINY = """name: tiny
data: {kind: text, source: {kind: jsonl, path: texts.jsonl}, vocabulary: 270, length: 8}
model: {kind: llama, hidden: 8, layers: 1, heads: 2, ffn: 16}
training: {steps: 6, rows: 4}
attribution: {rows: 4, rows_at_once: 4}
partition: {multiple: 2, min_units: 2}
rounds: [{train: 2, recover: 2, separation: 0.3}]
evaluation: {validation_rows: 4, test_rows: 4, rows_at_once: 4}
"""


class Untracked:
    """Stands for MLflow, which is another program's."""

    offset = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def take(self, events: Any) -> None:
        """Drop the events."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class Stage:
    """Where cases play: finished things to spoil copies of, and a folder for the case at hand."""

    place: Path
    run: str
    """Id of the finished run below ``place/runs``."""

    @property
    def scratch(self) -> Path:
        """Of the case at hand; new for each."""
        return self.place / "case"


@contextlib.contextmanager
def staged(place: Path) -> Iterator[Stage]:
    """Make a finished run with a router and a split folder, in this process."""
    os.environ |= {"MOEIFY_HOME": str(place / "runs"), "MOEIFY_CACHE": str(place / "cache"), "COLUMNS": "80"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    from pipelines import compare, doctor, launch, runs

    vars(launch).update(Drawing=Untracked, MlflowFollower=Untracked, on_ray=_not_launched)
    vars(compare).update(compare=_refused)
    vars(doctor).update(examine=lambda: iter(()))
    write_texts(place / "texts.jsonl", random.Random(0))
    (place / "tiny.yaml").write_text(TINY, encoding="utf-8")
    _made("run", str(place / "tiny.yaml"), "--local", "--quiet")
    run = runs.every(place / "runs")[0].id
    _made("route", run)
    _made("export", run, "--split", "-o", str(place / "split"), "--no-verify")
    with contextlib.chdir(place):
        yield Stage(place, run)


def _not_launched(*_: Any) -> None:
    """Stand for Ray: the run goes no further."""


def _refused(*_: Any) -> None:
    raise ValueError("nothing is compared here")


def _made(*arguments: str) -> None:
    from pipelines.cli import main as moeify

    done = CliRunner().invoke(moeify, arguments)
    if done.exit_code:
        raise SystemExit(f"the stage could not be set: {done.output}") from done.exception


def write_texts(path: Path, draw: random.Random) -> None:
    """Write twenty short documents of each of two categories as JSON lines."""
    words = ("river", "stone", "cloud", "garden", "music", "winter", "silver", "meadow", "island", "velvet")
    with path.open("w", encoding="utf-8") as file:
        for _ in range(20):
            for category, form in (("code", "def {}({}): return 0\n"), ("prose", "The {} and the {} are here.\n")):
                text = "".join(form.format(draw.choice(words), draw.choice(words)) for _ in range(6))
                file.write(json.dumps({"text": text, "category": category}) + "\n")


Went = tuple[str, str] | None
"""What is wrong, in a line, and the traceback."""


def called(*arguments: str) -> Went:
    """Call the command line."""
    from pipelines.cli import main as moeify

    done = CliRunner().invoke(moeify, arguments)
    if done.exception and not isinstance(done.exception, SystemExit):
        error = done.exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = (
            f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {' '.join(str(error).split())[:90]}"
        )
        told = "".join(traceback.format_exception(error))
        return said, f"moeify {' '.join(map(repr, arguments))}\n{told}"
    if done.exit_code not in (0, 1, 2):
        return f"exit code {done.exit_code}", f"moeify {arguments}\n{done.output}"
    if done.exit_code and not done.output.strip():
        return f"exit code {done.exit_code} without a word", f"moeify {arguments}"
    return None
