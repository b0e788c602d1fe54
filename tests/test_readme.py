"""What the README says, run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from moeify.recipe import parse_recipe
from pipelines.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return found


def test_the_readme_is_at_most_two_hundred_lines_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 200
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_five_lines_of_python_run(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    tax, active = (float(word) for word in done.stdout.split())
    assert 0.4 < active < 0.6
    assert abs(tax) < 2


def test_the_recipe_for_ones_own_data_is_a_recipe() -> None:
    config = parse_recipe(block("yaml"), where="README")
    assert config.category_count == 3


@pytest.mark.parametrize("command", re.findall(r"`moeify ([a-z]+)", README))
def test_every_command_it_names_exists(command: str) -> None:
    assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0
