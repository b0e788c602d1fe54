"""A network that learns with the routers inside of it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from moeify.distillation import divergence
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation
from moeify.result import MEAN
from moeify.routed.split_model import SplitModel
from moeify.routers import by_layer, joint
from moeify.routers.by_layer import Distil, reading
from moeify.routers.joint import Joint
from moeify.routers.router import leaf_of_category
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.training import Contestant, train
from moeify.world import Solo
from tests.test_by_layer import coloured, drawn
from tests.toy import TEXT_CONFIG, ToyTextTask

CONFIG = RunConfig.model_validate(TEXT_CONFIG)


def of(steps: int) -> tuple[Joint, SplitModel]:
    task = ToyTextTask(CONFIG)
    tree = ExpertTree.undivided("abcd").split({0: [("a", "c"), ("d",), ("b",)]})
    partition = Partition(tree, {f"layers.{i}.ffn": (8, 8, 8, 8) for i in range(2)})
    return Joint(task, CONFIG, steps), SplitModel(task.build(), "abcd", partition).eval()


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_layer, "_ROWS", 24)


def test_what_is_learned_from_a_pass_is_its_nats_and_a_part_of_those_about_leaves() -> None:
    phase, model = of(1)
    routers, batch = drawn(model), phase.task.train_batch(0)
    learner = joint._Learner(model, phase._training(1.0), routers)
    outputs = learner.outputs(batch)
    nats = phase.task.nats(outputs, batch.targets)
    lately = joint._Lately(model, phase.task, CONFIG)
    found = joint._Lesson(learner, lately).loss(batch, outputs, nats)
    with reading(model) as read:
        again = model.by_layer(batch.inputs, routers.weights)
    leaf_N = leaf_of_category(model)[batch.categories].repeat_interleave(batch.inputs.shape[1])
    missed = sum(
        F.cross_entropy(x_ND @ routers.weights[site].t(), leaf_N, reduction="none") for site, x_ND in read.items()
    )
    said = divergence(model(batch.inputs, batch.categories), again, 1.0)
    by_hand = 0.5 * phase.task.nats(again, batch.targets) + 0.5 * said
    by_hand += 0.1 * missed.view(len(nats), -1).sum(1) / len(read)
    torch.testing.assert_close(found, by_hand)
    found.sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in learner._weights.values())
    assert model.network.get_submodule("model.embed_tokens").weight.grad.abs().max() > 0


def test_a_model_as_it_was_speaks_along_labels_routes_whatever_becomes_of_it() -> None:
    phase, model = of(1)
    lean = phase.config.training.model_copy(update={"checkpoint_activations": True})
    lately = joint._Lately(model, phase.task, CONFIG)
    lately.learner = Contestant(model, lean)
    batch = lately.learner.arranged(phase.task.train_batch(0))
    with torch.no_grad():
        wanted = model.eval()(batch.inputs, batch.categories)
        torch.testing.assert_close(lately.outputs(batch), wanted)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(lately.outputs(batch), wanted)
    assert len(lately.streams) == 2


@torch.no_grad()
def test_who_teaches_is_the_mean_of_what_the_learner_was_at_each_step_whatever_its_passes() -> None:
    phase, model = of(1)
    lately = joint._Lately(model, phase.task, CONFIG)
    learner = lately.learner = Contestant(model, CONFIG.training)
    batch, fade, steps = learner.arranged(phase.task.train_batch(0)), 1 - 1 / joint._MEMORY, 3
    by_hand = [fade**steps * parameter for parameter in model.parameters()]
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        for mean, parameter in zip(by_hand, model.parameters(), strict=True):
            parameter.add_(torch.randn_like(parameter))
            mean += (1 - fade) * fade ** (steps - step) * parameter
        learner.step = step
        for part in range(2):
            lately.outputs(batch.shard(part, 2))
    now = [parameter.clone() for parameter in model.parameters()]
    for parameter, mean in zip(model.parameters(), by_hand, strict=True):
        parameter.copy_(mean)
    torch.testing.assert_close(lately.outputs(batch), model.eval()(batch.inputs, batch.categories))
    for parameter, own in zip(model.parameters(), now, strict=True):
        parameter.copy_(own)
    assert not torch.allclose(lately.outputs(batch), model(batch.inputs, batch.categories))


def test_network_and_twin_are_held_to_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    strayed = []
    for held in (Distillation(weight=0.5), Distillation(weight=1.0, stream=100.0)):
        monkeypatch.setattr(joint, "_SELF", held)
        monkeypatch.setattr(joint, "_RATE_ALONE", joint._RATE)
        phase, model = of(12)
        dense = SplitModel(phase.task.build(), "abcd").eval()
        batch = Contestant(model, CONFIG.training).arranged(phase.task.train_batch(0))
        known = batch.inputs, batch.categories
        with torch.no_grad():
            said = [each(*known) for each in (model, dense)]
        phase(model, dense)
        with torch.no_grad():
            strayed.append(
                [
                    float(divergence(was, each(*known), 1.0).mean())
                    for was, each in zip(said, (model, dense), strict=True)
                ]
            )
    assert all(held < 0.8 * free for free, held in zip(*strayed, strict=True))


def test_sharpened_routers_choose_as_before_and_foretell_better() -> None:
    distil, model = coloured()
    phase = Joint(distil.task, CONFIG, 1)
    learner, batch = joint._Learner(model, phase._training(1.0), distil.start(model)), phase.task.train_batch(0)
    was = learner.outputs(batch)
    before = learner.missed
    learner.sharpen(batch)
    assert torch.equal(learner.outputs(batch), was)
    assert before is not None
    assert learner.missed is not None
    assert learner.missed.sum() < 0.5 * before.sum()


def test_a_network_that_learned_with_its_routers_is_better_off_with_them() -> None:
    phase, model = of(40)
    dense = SplitModel(phase.task.build(), "abcd")
    for each in (model, dense):
        train(Contestant(each, CONFIG.training), phase.task, Solo(), CONFIG.training, 60, 60, lambda *_: None)
        each.eval()
    frozen = Distil(phase.task, CONFIG)(copy.deepcopy(model))
    again = copy.deepcopy(model)
    routers, report = phase(model, dense)
    after = Distil(phase.task, CONFIG)(model, routers)
    assert after.report.router[MEAN] < frozen.report.router[MEAN] - 0.05
    assert report.label == frozen.report.label
    assert (report.steps, report.tokens) == (40, 40 * CONFIG.training.rows * phase.task.units_per_row)
    assert report.dense is not None
    assert report.dense[MEAN] < frozen.report.label[MEAN]
    assert not any(module.training for module in (*model.modules(), *dense.modules()))
    same, without_twin = phase(again)
    assert without_twin.dense is None
    for site, weight in routers.weights.items():
        assert torch.equal(weight, same.weights[site])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_cannot_learn_jointly_is_told_in_one_line() -> None:
    phase, model = of(1)
    with pytest.raises(ValueError, match="got 0 steps, wanted one at least"):
        Joint(phase.task, CONFIG, 0)
    other = SplitModel(phase.task.build(), "abdc", model.partition)
    with pytest.raises(ValueError, match="is for the whole split model"):
        phase(other)
    training = CONFIG.training.model_copy(update={"learning_rate": 1e6, "explosion": 1.01})
    hot = CONFIG.model_copy(update={"training": training})
    with pytest.raises(ValueError, match=r"joint training: step \d+: .*; take fewer steps, or export without"):
        Joint(phase.task, hot, 5)(model)
