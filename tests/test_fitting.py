"""The way in from a notebook: attribute, split, fit, what comes of it, and every example in a docstring."""

import doctest
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moeify
from attribution import heatmap
from moeify.distillation import divergence
from moeify.models.build import Autoencoder, logits
from moeify.notebook import Split, loss_of
from moeify.recipe.arms import Arm
from moeify.recipe.model import LlamaModel
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Counted, Task
from moeify.tasks.tensors import TensorTask
from tests.networks import tiny_decoder, tiny_resnet

FULL, ONES = torch.ones(9, 4), torch.ones(9, dtype=torch.long)

pytestmark = pytest.mark.usefixtures("shapes_unchecked")


def shades() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: (torch.rand(60, 6) < chance).float() for name, chance in (("dark", 0.2), ("light", 0.8))}


def small_split() -> Split:
    """A core of 8 units and an expert of 4 for each of two categories, drawn."""
    tree = ExpertTree.undivided(("dark", "light")).split({0: [("dark",), ("light",)]})
    widths = dict.fromkeys(("encoder.hidden", "decoder.hidden"), (4, 2, 2))
    data, network = shades(), Autoencoder(6, 8, 2)
    task = TensorTask(network, data, "pixels", rows=8, seed=0)
    model = SplitModel(task.build(), task.categories, Partition(tree, widths)).eval()
    dense = SplitModel(task.build(), task.categories).eval()
    config = moeify.split(network, data, loss="pixels", separation=0.2).config
    return Split(
        model, dense, task, config, {"split": loss_of(model, task, config), "dense": loss_of(dense, task, config)}
    )


@pytest.mark.parametrize("name", ["moeify.attributing", "moeify.fitting", "moeify.notebook"])
def test_the_examples_in_docstrings_hold(name: str) -> None:
    given = {"split": small_split()} if name == "moeify.notebook" else {}
    done = doctest.testmod(import_module(name), extraglobs=given)
    assert done.attempted > 0
    assert done.failed == 0


@torch.no_grad()
def test_what_is_extracted_or_left_gives_the_same_outputs() -> None:
    split = small_split()
    x = torch.rand(5, 6)
    of_dark, of_light = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    torch.testing.assert_close(split.extract("light")(x), split.model(x, of_light))
    rest = split.ablate("dark")
    torch.testing.assert_close(rest.model(x, of_light), split.model(x, of_light))
    with split.model.ablated("dark"):
        torch.testing.assert_close(rest.model(x, of_dark), split.model(x, of_dark))
        assert split.loss(split.model) == pytest.approx(rest.test_loss["split"])
    assert rest.tax["dark"] - split.tax["dark"] == pytest.approx(split.removals()["dark"]["dark"])
    for ask in (split.ablate, split.extract):
        with pytest.raises(ValueError, match="no category 'c'"):
            ask("c")
    with pytest.raises(ValueError, match="no expert of its own"):
        rest.ablate("dark")


def test_a_split_shows_itself_in_words_in_a_page_and_in_pictures() -> None:
    split = small_split()
    assert [line.split()[0] for line in repr(split).splitlines()] == ["Split", "core", "dark", "light", "tax,"]
    page = split._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 2
    assert "<td>75.0%</td>" in page
    tree, attribution, removals = split.plot_tree(), split.plot_attribution(), split.plot_removals()
    boxes = tree.axes[0].patches
    assert [box.get_bbox().bounds for box in boxes] == [(0, 0, 2, 8), (0, 8, 1, 4), (1, 8, 1, 4)]
    assert [axis.get_title().split("\n")[0] for axis in attribution.axes[:2]] == ["encoder.hidden", "decoder.hidden"]
    assert [label.get_text() for label in removals.axes[0].get_yticklabels()] == ["dark", "light"]
    for figure in (tree, attribution, removals, heatmap.plot(split.attribute())):
        assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was trained"):
        split.plot_curves()


def test_names_of_categories_are_no_markup() -> None:
    split, names = small_split(), ("<b>", "b")  # a task of one's own may call them anything
    split.task.categories = names
    losses: dict[Arm, dict[str, float]] = {arm: dict.fromkeys(names, 1.0) for arm in ("split", "dense")}
    tree = ExpertTree.undivided(names).split({0: [("<b>",), ("b",)]})
    model = SplitModel(split.task.build(), names, Partition(tree, split.partition.widths))
    page = replace(split, model=model, test_loss=losses)._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


