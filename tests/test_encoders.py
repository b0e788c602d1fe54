"""Networks that see rows both ways: masked language models, and image classifiers; through tasks, loop and commands."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from attribution.measure import measure
from attribution.subject import IGNORED, Rows, Subject
from moeify.data.images import load
from moeify.evaluation import position_nats, row_losses
from moeify.export.publish import How, export_dense, export_split
from moeify.loop import run
from moeify.models.families import readers
from moeify.recipe.config import RunConfig
from moeify.recipe.partition import Partition
from moeify.routed.split_model import SplitModel
from moeify.routers import training
from moeify.routers.training import route
from moeify.rows import generator
from moeify.split_folder import load_from_run, load_split
from moeify.splitting.partition import Partition as Partitioned
from moeify.splitting.tree import ExpertTree
from moeify.store import FolderStore
from moeify.task import Partial, Task, tokens_read
from moeify.tasks.build import build_task
from moeify.tasks.masked import MaskedTask, hide, masked_nats
from moeify.world import Solo
from pipelines.cli import main
from tests.checkpoints import save_checkpoint
from tests.networks import tiny_decoder
from tests.pictures import GROUPS, drawn
from tests.test_conversion import recipe
from tests.test_images import idx
from tests.texts import write_texts
from tests.toy import toy_config

SIDE = 8
VIT = {"image_size": SIDE, "patch_size": 4, "num_channels": 1, "num_labels": 10}


def masked_recipe(base: Path, family: str = "bert", **changes: object) -> tuple[RunConfig, Task]:
    save_checkpoint(base / "checkpoint", family, masks=True)
    write_texts(base)
    source = {"kind": "jsonl", "path": "texts.jsonl"}
    config = toy_config(
        **{
            "data": {"kind": "text", "source": source, "length": 12, "test": 0.2},
            "model": {"kind": "pretrained", "path": "checkpoint", "hidden": 0.25},
            "training": {"steps": 8, "rows": 8, "learning_rate": 0.001},
            "attribution": {"rows": 16, "rows_at_once": 16},
            "rounds": [{"train": 0, "recover": 5, "separation": 0.4}],
            "controls": ["told"],
            "evaluation": {"validation_rows": 8, "test_rows": 8},
            "distillation": {"weight": 0.5},
            **changes,
        }
    )
    return config, build_task(config, cache=base / "cache", base=base)


def write_pictures(base: Path) -> None:
    (base / "mnist").mkdir()
    for split, each, seed in (("train", 30, 0), ("t10k", 15, 1)):
        images = drawn(each, seed, SIDE)
        (base / "mnist" / f"{split}-images-idx3-ubyte").write_bytes(idx(images.pixels[:, 0]))
        (base / "mnist" / f"{split}-labels-idx1-ubyte").write_bytes(idx(images.labels.astype(np.uint8)))


def image_recipe(base: Path, **changes: object) -> tuple[RunConfig, Path]:
    write_pictures(base)
    tiny_decoder("vit", **{**VIT, **changes}).save_pretrained(base / "checkpoint")
    config = toy_config(
        data={"kind": "images", "source": "mnist", "root": ".", "categories": GROUPS, "validation": 0.2},
        model={"kind": "pretrained", "path": "checkpoint"},
        training={"steps": 8, "rows": 8, "learning_rate": 0.001},
        attribution={"rows": 16, "rows_at_once": 16},
        rounds=[{"train": 0, "recover": 5, "separation": 0.3}],
        controls=["told"],
        evaluation={"validation_rows": 8, "test_rows": 8},
        distillation={},
    )
    return config, base


# --- hidden tokens ------------------------------------------------------------------------------------


def test_a_rows_hidden_tokens_are_as_many_as_asked_and_its_own_whatever_rows_are_beside_it() -> None:
    tokens = torch.randint(5, 90, (40, 20), generator=torch.Generator().manual_seed(0))
    ids = torch.arange(100, 140)
    inputs, targets = hide(tokens, ids, mask=3, count=6, seed=1, stream=2)
    hidden = targets != IGNORED
    assert hidden.sum(1).tolist() == [6] * 40
    assert bool((inputs[hidden] == 3).all())
    assert torch.equal(inputs[~hidden], tokens[~hidden])
    assert torch.equal(targets[hidden], tokens[hidden])
    alone = hide(tokens[7:8], ids[7:8], mask=3, count=6, seed=1, stream=2)
    assert torch.equal(alone[0], inputs[7:8])
    assert hidden.float().mean(0).max() < 0.6  # no place is hidden in every row
    for seed, stream in ((2, 2), (1, 3)):
        assert not torch.equal(hide(tokens, ids, mask=3, count=6, seed=seed, stream=stream)[0], inputs)
    assert generator(1, "hide", 2, 100).integers(9) == generator(1, "hide", 2, 100).integers(9)


def test_only_hidden_tokens_cost_and_are_sampled(tmp_path: Path) -> None:
    _, task = masked_recipe(tmp_path)
    assert isinstance(task, MaskedTask | Partial)
    assert (task.units_per_row, tokens_read(task)) == (3, 12)
    batch = task.train_batch(0)
    assert torch.equal(task.train_batch(0).inputs, batch.inputs)
    network = task.build()
    with torch.no_grad():
        outputs = network(batch.inputs).logits
    hidden = batch.targets != IGNORED
    surprise = -outputs.log_softmax(-1).gather(2, batch.targets.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(task.nats(outputs, batch.targets), (surprise * hidden).sum(1))
    torch.testing.assert_close(position_nats(task, outputs, batch.targets), (surprise * hidden).double())
    subject = Subject(network, readers(network), task.categories, task.nats, task.sample)
    seeds = range(len(outputs))
    chosen = torch.nn.functional.one_hot(task.sample(outputs, seeds), outputs.shape[-1])
    labels = subject.drawn(outputs, batch.targets, seeds)
    torch.testing.assert_close(labels, (outputs.softmax(-1) - chosen) * hidden[..., None])
    roots = replace(subject, root=task.root).drawn(outputs, batch.targets, seeds)
    assert torch.equal(roots, task.root(outputs, seeds) * hidden[..., None])
    table = measure(subject, list(task.probe_batches(1, 8, 8)))
    assert all(bool(table.report(site).isfinite().all()) and bool(table.report(site).any()) for site in table.sites)


def keep(kept: list[torch.Tensor], _: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
    given[0].retain_grad()
    kept.append(given[0])


def test_gradients_of_hidden_tokens_reach_units_at_every_place(tmp_path: Path) -> None:
    """A slow oracle: the Fisher information of each unit from one backward pass a row."""
    _, task = masked_recipe(tmp_path)
    network, batch = task.build(), task.train_batch(0).take(torch.arange(2, 6))
    subject = Subject(network, readers(network), task.categories, task.nats)
    rows = Rows(batch.inputs, batch.targets, batch.categories, batch.ids)
    name = "layers.1.ffn"
    table = measure(subject, [rows])
    reader = network.get_submodule("bert.encoder.layer.1.output.dense")
    sums = torch.zeros(20, dtype=torch.float64)
    assert batch.categories.unique().tolist() == [0, 1]
    for row in range(4):
        kept: list[torch.Tensor] = []
        hook = reader.register_forward_pre_hook(partial(keep, kept))
        nats = masked_nats(network(batch.inputs[row : row + 1]).logits, batch.targets[row : row + 1])
        hook.remove()
        nats.sum().backward()
        sums += (kept[0].detach() * kept[0].grad).double()[0].sum(0).neg()
    signed = table.score(name, "taylor") * table.counts
    torch.testing.assert_close(signed.nan_to_num().sum(1), sums, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_masked_model_is_split_and_what_is_exported_loads(family: str, tmp_path: Path) -> None:
    partition = {"units": ["ffn", "heads"] if family == "bert" else ["ffn"], "multiple": 1, "min_units": 1}
    rounds = [{"train": 0, "recover": 5, "separation": 0.3}]
    config, task = masked_recipe(tmp_path, family, partition=partition, rounds=rounds)
    folder = tmp_path / "run"
    result = run(config, task, store=FolderStore(folder, 2))
    assert result.rounds[0].accepted
    assert result.bits_per_byte is None
    split, inputs = load_from_run(folder), task.train_batch(3).inputs
    export_split(folder, tmp_path / "split", How(verify=False))
    export_dense(folder, ["code"], tmp_path / "code", How(verify=family == "bert"))  # in a process of its own
    assert "AutoModelForMaskedLM.from_pretrained" in (tmp_path / "code" / "README.md").read_text()
    rows = torch.zeros(len(inputs), dtype=torch.long)
    with torch.no_grad():
        wanted = split(inputs, rows)
        assert torch.equal(load_split(tmp_path / "split")(inputs, rows), wanted)
        loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "code")
        torch.testing.assert_close(loaded(inputs).logits, wanted, rtol=0, atol=1e-4)
    assert loaded.num_parameters() < task.build().num_parameters()


def test_a_tokenizer_without_a_mask_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", "bert")
    write_texts(tmp_path)
    config = toy_config(
        data={"kind": "text", "source": {"kind": "jsonl", "path": "texts.jsonl"}, "length": 12},
        model={"kind": "pretrained", "path": "checkpoint"},
    )
    with pytest.raises(ValueError, match="its tokenizer names no mask_token that the network knows"):
        build_task(config, cache=tmp_path, base=tmp_path)


# --- images -------------------------------------------------------------------------------------------


def test_an_image_classifier_is_split_with_its_heads_and_what_is_exported_loads(tmp_path: Path) -> None:
    config, base = image_recipe(tmp_path)
    partition = Partition(units=("ffn", "heads"), multiple=1, min_units=1)
    config = config.model_copy(update={"partition": partition})
    task = build_task(config, cache=base, base=base)
    folder = tmp_path / "run"
    result = run(config, task, store=FolderStore(folder, 2))
    assert result.rounds[0].accepted
    assert result.accuracy is not None
    split, inputs = load_from_run(folder), task.train_batch(3).inputs
    export_dense(folder, ["top"], tmp_path / "top")  # verified in a process of its own
    card = (tmp_path / "top" / "README.md").read_text()
    assert "AutoModelForImageClassification.from_pretrained" in card
    assert "AutoTokenizer" not in card
    with torch.no_grad():
        wanted = split(inputs, torch.full((len(inputs),), 3))
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "top")
        torch.testing.assert_close(loaded(inputs).logits, wanted, rtol=0, atol=1e-4)
    assert loaded.num_parameters() < task.build().num_parameters()


def text() -> dict[str, object]:
    return {"kind": "text", "source": {"kind": "jsonl", "path": "texts.jsonl"}}


def test_images_become_what_the_checkpoint_takes(tmp_path: Path) -> None:
    config, base = image_recipe(tmp_path, image_size=12)
    stock = build_task(config, cache=base, base=base)
    settings = {"image_mean": [0.25], "image_std": [0.5]}
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text(json.dumps(settings))
    own = build_task(config, cache=base, base=base)
    assert own.assets().keys() == {"preprocessor_config.json"}
    one, other = stock.train_batch(0).inputs, own.train_batch(0).inputs
    assert one.shape == other.shape == (8, 1, 12, 12)
    torch.testing.assert_close(one * 0.3081 + 0.1307, other * 0.5 + 0.25, rtol=1e-4, atol=1e-4)
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"has a preprocessor_config\.json that cannot be read"):
        build_task(config, cache=base, base=base)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"num_labels": 7}, "takes images of 7 classes, and the data has 10"), ({"num_channels": 3}, "of 3 channels")],
)
def test_a_classifier_of_other_images_is_told(changes: dict[str, int], told: str, tmp_path: Path) -> None:
    config, base = image_recipe(tmp_path, **changes)
    with pytest.raises(ValueError, match=told):
        build_task(config, cache=base, base=base)


def test_data_of_the_other_kind_is_told(tmp_path: Path) -> None:
    config, base = image_recipe(tmp_path)
    write_texts(tmp_path)
    texts = toy_config(data=text(), model={"kind": "pretrained", "path": "checkpoint"})
    with pytest.raises(ValueError, match="classifies images, and the data is text"):
        build_task(texts, cache=base, base=base)
    save_checkpoint(tmp_path / "llama", "llama")
    other = config.model_copy(update={"model": config.model.model_copy(update={"path": Path("llama")})})
    with pytest.raises(ValueError, match="reads text, and the data is images"):
        build_task(other, cache=base, base=base)
    assert load("mnist", tmp_path)[0].pixels.shape == (300, 1, SIDE, SIDE)


# --- the commands -------------------------------------------------------------------------------------


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def place(tmp_path: Path, laid_out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(laid_out, tmp_path / "mlflow.db")
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOEIFY_HOME", str(tmp_path / "runs"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_commands_split_a_masked_model_and_say_what_it_cannot_do(place: Path) -> None:
    save_checkpoint(place / "checkpoint", "bert", masks=True)
    write_texts(place)
    said = call("split", "checkpoint", "--data", "texts.jsonl", "--separation", "0.4", "--steps", "10", "--local")
    assert said.exit_code == 0, said.output
    said = call("export", "last", "--category", "code", "--no-verify", "-o", "code")
    assert said.exit_code == 0, said.output
    for asked, told in (
        (["route", "last", "--kind", "token"], "this model's tokens see each other; take 'document'"),
        (["generate", "last", "--prompt", "a", "--category", "code"], "only causal language models write text"),
        (["export", "last", "--moe", "glm4_moe", "-o", "moe"], "no stock MoE holds a network of family 'bert'"),
    ):
        said = call(*asked)
        assert said.exit_code == 2, said.output
        assert told in said.output
    said = call("route", "last")
    assert said.exit_code == 0, said.output
    assert "router: a decision a row" in said.output
    assert "Right after so many tokens" in said.output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_commands_split_and_measure_an_image_classifier_by_a_recipes_images(place: Path) -> None:
    image_recipe(place)
    data = {"kind": "images", "source": "mnist", "root": ".", "categories": GROUPS}
    rounds = [{"train": 1, "recover": 1, "separation": 0.1}]
    given = {"name": "pictures", "data": data, "model": {"kind": "resnet"}, "training": {"steps": 2}, "rounds": rounds}
    (place / "pictures.yaml").write_text(json.dumps(given))
    said = call("attribute", "checkpoint", "--data", "pictures.yaml", "--rows", "4", "--json")
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["categories"] == list(GROUPS)
    said = call("split", "checkpoint", "--data", "pictures.yaml", "--separation", "0.3", "--steps", "10", "--local")
    assert said.exit_code == 0, said.output
    for asked in (["route", "last"], ["export", "last", "--category", "low", "--no-verify", "-o", "low"]):
        said = call(*asked)
        assert said.exit_code == 0, said.output
    other = {**given, "data": {"kind": "digits"}, "model": {"kind": "autoencoder"}}
    (place / "texts.yaml").write_text(json.dumps(other))
    said = call("split", "checkpoint", "--data", "texts.yaml", "--local")
    assert said.exit_code == 2
    assert "has no images to classify in its data section" in said.output


def test_phi3_goes_through_the_loop_and_leaves_as_a_stock_model(tmp_path: Path) -> None:
    partition = {"units": ["ffn", "heads"], "multiple": 1, "min_units": 1}
    rounds = [{"train": 0, "recover": 5, "separation": 0.3}]
    config, task = recipe(tmp_path, "phi3", partition=partition, rounds=rounds)
    run(config, task, store=FolderStore(tmp_path / "run", 2))
    export_dense(tmp_path / "run", ["code"], tmp_path / "code", How(verify=False))
    split, tokens = load_from_run(tmp_path / "run"), task.train_batch(3).inputs
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "code")
    assert isinstance(loaded.model.layers[0].mlp.gate_up_proj, torch.nn.Linear)
    with torch.no_grad():
        wanted = split(tokens, torch.zeros(len(tokens), dtype=torch.long))
        torch.testing.assert_close(loaded(tokens).logits, wanted, rtol=0, atol=1e-4)


def test_a_router_of_a_masked_model_reads_whole_rows_and_is_judged_on_what_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "rows_to_fit", lambda *_: 32)
    config, task = masked_recipe(tmp_path)
    network = task.build()
    leaves = [(category,) for category in task.categories]
    tree = ExpertTree.undivided(task.categories).split({0: leaves})
    split = SplitModel(network, task.categories, Partitioned(tree, {f"layers.{i}.ffn": (8, 6, 6) for i in (0, 1)}))
    dense = SplitModel(task.build(), task.categories)
    router, report = route(split, {"dense": dense}, task, config)
    assert router.kind == "document"
    assert report.prefix == 12
    assert report.later is None
    assert report.whole is not None
    assert set(report.accuracy_after) == {12}
    label = row_losses(split, task, Solo(), config.evaluation, "test").by_category(task)
    for category, loss in label.items():
        assert report.whole.loss["label"][category] == pytest.approx(loss, rel=1e-5)
    if report.accuracy == 1.0:
        assert report.whole.loss["router"] == pytest.approx(report.whole.loss["label"])
    with pytest.raises(ValueError, match=r"kind 'token' needs rows .*: this model's tokens see each other"):
        route(split, {"dense": dense}, task, config, kind="token")
    with pytest.raises(ValueError, match="threshold: a second opinion needs tokens with routes of their own"):
        route(split, {"dense": dense}, task, config, threshold=0.5)
