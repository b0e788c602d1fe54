import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.distillation import Teacher, divergence, network_hash, strayed, teaching
from moeify.models.build import logits
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from moeify.task import Batch
from moeify.training import Contestant, train
from moeify.world import Solo
from tests.networks import CATEGORIES, rows_for, tiny_decoder
from tests.toy import TEXT_CONFIG, ToyTextTask

TREE = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]})
LAYERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), "model.layers"),
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "vit": "vit.layers",
}
"""Family -> where its layers are; the residual stream behind a feed-forward block is what its layer returns."""


def rows_of(inputs: Tensor) -> Batch:
    """Rows whose targets ask every position."""
    places = torch.arange(len(inputs))
    return Batch(inputs, inputs, places, places)


def slow_divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> list[float]:
    """A row at a time, a token at a time, a word at a time."""
    rows = []
    for wanted_PV, got_PV in zip(teacher.tolist(), student.tolist(), strict=True):
        total = 0.0
        for wanted_V, got_V in zip(wanted_PV, got_PV, strict=True):
            p, q = ([math.exp(x / temperature) for x in each] for each in (wanted_V, got_V))
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        rows.append(total * temperature**2)
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_the_sum_over_words_and_tokens_of_each_row(temperature: float) -> None:
    random = torch.Generator().manual_seed(0)
    teacher, student = 3 * torch.randn(2, 4, 5, 7, dtype=torch.float64, generator=random)
    found = divergence(teacher, student, temperature)
    torch.testing.assert_close(found, torch.tensor(slow_divergence(teacher, student, temperature), dtype=torch.float64))
    assert torch.equal(divergence(teacher, teacher, temperature), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_students_loss_is_shared_between_its_rows_and_the_teacher(weight: float) -> None:
    teacher = Teacher(tiny_decoder("llama"), Distillation(weight=weight))
    inputs = torch.randint(40, (3, 6), generator=torch.Generator().manual_seed(0))
    student = torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    nats = student.square().sum((1, 2))
    found = teacher.loss(rows_of(inputs), student, nats)
    with torch.no_grad():
        wanted = logits(tiny_decoder("llama"), inputs)
    torch.testing.assert_close(found, (1 - weight) * nats + weight * divergence(wanted, student, 1.0))
    found.sum().backward()
    assert student.grad is not None
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_how_far_a_stream_has_strayed_is_told_place_by_place() -> None:
    random = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 6, 5, dtype=torch.float64, generator=random)
    teacher[0] *= 1e3  # one long place does not drown the others
    teacher[4] = 0.0
    squares = [sum(b**2 for b in its) for its in teacher.tolist()]
    squares[4] = 2**-52 * sum(squares[3:]) / 3
    places = [
        sum((a - b) ** 2 for a, b in zip(mine, its, strict=True)) / square
        for mine, its, square in zip(student.tolist(), teacher.tolist(), squares, strict=True)
    ]
    wanted = torch.tensor([sum(places[:3]) / 3, sum(places[3:]) / 3], dtype=torch.float64)
    torch.testing.assert_close(strayed(teacher, student, 2), wanted)
    by_rows = (each.reshape(2, 3, 5) for each in (teacher, student))
    torch.testing.assert_close(strayed(*by_rows, 2), wanted)


def cut_student(network: nn.Module) -> SplitModel:
    """The network with half of each block's units in two experts."""
    model = SplitModel(network, CATEGORIES)
    model.repartition(Partition(TREE, {site.name: (16, 8, 8) for site in model.space.readers}))
    return model