@torch.no_grad()
def test_a_split_without_training_keeps_what_is_on_a_route_and_says_what_it_cost() -> None:
    network = Autoencoder(6, 16, 3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    data = {name: (torch.rand(40, 6) < 0.1 + 0.2 * place).float() for place, name in enumerate("abcd")}
    tree = [["a", "d"], ["b", "c"]]
    deep = {"rounds": 2, "branching": 2, "separation": 0.3, "tree": tree, "partition": {"compensation": None}}
    found = moeify.split(network, data, loss="pixels", **deep)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert [node.name for node in found.partition.tree.nodes] == ["core", "a+d", "a", "d", "b+c", "b", "c"]
    assert found.partition.separation >= 0.3 - 1e-9
    rows, whole = torch.rand(7, 6), torch.zeros(7, dtype=torch.long)
    with found.model.masked():
        torch.testing.assert_close(found.model(rows, whole), found.extract("a")(rows))
    torch.testing.assert_close(found.dense(rows, whole), network(rows))
    assert moeify.split(found.dense, data, loss="pixels", **deep).test_loss == found.test_loss
    with pytest.raises(ValueError, match="split already"):
        moeify.split(found.model, data, loss="pixels")
    assert found.tax["mean"] == pytest.approx(sum(found.tax[c] for c in data) / 4)


def test_attribution_alone_reads_a_network_and_a_split_of_it() -> None:
    network, data = Autoencoder(6, 8, 2), shades()
    table = moeify.attribute(network, data, loss="pixels", rows=40)
    assert list(table.sites) == ["encoder.hidden", "decoder.hidden"]
    split = moeify.split(network, data, loss="pixels", separation=0.2)
    of_split = moeify.attribute(split.model, data, loss="pixels", rows=40)
    for site in of_split.sites:
        off = ~split.partition.active(site, "dark")
        assert off.any()
        assert not of_split.score(site, "absolute")[off, 0].any()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"training": {"steps": 3}}, "use moeify.fit"),
        ({"partition": {"told": True}}, "use moeify.fit"),
        ({"separation": 0.99}, "separation"),
        ({"branching": 0}, "branching: got 0, wanted a whole number >= 2"),
        ({"cluster": {"workers": 4}}, "cluster: got a section that says nothing"),
    ],
)
def test_what_a_split_without_training_cannot_do_is_told(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        moeify.split(Autoencoder(6, 8, 2), shades(), loss="pixels", **asked)


def test_tokens_are_fitted_and_the_network_that_was_given_stays_as_it_was(tmp_path: Path) -> None:
    from moeify.models.build import build_llama

    network = build_llama(
        LlamaModel(kind="llama", hidden=8, layers=1, heads=2, ffn=16), vocabulary=20, length=6, end=0, seed=0
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start = torch.arange(30).unsqueeze(1)
    data = {
        "up": (start + torch.arange(7)) % 20,
        "down": (start - torch.arange(7)) % 20,
        "twos": (start + 2 * torch.arange(7)) % 20,
    }
    found = moeify.fit(network, data, loss="tokens", steps=40, rounds=1, separation=0.3, rows=12, seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert found.loss(found.model) == pytest.approx(found.test_loss["split"], rel=1e-6)
    assert found.loss(found.dense) == pytest.approx(found.test_loss["dense"], rel=1e-6)
    assert found.partition.separation >= 0.3 - 1e-9
    assert {each.expert for each in found.portraits(4).experts} <= {node.name for node in found.partition.tree.nodes}
    assert [line.get_label() for line in found.plot_curves().axes[0].lines] == ["dense", "split"]
    again = moeify.fit(network, data, loss="tokens", steps=40, rounds=1, separation=0.3, rows=12, seed=1)
    assert again.test_loss == found.test_loss
    take_away(found, tmp_path)


def take_away(found: Split, folder: Path) -> None:
    """A stock model of one category is loaded by transformers alone; the whole comes back in bits."""
    from transformers import AutoModelForCausalLM

    rows = torch.randint(20, (2, 6))
    with torch.no_grad():
        found.export(folder / "up", "up")
        wanted = found.model(rows, torch.zeros(2, dtype=torch.long))
        loaded = AutoModelForCausalLM.from_pretrained(folder / "up").eval()
        torch.testing.assert_close(loaded(rows).logits, wanted)
        torch.testing.assert_close(found.extract("up")(rows).logits, wanted)
        found.export(folder / "split", dtype="bfloat16")
        assert torch.equal(found.model(rows, torch.zeros(2, dtype=torch.long)), wanted)
    assert moeify.load_split(folder / "split").categories == found.categories
    with pytest.raises(ValueError, match="exists already"):
        found.export(folder / "split")
    with pytest.raises(ValueError, match="categories and moe"):
        found.export(folder / "other", "up", moe="glm4_moe")


def task(loss: Any = "classes", **data: Any) -> TensorTask:
    given = data or {c: (torch.rand(20, 4), torch.randint(3, (20,))) for c in "ab"}
    return TensorTask(nn.Linear(4, 3), given, loss, rows=8, seed=0)


def test_rows_are_shared_out_once_and_batches_lie_in_category_order() -> None:
    made = task()
    assert isinstance(made, Task)
    assert isinstance(made, Counted)
    assert made.sizes() == {
        "train": {"a": 14, "b": 14},
        "validation": {"a": 3, "b": 3},
        "test": {"a": 3, "b": 3},
    }
    batch = made.train_batch(3)
    assert batch.categories.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(batch.inputs, made.train_batch(3).inputs)
    seen = [row for split in ("validation", "test") for b in made.held_out_batches(split, 99, 4) for row in b.inputs]  # type: ignore[arg-type]
    seen += [row for b in made.probe_batches(1, 99, 4) for row in b.inputs]
    assert len({tuple(row.tolist()) for row in seen}) == len(seen) == 40
    outputs = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    torch.testing.assert_close(made.nats(outputs, torch.tensor([0, 0])), -outputs.log_softmax(1)[:, 0])
    assert made.sample(outputs * 9, [1, 2]).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("loss", "data", "told"),
    [
        ("classes", {"a": torch.rand(9, 4)}, "got 1 categories"),
        ("classes", {"a": torch.rand(9, 4), "b": torch.rand(9, 4)}, "needs inputs and integer targets"),
        ("pixels", {"a": torch.rand(9, 4), "b": torch.rand(9, 5)}, "wanted the same shape"),
        ("pixels", {"a": torch.rand(9, 4), "b": torch.rand(2, 4)}, "got 2 rows, wanted 8 at least"),
        ("tokens", {"a": torch.rand(9, 4), "b": torch.rand(9, 4)}, "needs integers"),
        ("mse", {}, "loss: got 'mse', wanted one of 'tokens', 'pixels', 'classes'"),
        (
            "pixels",
            {"a": torch.rand(9, 4), "b": 200 * FULL},
            "data['b']: got intensities up to 200, wanted 0..1; divide",
        ),
        (
            "pixels",
            {"a": 255 * FULL, "b": 200 * FULL},
            "data['a']: got intensities up to 255, wanted 0..1; divide by 255",
        ),
        ("pixels", {"a": FULL, "b": (FULL, 200 * FULL)}, "data['b']: got intensities up to 200, wanted 0..1"),
        ("pixels", {"a": FULL, "b": -FULL}, "data['b']: got intensities from -1, wanted 0..1; shift"),
        ("pixels", {"a": FULL, "b": FULL / 0}, "data['b']: got NaN or infinity among the inputs"),
        ("pixels", {"a": FULL, "b": (FULL, 0 * FULL / 0)}, "data['b']: got NaN or infinity among the targets"),
        ("pixels", {"a": FULL.byte(), "b": FULL}, "data['a']: got inputs of torch.uint8, wanted floats 0..1"),
        ("pixels", {"a": FULL, "b": (FULL, FULL.long())}, "data['b']: got targets of torch.int64, wanted floats 0..1"),
        ("pixels", {"a": FULL[..., None], "b": FULL[..., None]}, "wanted [rows pixels]; flatten(1)"),
        ("pixels", {"a": FULL, "b": (FULL, FULL[:, :3])}, "data: got targets of shapes"),
        ("pixels", {"a": FULL, "b": FULL}, "data['a']: got targets [4] a row, wanted [3], which is what the network"),
        (
            "classes",
            {"a": (FULL[:, :2], ONES), "b": (FULL[:, :2], ONES)},
            "data['a']: got rows [2] of torch.float32, which",
        ),
        ("classes", {"a": (FULL, ONES), "b": (FULL, 3 * ONES)}, "data['b']: got 3 among the classes, wanted 0..2"),
        ("classes", {"a": (FULL, ONES), "b": (FULL, -ONES)}, "data['b']: got -1 among the classes, wanted 0..2"),
        ("pixels", {"a": FULL.numpy(), "b": FULL}, "data['a']: got ndarray, wanted a tensor of rows"),
        (
            "classes",
            {"a": (FULL, ONES.numpy()), "b": FULL},
            "data['a']: got a tensor of shape [9, 4] and ndarray, wanted",
        ),
        ("pixels", {"mean": FULL, "b": FULL}, "data: the category name 'mean' is reserved"),
        ("pixels", {"": FULL, "b": FULL}, "data: got category ''"),
    ],
)
def test_data_that_does_not_fit_is_told_in_a_line(loss: str, data: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        task(loss, **data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"data": {0: FULL, 1: FULL}}, "data: got category 0, wanted a name in quotes, such as '0'"),
        ({"data": [FULL, FULL]}, "data: got list, wanted a mapping from the names of categories to rows"),
        ({"branching": 1}, "branching: got 1, wanted a whole number >= 2"),
        ({"separation": 1.5}, "separation: got 1.5, wanted a number > 0 and < 1"),
        ({"rounds": 0}, "rounds: got 0, wanted a whole number >= 1"),
        ({"steps": 3, "rounds": 2}, "steps: got 3, wanted a whole number >= 4, two a round at least"),
        ({"rows": 0}, "rows: got 0, wanted a whole number >= 1"),
        ({"seed": -1}, "seed: got -1, wanted a whole number >= 0"),
        ({"controls": "told"}, "controls: got 'told', wanted a list, each one of 'random', 'told'"),
        ({"cluster": {"workers": 4}}, "cluster: got a section that says nothing where network and rows are at hand"),
        ({"tracking": {"experiment": "x"}}, "tracking: got a section that says nothing"),
        ({"distillation": {}}, "distillation: got a mapping beside the loss 'pixels', wanted a loss with classes"),
        ({"model": {"kind": "resnet"}}, "model: got a section that says nothing"),
        ({"partitions": {}}, "partitions: got an unknown section"),
        ({"training": {"rows": 3}}, "training.rows: got 3, wanted it as the argument rows"),
        ({"training": 3}, "training: got 3, wanted a mapping"),
        ({"training": {"clip": torch.zeros(2, 2)}}, "training.clip: got tensor("),
        ({"training": {"cilp": 1}}, "training.cilp: got 1 for an unknown key"),
        ({"training": {"checkpoint_activations": True}}, "wanted false beside the given network, which has no decoder"),
        (
            {"partition": {"units": ["ffn", "heads"]}},
            "partition.units: got 'heads', which the given network has none of",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_a_line_in_the_words_that_were_given(asked: dict[str, Any], told: str) -> None:
    known = {"data": {"a": FULL, "b": FULL}, "loss": "pixels", "steps": 8, **asked}
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        moeify.fit(Autoencoder(4, 8, 2), **known)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_inputs_beside_targets_may_have_any_range_and_whole_numbers_may_be_of_numpy() -> None:
    noisy = {name: (3 * rows - 1, rows) for name, rows in shades().items()}
    found = moeify.split(Autoencoder(6, 8, 2), noisy, loss="pixels", separation=0.2, rounds=np.int64(1))
    assert found.test_loss["split"].keys() == {"dark", "light"}


def test_what_was_asked_of_a_fit_stays_as_it_was() -> None:
    asked = {"training": {"learning_rate": 1e-3}, "partition": {"min_units": 2}}
    data = {c: torch.rand(8, 4) for c in "ab"}
    found = moeify.fit(Autoencoder(4, 8, 2), data, loss="pixels", steps=2, rounds=1, separation=0.2, **asked)
    assert found.config.training.learning_rate == 1e-3
    assert asked == {"training": {"learning_rate": 1e-3}, "partition": {"min_units": 2}}


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_heads_of_a_given_transformer_are_split(family: str) -> None:
    network, generator = tiny_decoder(family), torch.Generator().manual_seed(0)
    loss: Any = "tokens"
    data: Any = {c: torch.randint(1, 40, (20, 12), generator=generator) for c in "ab"}
    if family == "vit":
        loss, data = "classes", {c: (torch.rand(20, 2, 4, 6, generator=generator), torch.arange(20) % 5) for c in "ab"}
    asked = {"units": ["ffn", "heads"], "frozen": ["*.ffn"], "compensation": None}
    cut = moeify.split(network, data, loss=loss, separation=0.04, partition=asked)
    fitted = moeify.fit(network, data, loss=loss, steps=4, rounds=1, rows=4, separation=0.04, partition=asked)
    for found in (cut, fitted):
        sites = [site for site in found.partition.widths if sum(found.partition.widths[site][1:])]
        assert {site.rpartition(".")[2] for site in sites} == {"heads"}
        assert found.test_loss["split"].keys() == {"a", "b"}


def test_a_network_given_for_gradient_routing_is_asked_what_its_units_are() -> None:
    image = torch.rand(16, 2, 8, 6)
    data = {c: (image, torch.arange(16) % 5) for c in "ab"}
    for asked, told in (
        ({"routing": {"gradients": "parameters"}}, "gradients of channels are not routed"),
        ({"training": {"accumulate": 2}}, "the given network, whose batch norm would see"),
    ):
        with pytest.raises(ValueError, match=told):
            moeify.fit(tiny_resnet().float(), data, loss="classes", steps=4, rounds=1, rows=4, **asked)


def test_what_attribution_reads_is_named_by_sites() -> None:
    data = dict.fromkeys("ab", (FULL, ONES))
    with pytest.raises(ValueError, match="sites: got 'h', wanted a Site"):
        moeify.attribute(nn.Sequential(nn.Linear(4, 3)), data, loss="classes", sites={"h": "0"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows_at_once: got 0"):
        moeify.attribute(Autoencoder(4, 8, 2), dict.fromkeys("ab", FULL), loss="pixels", rows_at_once=0)
    split = moeify.split(Autoencoder(6, 8, 2), shades(), loss="pixels", separation=0.2)
    with pytest.raises(ValueError, match="which the network does not take"):
        moeify.attribute(split.model, dict.fromkeys("ab", FULL), loss="pixels")


def test_a_network_of_no_known_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Linear"):
        moeify.fit(
            nn.Linear(4, 3), {c: (torch.rand(20, 4), torch.randint(3, (20,))) for c in "ab"}, loss="classes", steps=8
        )


def test_what_type_checkers_are_told_is_what_there_is() -> None:
    stub = (Path(moeify.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    told = {line.split()[3]: line.split()[1] for line in stub.splitlines() if line.startswith("from ")}
    assert told == moeify._HOMES  # type: ignore[attr-defined]


def test_a_trained_network_teaches_what_is_made_of_it() -> None:
    teacher = tiny_decoder("llama")
    data = {
        name: torch.randint(40, (20, 12), generator=torch.Generator().manual_seed(place))
        for place, name in enumerate("ab")
    }
    strayed = []
    for said in ({}, {"distillation": {"weight": 1.0, "stream": 30.0}}):
        found = moeify.fit(teacher, data, loss="tokens", steps=12, rounds=1, separation=0.2, **said)
        inputs, rows = data["a"][:4], torch.zeros(4, dtype=torch.long)
        with torch.no_grad():
            strayed.append(float(divergence(logits(teacher, inputs), found.model(inputs, rows), 1.0).mean()))
    assert strayed[1] < 0.8 * strayed[0]


def test_a_classifier_of_texts_is_trained_split_and_stays_one_of_transformers() -> None:
    torch.manual_seed(0)
    tokens = {name: torch.randint(first, first + 15, (40, 8)) for name, first in (("law", 1), ("letters", 20))}
    data = {name: (rows, rows[:, 0] % 5) for name, rows in tokens.items()}
    network = tiny_decoder("bert_classifier")
    found = moeify.fit(network, data, loss="classes", steps=12, rounds=1, partition={"min_units": 2})
    assert found.partition.separation > 0.2
    assert found.trained is not None
    accuracy = found.trained.result.accuracy
    assert accuracy is not None
    assert set(accuracy["split"]) == {"law", "letters", "mean"}
    stock = found.extract("letters")
    assert type(stock).__name__ == "BertForSequenceClassification"
    rows = tokens["letters"][:3]
    with torch.no_grad():
        wanted = found.model(rows, torch.ones(3, dtype=torch.long))
        torch.testing.assert_close(stock(rows).logits, wanted, rtol=1e-4, atol=1e-5)
