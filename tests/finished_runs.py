"""A folder with finished runs, made through the command line, for tests of the commands that take one."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

from click.testing import CliRunner, Result

from pipelines.cli import main
from tests.texts import write_texts

TINY = """name: tiny
data: {kind: text, source: {kind: jsonl, path: texts.jsonl}, vocabulary: 300, length: 16}
model: {kind: llama, hidden: 16, layers: 2, heads: 4, ffn: 32}
training: {steps: 12, rows: 8}
attribution: {rows: 8, rows_at_once: 8}
partition: {multiple: 2, min_units: 2}
rounds: [{train: 4, recover: 4, separation: 0.4}]
evaluation: {validation_rows: 8, test_rows: 8, rows_at_once: 8}
"""


def finish(place: Path, recipes: Mapping[str, str], laid_out: Path) -> Path:
    """Run recipes, name to text, to their end in ``place``, with texts beside them; return ``place``."""
    write_texts(place)
    (place / "runs").mkdir()
    shutil.copy(laid_out, place / "runs" / "mlflow.db")
    for name, recipe in recipes.items():
        (place / f"{name}.yaml").write_text(recipe, encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns when it is first used, and here warnings are errors
            done = call(place, "run", str(place / f"{name}.yaml"), "--local", "--quiet")
        assert done.exit_code == 0, done.output
    return place


def environment(place: Path, **more: str) -> dict[str, str]:
    return {"MOEIFY_HOME": str(place / "runs"), "MOEIFY_CACHE": str(place / "cache"), "COLUMNS": "80"} | more


def call(place: Path, *arguments: str, **more: str) -> Result:
    """Run a command of moeify on what is in ``place``."""
    return CliRunner().invoke(main, arguments, env=environment(place, **more))
