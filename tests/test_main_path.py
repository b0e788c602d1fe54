"""The shipped recipes through the real command line: local Ray, local MLflow, real data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moeify
from moeify.recipe.load import parse_recipe, to_yaml
from pipelines.find_recipe import find_recipe

# MLflow's own database layer warns of its own future.
pytestmark = pytest.mark.filterwarnings(r"ignore::Warning:(mlflow|alembic|sqlalchemy|pydantic|google)\.")

CODE = "def main() -> None:\n    return sum(x for x in range(10))\n"
PYTHON = [sys.executable, "-m", "pipelines"]


def moeify_command(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOEIFY_HOME": str(home), "PYTHONWARNINGS": "default", **more}
    return subprocess.run([*PYTHON, *arguments], env=environment, capture_output=True, text=True, timeout=900)


def shown(home: Path) -> dict[str, Any]:
    done = moeify_command(home, "show", "last", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def leaves(tree: dict[str, Any]) -> list[str]:
    return [leaf for child in tree["children"] for leaf in leaves(child)] or [tree["name"]]


def check(summary: dict[str, Any], recipe: str, categories: set[str]) -> None:
    assert summary["run"].startswith(f"{recipe}-")
    assert summary["status"] == "finished"
    assert set(leaves(summary["tree"])) == categories, "every category has its leaf"
    assert all(set(summary["test_loss"][arm]) == categories for arm in ("dense", "split", "random"))
    assert set(summary["active_fraction"]) == {*categories, "mean"}
    assert summary["active_fraction"]["mean"] < 0.6
    assert [r["round"] for r in summary["rounds"]] == list(range(1, len(summary["rounds"]) + 1))
    for category, rises in summary["own_other"].items():
        assert rises[category] > 0, f"removing the expert of {category} costs it nothing"
        assert all(rises[other] == 0 for other in categories - {category})


@pytest.mark.main_path
def test_digits_run_on_ray_and_are_tracked(tmp_path: Path, laid_out: Path) -> None:
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    done = moeify_command(tmp_path, "run", "digits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "own" in done.stdout
    summary = shown(tmp_path)
    check(summary, "digits", {str(digit) for digit in range(10)})
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'moeify'")
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == 1 + len(summary["rounds"])
    assert all(run.info.status == "FINISHED" for run in found)


@pytest.mark.slow
def test_cifar_runs_where_its_data_is(tmp_path: Path, published: Path) -> None:
    done = moeify_command(tmp_path, "run", "cifar", "--local", MOEIFY_DATA=str(published))
    assert done.returncode == 0, done.stdout + done.stderr
    summary = shown(tmp_path)
    assert summary["status"] == "finished"
    assert set(leaves(summary["tree"])) == {"land", "craft", "mammals", "others"}
    assert summary["accuracy"]["split"]["mean"] > 0.2, "of ten classes"


def a_fifth(folder: Path) -> str:
    """The recipe of README's main job with a fifth of its steps; all else is as shipped."""
    text, where, _ = find_recipe("text")
    config = parse_recipe(text, where=where)
    short = config.model_copy(
        update={
            "training": config.training.model_copy(update={"steps": config.training.steps // 5}),
            "rounds": tuple(
                each.model_copy(update={"train": each.train // 5, "recover": each.recover // 5})
                for each in config.rounds
            ),
        }
    )
    path = folder / "text.yaml"
    path.write_text(to_yaml(short), encoding="utf-8")
    return str(path)


def run_text(home: Path, recipe: str) -> None:
    done = moeify_command(home, "run", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    categories = {"python", "prose", "c", "web"}
    summary = shown(home)
    check(summary, "text", categories)
    assert set(summary["bits_per_byte"]["split"]) == categories


def export(home: Path, name: str, *options: str) -> str:
    done = moeify_command(home, "export", "last", *options, "-o", str(home / name))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.main_path
def test_text_runs_on_ray_and_exports_what_stock_transformers_load(tmp_path: Path) -> None:
    run_text(tmp_path, a_fifth(tmp_path))
    export(tmp_path, "python", "--category", "python")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "python")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "python")
    tokens = tokenizer(CODE, return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]).startswith("def main() -> None:")
    assert dense(tokens).logits.isfinite().all()
    assert dense.config.intermediate_size < 384


@pytest.mark.slow
@pytest.mark.main_path
def test_every_export_of_text_in_full_is_the_split_model(tmp_path: Path) -> None:
    run_text(tmp_path, "text")
    export(tmp_path, "python", "--category", "python")
    export(tmp_path, "split", "--split")
    assert ": c, python, prose, web" in export(tmp_path, "moe", "--moe", "glm4_moe", "--force", "c")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    split = moeify.load_split(tmp_path / "split")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "python")(CODE, return_tensors="pt").input_ids
    for name, category in (("python", "python"), ("moe", "c")):
        with torch.no_grad():
            wanted = split(tokens, torch.tensor([split.categories.index(category)]))
            found = AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits
        assert (found - wanted).abs().max() <= 1e-4
