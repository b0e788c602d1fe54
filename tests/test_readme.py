"""What the README says, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from moeify.recipe.load import parse_recipe
from pipelines.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run_python(code: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_is_at_most_two_hundred_lines_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 200
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_five_lines_of_python_run() -> None:
    tax, active = (float(word) for word in run_python(blocks("python")[0], ROOT).split())
    assert 0.4 < active < 0.6
    assert abs(tax) < 2


def test_attribution_alone_runs_without_the_rest(tmp_path: Path) -> None:
    code = blocks("python")[1] + "\nimport sys\nprint({'ray', 'mlflow', 'moeify', 'transformers'} & set(sys.modules))"
    said = run_python(code, tmp_path)
    assert said.strip().endswith("set()")
    assert (tmp_path / "attribution.parquet").is_file()


def test_the_recipe_for_ones_own_data_is_a_recipe() -> None:
    config = parse_recipe(blocks("yaml")[0], where="README")
    assert config.category_names == ("law", "medicine", "letters")


@pytest.mark.parametrize("command", re.findall(r"`moeify ([a-z]+)", README))
def test_every_command_it_names_exists(command: str) -> None:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
