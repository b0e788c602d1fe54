"""The way in from a notebook: fit, ablate, extract, and every example in a docstring."""

import doctest
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.models.build import Autoencoder
from moeify.recipe.model import LlamaModel
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Counted, Task
from moeify.tasks.tensors import TensorTask


def small_split() -> SplitModel:
    tree = ExpertTree.undivided(("a", "b")).split({0: [("a",), ("b",)]})
    widths = dict.fromkeys(("encoder.hidden", "decoder.hidden"), (2, 3, 3))
    return SplitModel(Autoencoder(3, 8, 2), ("a", "b"), Partition(tree, widths)).eval()


@pytest.mark.parametrize("name", ["moeify.fitting", "moeify.export.pruning"])
def test_the_examples_in_docstrings_hold(name: str) -> None:
    done = doctest.testmod(import_module(name), extraglobs={"split": small_split()})
    assert done.attempted > 0
    assert done.failed == 0


@torch.no_grad()
def test_what_is_extracted_or_left_gives_the_same_outputs() -> None:
    split = small_split()
    x = torch.rand(5, 3)
    of_a, of_b = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    torch.testing.assert_close(moeify.extract(split, "b")(x, of_a), split(x, of_b))
    rest = moeify.ablate(split, "a")
    torch.testing.assert_close(rest(x, of_b), split(x, of_b))
    with split.ablated("a"):
        torch.testing.assert_close(rest(x, of_a), split(x, of_a))
    with pytest.raises(ValueError, match="no category 'c'"):
        moeify.ablate(split, "c")


def test_tokens_are_fitted_and_the_network_that_was_given_stays_as_it_was() -> None:
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
    assert found.loss(found.split) == pytest.approx(found.result.test_loss["split"], rel=1e-6)
    assert found.loss(found.dense) == pytest.approx(found.result.test_loss["dense"], rel=1e-6)
    assert found.result.active_fraction["mean"] <= 0.7 + 1e-9
    assert {each.expert for each in found.portraits(4).experts} <= {n.name for n in found.split.partition.tree.nodes}
    again = moeify.fit(network, data, loss="tokens", steps=40, rounds=1, separation=0.3, rows=12, seed=1)
    assert again.result.test_loss == found.result.test_loss


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
    ],
)
def test_data_that_does_not_fit_is_told_in_a_line(loss: str, data: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        task(loss, **data)
    assert "\n" not in str(error.value)


def test_a_network_of_no_known_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Linear"):
        moeify.fit(
            nn.Linear(4, 3), {c: (torch.rand(20, 4), torch.randint(3, (20,))) for c in "ab"}, loss="classes", steps=8
        )
