"""A checkpoint through the whole loop, and the command that does it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from moeify.conversion import Wish, conversion
from moeify.data.survey import look
from moeify.export.publish import How, export_dense, export_split
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe
from moeify.recipe.training import Distillation
from moeify.result import Result as RunResult
from moeify.split_folder import load_from_run, load_split
from moeify.starter import Machine
from moeify.store import FolderStore
from moeify.task import Task
from moeify.tasks.build import build_task
from moeify.twin_cache import fingerprint
from moeify.world import Solo
from pipelines.cli import main
from pipelines.commands.split import read_budget
from tests.checkpoints import save_checkpoint
from tests.surveyed import write_folders
from tests.test_loop import DyingStore, KilledError, final, outcome
from tests.texts import write_texts
from tests.toy import toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

HERE = Machine(cores=1, memory=2.0)


def recipe(base: Path, family: str, **changes: object) -> tuple[RunConfig, Task]:
    save_checkpoint(base / "checkpoint", family, begin=family == "llama")
    write_texts(base)
    source = {"kind": "jsonl", "path": "texts.jsonl"}
    config = toy_config(
        **{
            "data": {"kind": "text", "source": source, "length": 12, "test": 0.2},
            "model": {"kind": "pretrained", "path": "checkpoint"},
            "training": {"steps": 8, "rows": 8, "learning_rate": 0.001},
            "attribution": {"rows": 16, "rows_at_once": 16},
            "rounds": [{"train": 0, "recover": 5, "separation": 0.4}],
            "controls": [],
            "evaluation": {"validation_rows": 8, "test_rows": 8},
            "checkpoints": {"every": 3},
            "distillation": {"weight": 0.5},
            **changes,
        }
    )
    return config, build_task(config, cache=base / "cache", base=base)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt"])
def test_a_checkpoint_is_split_before_its_first_step_and_what_is_exported_loads(family: str, tmp_path: Path) -> None:
    config, task = recipe(tmp_path, family)
    folder = tmp_path / "run"
    result = run(config, task, store=FolderStore(folder, 2))
    assert result.rounds[0].accepted
    assert result.active_fraction["mean"] == pytest.approx(0.6, abs=0.06)
    split = load_from_run(folder)
    tokens = task.train_batch(3).inputs
    export_split(folder, tmp_path / "split", How(verify=False))
    again = load_split(tmp_path / "split")
    for place, category in enumerate(split.categories):
        export_dense(folder, [category], tmp_path / category, How(verify=False))
        rows = torch.full((len(tokens),), place)
        with torch.no_grad():
            wanted = split(tokens, rows)
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / category)(tokens).logits
            assert torch.equal(again(tokens, rows), wanted)
        assert (stock - wanted).abs().max() <= 1e-4


def test_heads_of_a_checkpoint_are_units_too(tmp_path: Path) -> None:
    partition = {"units": ["ffn", "heads"], "frozen": ["*.ffn"]}
    rounds = [{"train": 0, "recover": 5, "separation": 0.04}]
    config, task = recipe(tmp_path, "qwen3", partition=partition, rounds=rounds)
    run(config, task, store=FolderStore(tmp_path / "run", 2))
    widths = load_from_run(tmp_path / "run").partition.widths
    assert all(width == ((1, 1, 1) if site.endswith("heads") else (20, 0, 0)) for site, width in widths.items())


def test_a_run_killed_on_the_way_ends_with_the_same_bits(tmp_path: Path) -> None:
    config, task = recipe(tmp_path, "gpt2", distillation={"stream": 1.0})
    calm = FolderStore(tmp_path / "calm", 2)
    wanted = outcome(run(config, task, store=calm))
    stormy = DyingStore(tmp_path / "stormy", 2)
    stormy.lives = 1
    for _ in range(30):
        try:
            result = run(config, task, store=stormy)
        except KilledError:
            stormy.lives = 2
        else:
            break
    assert outcome(result) == wanted
    for arm, tensors in final(calm).items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, final(stormy)[arm][name]), (arm, name)


def test_a_run_does_not_go_on_with_another_teacher_than_it_began_with(tmp_path: Path) -> None:
    config, task = recipe(tmp_path, "llama")
    stormy = DyingStore(tmp_path / "stormy", 2)
    stormy.lives = 3
    with pytest.raises(KilledError):
        run(config, task, store=stormy)
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
        next(network.parameters()).mul_(1.5)
        network.save_pretrained(tmp_path / "checkpoint")
    stormy.lives = 100
    with pytest.raises(ValueError, match="put the checkpoint back"):
        run(config, task, store=stormy)


def test_every_arm_learns_from_the_teacher_and_twins_taught_in_another_way_are_others(tmp_path: Path) -> None:
    config, task = recipe(tmp_path, "llama", controls=["random", "told"])
    ways = [config.model_copy(update={"distillation": way}) for way in (None, Distillation(), Distillation(stream=2.0))]
    losses = [run(way, task).test_loss for way in ways]
    for arm in ("dense", "told", "split", "random"):
        assert len({tuple(found[arm].values()) for found in losses}) == len(ways)
    assert len({fingerprint(way, task, Solo()) for way in ways}) == len(ways)


def test_twins_of_other_weights_or_another_shape_are_others(tmp_path: Path) -> None:
    config, task = recipe(tmp_path, "llama")
    before = fingerprint(config, task, Solo())
    path = tmp_path / "checkpoint" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    other = build_task(config, cache=tmp_path / "cache", base=tmp_path)
    assert fingerprint(config, other, Solo()) != before


# --- the recipe that is written -----------------------------------------------------------------------


@pytest.fixture
def ready(tmp_path: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "checkpoint", "llama", begin=True)
    write_texts(tmp_path)
    return tmp_path


def made(place: Path, wish: Wish, texts: str = "texts.jsonl") -> RunConfig:
    found = look(place / texts)
    return conversion(place / "checkpoint", found, "mine", wish, HERE, place / "cache").config


def test_rows_fit_the_models_positions_and_the_cut_comes_soon(ready: Path) -> None:
    config = made(ready, Wish(separation=0.4, steps=40))
    assert config.data.kind == "text"
    assert config.data.length == 16
    assert config.training.steps == 40
    assert [r.separation for r in config.rounds] == [0.4]
    assert config.rounds[0].train == 4
    assert config.distillation is not None
    assert config.distillation.stream > 0
    alone = made(ready, Wish(distill=False))
    assert alone.distillation is None
    assert config.training.learning_rate > alone.training.learning_rate


def test_what_holds_no_stream_learns_from_the_distribution_at_the_rate_of_rows_alone(ready: Path) -> None:
    shutil.rmtree(ready / "checkpoint")
    save_checkpoint(ready / "checkpoint", "opt")
    config, alone = made(ready, Wish(separation=0.4)), made(ready, Wish(separation=0.4, distill=False))
    assert config.distillation == Distillation()
    assert config.training == alone.training


def test_without_a_budget_all_categories_part_in_one_cut(ready: Path) -> None:
    write_folders(ready / "folders", a=60, b=60, c=60, d=60)
    (round_,) = made(ready, Wish(separation=0.4, steps=40), "folders").rounds
    assert (round_.branching, round_.recover) == (4, 24)
    config = made(ready, Wish(budget={"tax": "2%"}, steps=40), "folders")
    assert [r.branching for r in config.rounds] == [2, 2, 2]


def test_a_budget_goes_deeper_and_tries_its_last_round_twice(ready: Path) -> None:
    config = made(ready, Wish(budget={"tax": "2%", "per": "category"}))
    assert config.budget is not None
    assert (config.budget.tax, config.budget.per) == ("2 %", "category")
    assert config.rounds[-1].separation == config.rounds[-2].separation
    assert sum(r.train + r.recover for r in config.rounds) <= config.training.steps


def test_a_separation_out_of_reach_is_told(ready: Path) -> None:
    write_folders(ready / "folders", a=12, b=12)
    for texts in ("texts.jsonl", "folders"):
        with pytest.raises(
            ValueError, match=r"^2 categories cannot be split so far apart \(rounds.*at most 0\.500"
        ) as told:
            made(ready, Wish(separation=0.6), texts)
        assert "min_core" not in str(told.value)  # which is 0


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("tax=2%", {"tax": "2%"}),
        ("2 %", {"tax": "2 %"}),
        ("tax=0.02, per=category", {"tax": 0.02, "per": "category"}),
    ],
)
def test_a_budget_is_read(said: str, meant: dict[str, object]) -> None:
    assert read_budget(said) == meant


def test_a_budget_of_something_else_is_refused() -> None:
    for said in ("loss=2", "tax=1,tax=2"):
        with pytest.raises(ValueError, match=re.escape(f"--budget: got {said!r}, wanted tax=2%")):
            read_budget(said)


# --- the command --------------------------------------------------------------------------------------


def split(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["split", *arguments])


@pytest.mark.filterwarnings("ignore")
def test_the_command_says_what_it_does_and_leaves_a_run_and_its_recipe(ready: Path) -> None:
    said = split(
        "checkpoint", "--data", "texts.jsonl", "--separation", "0.4", "--steps", "10", "-o", "words", "--local"
    )
    assert said.exit_code == 0, said.output
    assert "FFN units off: 40%" in said.output
    (folder,) = (ready / "runs").glob("words-*")
    assert f"again: moeify run {folder / 'recipe.yaml'}" in said.output
    result = RunResult.model_validate_json((folder / "result.json").read_bytes())
    assert result.steps == 10
    config = load_recipe(folder / "recipe.yaml")
    assert config == load_recipe(folder / "resolved.yaml")
    assert config.model.kind == "pretrained"
    assert config.model.path.is_absolute()
    for asked in (["show", "last"], ["route", "last"], ["export", "last", "--category", "code", "-o", "code"]):
        assert CliRunner().invoke(main, asked).exit_code == 0
    written = CliRunner().invoke(main, ["generate", "last", "--prompt", "river stone", "--tokens", "5", "--json"])
    assert json.loads(written.output)["prompt"] == "river stone"


def test_mistakes_are_told_in_a_line_and_leave_no_run(ready: Path) -> None:
    (ready / "one.jsonl").write_text('{"text": "a", "category": "b"}\n' * 3)
    (ready / "empty").mkdir()
    for asked, told in (
        (["empty", "--data", "texts.jsonl"], "holds no config.json"),
        (["checkpoint", "--data", "nothing.jsonl"], "is not there"),
        (["checkpoint", "--data", "empty"], "has 0 folders with files in them"),
        (["checkpoint", "--data", "one.jsonl"], "has 1 categories (b), wanted at least 2 in the field"),
        (["checkpoint", "--data", "texts.jsonl", "--budget", "loss=3"], "--budget: got 'loss=3'"),
        (["checkpoint", "--data", "texts.jsonl", "--budget", "tax=much"], "budget.tax: got 'much'"),
        (["checkpoint", "--data", "texts.jsonl", "--separation", "0.8"], "cannot be split so far apart"),
    ):
        said = split(*asked, "--local")
        assert said.exit_code == 2, said.output
        assert told in said.output
        assert len(said.output.splitlines()) <= 2
    assert not (ready / "runs").exists()


@pytest.mark.slow
def test_a_public_checkpoint_loses_less_when_split_by_attribution_than_its_split_at_random(
    published: Path, tmp_path: Path
) -> None:
    source = {
        "kind": "jsonl",
        "path": str(published / "text-tinystories" / "tinystories-mini.jsonl.xz"),
        "category": None,
    }
    config = toy_config(
        data={"kind": "text", "source": source, "discover": {"number": 2}, "length": 64},
        model={"kind": "pretrained", "path": str(published / "stories260K-hf")},
        training={"steps": 40, "rows": 16, "learning_rate": 0.0005},
        partition={"multiple": 4, "min_units": 4},
        rounds=[{"train": 0, "recover": 40, "separation": 0.25}],
        distillation={},
    )
    result = run(config, build_task(config, cache=tmp_path, base=tmp_path))
    assert max(result.test_loss["dense"].values()) < 2.0
    assert result.tax_random is not None
    assert 0.0 < result.tax["mean"] < result.tax_random["mean"]