def layer_outputs(network: nn.Module, layers: str, inputs: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []

    def hear(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hear) for layer in network.get_submodule(layers).children()]
    logits(network, inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", LAYERS)
def test_a_cut_student_keeps_to_the_teachers_stream_behind_each_layer(family: str) -> None:
    teacher = Teacher(tiny_decoder(family), Distillation(stream=0.7), units_per_row=12)
    student = cut_student(tiny_decoder(family)).eval()
    inputs, rows = rows_for(student.network, 4), torch.arange(4)
    with teaching(teacher, student) as taught:
        assert taught is not None
        outputs = student(inputs, rows)
        nats = outputs.flatten(1).square().sum(1)
        found = taught.loss(rows_of(inputs), outputs, nats)
    layers = LAYERS[family]
    with student.masked():  # each row along its route, by the oracle
        student(inputs, rows)
        mine = layer_outputs(student.network, layers, inputs)
    its = layer_outputs(teacher.network, layers, inputs)
    apart = [strayed(wanted, got, 4) for wanted, got in zip(its, mine, strict=True)]
    assert len(apart) == len(teacher.streams) >= 2
    wanted = teacher.loss(rows_of(inputs), outputs, nats) + 0.7 * 12 * sum(apart) / len(apart)
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    assert all(parameter.grad is not None for name, parameter in student.network.named_parameters() if "mlp" in name)
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    assert not any(module._forward_hooks for module in teacher.network.modules())


def test_where_no_stream_is_asked_for_the_distribution_teaches_alone() -> None:
    plain, student = Teacher(tiny_decoder("llama"), Distillation()), cut_student(tiny_decoder("llama"))
    with teaching(plain, student) as taught:
        assert taught is plain
    with teaching(None, student) as taught:
        assert taught is None


def test_the_teacher_itself_has_nothing_to_learn_from_its_stream() -> None:
    teacher = Teacher(tiny_decoder("llama"), Distillation(weight=1.0, stream=1e3), units_per_row=12)
    student = SplitModel(tiny_decoder("llama"), CATEGORIES).eval()
    inputs, nats = rows_for(student.network, 4), torch.ones(4)
    with teaching(teacher, student) as taught:
        assert taught is not None
        found = taught.loss(rows_of(inputs), student(inputs, torch.arange(4)), nats)
    torch.testing.assert_close(found, torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lean", [{"accumulate": 2}, {"checkpoint_activations": True}])
def test_passes_and_activations_that_are_computed_again_change_nothing(lean: dict[str, Any]) -> None:
    found = []
    for training in ({}, lean):
        config = RunConfig.model_validate({**TEXT_CONFIG, "training": {**TEXT_CONFIG["training"], **training}})  # type: ignore[dict-item]
        task = ToyTextTask(config)
        teacher = Teacher(copy.deepcopy(task.build()), Distillation(stream=2.0), units_per_row=task.units_per_row)
        contestant = Contestant(cut_student(task.build()), config.training)
        with teaching(teacher, contestant.model) as taught:
            train(contestant, task, Solo(), config.training, 3, 9, lambda *_: None, taught)
        found.append(contestant.tensors())
    plain, other = found
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gemma2", "bert"])
def test_a_network_without_such_a_stream_is_named(family: str) -> None:
    with pytest.raises(ValueError, match=r"^distillation\.stream: got 0\.5, wanted 0: behind the blocks of \w+ there"):
        Teacher(tiny_decoder(family), Distillation(stream=0.5))
    Teacher(tiny_decoder(family), Distillation())


def test_the_hash_is_the_same_before_and_after_routing_and_tells_one_weight() -> None:
    network = tiny_decoder("gpt2")
    before = network_hash(network)
    assert network_hash(SplitModel(tiny_decoder("gpt2"), ("a", "b")).network) == before
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1
    assert network_hash(network) != before


def test_a_teacher_that_is_not_the_network_the_run_began_with_is_refused() -> None:
    task = ToyTextTask(RunConfig.model_validate(TEXT_CONFIG))
    teacher = Teacher(task.build(), Distillation())
    teacher.check(network_hash(task.build()))
    teacher.check("")
    with pytest.raises(ValueError, match=r"^the run began with a network whose hash is 0000.*put the checkpoint back"):
        teacher.check("0" * 64)
