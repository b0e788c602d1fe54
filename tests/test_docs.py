"""What the documents say, run."""

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from moeify.models import families
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe, to_yaml
from moeify.routed.proof import prove
from pipelines.cli import COMMANDS, main
from tests.checkpoints import save_checkpoint
from tests.doc_commands import DOCUMENTS, elsewhere, tried, variants, written
from tests.doc_commands import TRIED as TRIED_IN
from tests.finished_runs import TINY, environment, finish
from tests.networks import tiny_decoder
from tests.test_owners import random_units

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
QUICKSTART = ROOT / "docs" / "quickstart.md"
WORDS = {
    "law": "court judge party clause contract statute appeal witness counsel evidence",
    "letters": "river stone cloud garden window music winter harbour silver thunder",
    "medicine": "patient dose fever artery nurse tissue symptom blood clinic therapy",
}

PROGRAM = """
import json, sys
from click.testing import CliRunner
from pipelines.cli import COMMANDS, main
for words in json.load(sys.stdin):
    said = CliRunner().invoke(main, words)
    if said.exit_code:
        sys.exit(f"{words}: {said.output} {said.exception!r}")
"""


def blocks(language: str, document: Path = QUICKSTART) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_that_is_named_exists_with_its_options(document: Path):
    for command in written(document):
        name, *rest = command.split()
        said = CliRunner().invoke(main, [name, "--help"])
        assert said.exit_code == 0, name
        if name == "cluster" and rest:
            said = CliRunner().invoke(main, [name, rest[0], "--help"])
        for option in re.findall(r"(?<![\w-])(--[a-z-]+)", " ".join(rest)):
            assert option in said.output, command


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


def test_every_command_is_tried_or_run_by_another_test():
    """Those that lack an argument, such as `moeify split` in a sentence, are names; each is tried in another place."""
    named, run = set(), set()
    for document in TRIED_IN:
        for command in (each for whole in written(document) for each in variants(whole)):
            if test := elsewhere(command):
                assert f"def {test[1]}(" in (ROOT / "tests" / test[0]).read_text(encoding="utf-8"), command
                run.add(command.split()[0])
            else:
                (run if tried(command) else named).add(command.split()[0])
    in_order = {command.split()[0] for command in written(QUICKSTART)}
    assert named <= run | in_order
    assert run | in_order == set(COMMANDS)


@pytest.mark.slow
def test_every_command_of_the_other_documents_runs(tmp_path: Path, laid_out: Path):
    """On a small run; what makes another run comes last, for the newest is meant by many."""
    asked = [
        words
        for document in TRIED_IN
        for whole in written(document)
        for command in variants(whole)
        if not elsewhere(command) and (words := tried(command))
    ]
    once = list(dict.fromkeys(map(tuple, asked)))
    assert len(once) > 30
    once.sort(key=lambda words: words[0] in ("run", "resume", "split", "study"))
    asked = [[f"out-{place}" if word == "out" else word for word in words] for place, words in enumerate(once)]
    finish(tmp_path, {"tiny": TINY}, laid_out)
    save_checkpoint(tmp_path / "checkpoint", "llama")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        cwd=tmp_path,
        env={**os.environ, **environment(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_code_of_the_concepts_runs():
    code = blocks("python", ROOT / "docs" / "concepts.md")[0].replace("steps=200", "steps=16")
    made: dict[str, object] = {}
    exec(code, made)
    assert set(made["split"].categories) == {"zero", "six", "one", "seven"}


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures_of_docs", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_those_that_the_script_draws_of_its_run():
    script = pictures()
    drawn = script.draw(json.loads(script.FACTS.read_text(encoding="utf-8")))
    for name, picture in drawn.items():
        assert (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8") == picture, name
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert all(f"({name}.svg)" in text for name in drawn)
    assert len(script.draw(script.run(steps=16))) == len(drawn)


def test_the_figures_of_the_concepts_are_those_of_the_run():
    facts = json.loads((ROOT / "docs" / "pictures.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    for figure in (*facts["loss"].values(), *(facts["nodes"][place]["name"] for place in (1, 4))):
        assert str(figure) in text, figure


# --- extending ----------------------------------------------------------------------------------------


def test_the_adapter_and_the_method_of_the_document_work(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found, adapter, proof, method = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name in ("TRANSFORMERS", "ADAPTERS"):
        monkeypatch.setattr(families, name, getattr(families, name))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(found, {})
    assert said.getvalue().strip() == "[('1.hidden', 12)]"
    made: dict[str, Any] = {}
    exec(adapter + proof, made)
    assert [site.kind for site in families.unit_space(made["network"], ("ffn", "heads")).sites] == ["heads", "ffn"] * 2
    exec(method, made)
    capacity = np.array([3, 4, 5])
    owner = made["loudest"](random_units(12, [["a", "b"], ["c"]]))(capacity).owner_L
    assert np.bincount(owner).tolist() == capacity.tolist()


@pytest.mark.parametrize("wrong", [{"up": "gate_proj"}, {"gate": None}])
def test_an_adapter_that_is_wrong_is_told_by_its_proof(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRANSFORMERS", "ADAPTERS"):
        changed = [replace(a, **wrong) if a.family == "llama" else a for a in getattr(families, name)]
        monkeypatch.setattr(families, name, tuple(changed))
    network = tiny_decoder("llama")
    with pytest.raises(ValueError, match=r"^site 'layers\.0\.ffn': another order of its units changes what comes out"):
        prove(network, families.example_inputs(network, rows=2, seed=0))
