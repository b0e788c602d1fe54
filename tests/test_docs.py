"""What the documents say, run."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe, to_yaml
from pipelines.cli import main

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
QUICKSTART = ROOT / "docs" / "quickstart.md"
WORDS = {
    "law": "court judge party clause contract statute appeal witness counsel evidence",
    "letters": "river stone cloud garden window music winter harbour silver thunder",
    "medicine": "patient dose fever artery nurse tissue symptom blood clinic therapy",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", QUICKSTART.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_command_that_is_named_exists_with_its_options(document: Path):
    text = document.read_text(encoding="utf-8")
    for name, rest in named(text):
        said = CliRunner().invoke(main, [name, "--help"])
        assert said.exit_code == 0, name
        for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest):
            assert option in said.output, f"{name} {option}"


def named(text: str) -> list[tuple[str, str]]:
    """Return command and arguments of every `moeify ...`, in the text and in blocks."""
    places = re.findall(r"`(moeify [^`]+)`", text) + re.findall(r"^(moeify .+)$", text, re.MULTILINE)
    return [(words[1], " ".join(words[2:])) for place in places if len(words := place.split()) > 1]


def write_corpus(base: Path) -> None:
    draw = random.Random(0)
    for category, words in WORDS.items():
        folder = base / "texts" / category
        folder.mkdir(parents=True)
        for number in range(30):
            lines = (" ".join(draw.choice(words.split()) for _ in range(8)).capitalize() for _ in range(40))
            (folder / f"{number:04}.txt").write_text(".\n".join(lines) + ".\n", encoding="utf-8")


def shorten(path: Path) -> RunConfig:
    """Cut the recipe that ``moeify init`` wrote down to seconds; all else stays."""
    config = load_recipe(path)
    few = {
        "training": config.training.model_copy(update={"steps": 24}),
        "rounds": tuple(each.model_copy(update={"train": 6, "recover": 4}) for each in config.rounds),
        "attribution": config.attribution.model_copy(update={"rows": 8}),
        "evaluation": config.evaluation.model_copy(update={"validation_rows": 4, "test_rows": 8}),
    }
    short = config.model_copy(update=few)
    path.write_text(to_yaml(short), encoding="utf-8")
    return short


@pytest.mark.slow
@pytest.mark.ray
def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path):
    write_corpus(tmp_path)
    shim = tmp_path / "bin" / "moeify"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipelines "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "MOEIFY_"))},
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MOEIFY_CACHE": str(tmp_path / "cache"),
        "RAY_AUTH_MODE": "disabled",
    }
    said = ""
    for block in blocks("bash"):
        script = block.replace("--seeds 3", "--seeds 1")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said += done.stdout
        if "init" in script:
            assert shorten(tmp_path / "recipe.yaml").category_names == tuple(WORDS)
    for words in ("Expert tree", "Test loss", "without", "Who serves whom", "above told"):
        assert words in said, words
    for path in ("report.html", "law-model/model.safetensors", "split-model", "without-law", "runs/mlflow.db"):
        assert (tmp_path / path).exists(), path
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_notebook_runs_as_a_script(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    notebook = ROOT / "docs" / "notebook.py"
    done = subprocess.run(
        [sys.executable, str(notebook)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert re.search(r"a category runs \d\d\.\d%", said)
    before, after = map(float, re.search(r"3: ([\d.]+) -> ([\d.]+)  <- taken out", said).groups())
    assert after > before
    kept = re.findall(r"^(\d): ([\d.]+) -> ([\d.]+)$", said, re.MULTILINE)
    assert len(kept) == 9
    assert all(one == other for _, one, other in kept)
    assert float(re.search(r"differs from the whole by (\S+) at most", said)[1]) < 1e-5
