"""The told twin: the dense twin, given the category."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from moeify.evaluation import held_out_loss
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_from_run
from moeify.store import FolderStore
from moeify.task import Batch
from moeify.training import Contestant, train
from moeify.world import Solo
from tests.networks import CATEGORIES, rows_for, tiny_autoencoder, tiny_llama
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config

pytestmark = pytest.mark.usefixtures("shapes_unchecked")

NETWORKS = {"llama": tiny_llama(), "autoencoder": tiny_autoencoder()}
PLACES = {
    "llama": ["model.layers.0.mlp.told.weight", "model.layers.1.mlp.told.weight"],
    "autoencoder": ["decoder.told.weight", "encoder.told.weight"],
}
ROWS = torch.tensor([3, 0, 1, 1, 2, 0])


def pair(family: str) -> tuple[SplitModel, SplitModel, torch.Tensor]:
    """Return a told twin, the dense twin and rows in no order of categories."""
    network = NETWORKS[family]
    told, dense = (SplitModel(copy.deepcopy(network), CATEGORIES, told=t) for t in (True, False))
    return told, dense, rows_for(network, len(ROWS))


def fill(model: SplitModel) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for biases in model.told:
            biases.copy_(torch.randn(biases.shape, generator=generator, dtype=biases.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["llama", "autoencoder"])
def test_before_the_first_step_it_is_the_dense_twin_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    told, dense, inputs = pair(family)
    told, dense = told.to(dtype), dense.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    assert torch.equal(told(inputs, ROWS), dense(inputs, ROWS))


@pytest.mark.parametrize("family", ["llama", "autoencoder"])
def test_it_is_the_dense_network_and_a_bias_of_each_category_and_unit(family: str) -> None:
    told, dense, _ = pair(family)
    mine, theirs = (dict(model.network.named_parameters()) for model in (told, dense))
    assert sorted(mine.keys() - theirs.keys()) == PLACES[family]
    assert not theirs.keys() - mine.keys()
    assert {id(p) for p in told.told} == {id(mine[name]) for name in PLACES[family]}
    assert all(len(biases) == len(CATEGORIES) and not biases.any() for biases in told.told)
    assert dense.told == ()


def test_telling_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    pair("llama")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", ["llama", "autoencoder"])
def test_a_row_gets_its_own_categorys_biases_wherever_it_stands_in_the_batch(family: str) -> None:
    told, _, inputs = pair(family)
    fill(told)
    together = told(inputs, ROWS)
    for row, category in enumerate(ROWS):
        alone = told(inputs[row : row + 1], category[None])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-12)
        other = told(inputs[row : row + 1], (category[None] + 1) % 4)
        assert not torch.allclose(alone, other)


def test_every_hidden_unit_gets_its_bias_at_every_position() -> None:
    told, dense, inputs = pair("llama")
    fill(told)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    block = told.network.get_submodule("model.layers.1.mlp")
    block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    told(inputs, ROWS.sort().values)
    x, got = seen[0]
    gate, up, down = (dense.network.get_submodule(f"model.layers.1.mlp.{n}_proj") for n in ("gate", "up", "down"))
    bias = told.told[1][ROWS.sort().values][:, None]
    torch.testing.assert_close(got, down(torch.nn.functional.silu(gate(x)) * (up(x) + bias)))

    told, dense, inputs = pair("autoencoder")
    fill(told)
    hidden: torch.Tensor = inputs
    for part, biases in zip(("encoder", "decoder"), told.told, strict=True):
        up, down = (dense.network.get_submodule(f"{part}.{name}") for name in ("up", "down"))
        hidden = down(torch.relu(up(hidden) + biases[ROWS]))
    torch.testing.assert_close(told(inputs, ROWS), hidden)


@pytest.mark.parametrize("family", ["llama", "autoencoder"])
def test_gradients_reach_the_biases_and_equal_those_of_the_masked_oracle(family: str) -> None:
    told, _, inputs = pair(family)
    fill(told)

    def gradients() -> list[torch.Tensor]:
        told.zero_grad()
        outputs = told(inputs, ROWS)
        (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
        found = [p.grad for p in told.told]
        assert all(grad is not None and bool((grad != 0).any(1).all()) for grad in found)
        return [grad.clone() for grad in found if grad is not None]

    routed = gradients()
    with told.masked():
        masked = gradients()
    for one, other in zip(routed, masked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_biases_are_not_decayed() -> None:
    config = toy_config(training={"steps": 60, "weight_decay": 0.5})
    contestant = Contestant(SplitModel(ToyTask(config).build(), "abcd", told=True), config.training)
    decayed, spared = ({id(p) for p in group["params"]} for group in contestant.optimizer.param_groups)
    assert {id(p) for p in contestant.model.told} <= spared
    assert decayed
    assert len(decayed) + len(spared) == len(list(contestant.model.parameters()))


class HiddenWord(ToyTextTask):
    """A row is one token that says nothing, and what comes next is the category's own token."""

    units_per_row = 1

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        batch = super()._rows(purpose, rows, first_id)
        return Batch(batch.inputs[:, :1], 100 + batch.categories[:, None], batch.categories, batch.ids)


class HiddenPattern(ToyTask):
    """The input is nothing but noise, and what is to be said of it is the category's own pattern."""

    def _rows(self, purpose: list[int], rows: int, first_id: int = 0) -> Batch:
        batch = super()._rows(purpose, rows, first_id)
        noise = torch.rand(len(batch.inputs), 10, generator=torch.Generator().manual_seed(sum(purpose) + first_id))
        patterns = (torch.arange(10) % 4 == batch.categories[:, None]).float()
        return Batch(noise, patterns, batch.categories, batch.ids)


@pytest.mark.parametrize(
    ("task_class", "config", "without", "known"),
    [
        (HiddenWord, RunConfig.model_validate(TEXT_CONFIG), 1.3, 0.4),  # ln 4 = 1.39 nats a token untold
        (HiddenPattern, toy_config(), 4.5, 1.0),  # untold, ten pixels that are 1 in .2 to .3 of rows: about 5.5 nats
    ],
)
def test_where_the_label_alone_says_what_comes_the_told_twin_learns_it_and_the_dense_twin_cannot(
    task_class: type[ToyTask], config: RunConfig, without: float, known: float
) -> None:
    training = config.training.model_copy(update={"steps": 200})
    task = task_class(config)
    means = []
    for told in (False, True):
        contestant = Contestant(SplitModel(task.build(), task.categories, told=told), training)
        train(contestant, task, Solo(), training, 200, 50, lambda *_: None)
        loss = held_out_loss(contestant.model, task, Solo(), config.evaluation, "test")
        means.append(sum(loss.values()) / len(loss))
    assert means[0] > without
    assert means[1] < known


@pytest.mark.parametrize("task_class", [ToyTask, ToyTextTask])
def test_a_runs_told_twin_is_read_back_as_it_was_tested(task_class: type[ToyTask], tmp_path: Path) -> None:
    base = TEXT_CONFIG if task_class is ToyTextTask else {}
    config = toy_config(**{**base, "controls": ["told"]})
    task = task_class(config)
    result = run(config, task, store=FolderStore(tmp_path, 1))
    told = load_from_run(tmp_path, "told")
    assert all(bool(biases.any()) for biases in told.told)
    assert held_out_loss(told, task, Solo(), config.evaluation, "test") == result.test_loss["told"]
    with pytest.raises(ValueError, match=r"has no arm 'random', only dense, told, split; its recipe's controls"):
        load_from_run(tmp_path, "random")


def test_a_network_without_an_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter for Linear"):
        SplitModel(nn.Linear(2, 2), CATEGORIES, told=True)
