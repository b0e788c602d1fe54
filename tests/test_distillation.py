import math

import pytest
import torch

from moeify.distillation import Teacher, divergence, network_hash
from moeify.models.build import logits
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation
from moeify.routed.split_model import SplitModel
from tests.networks import tiny_decoder
from tests.toy import TEXT_CONFIG, ToyTextTask


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
    found = teacher.loss(inputs, student, nats)
    with torch.no_grad():
        wanted = logits(tiny_decoder("llama"), inputs)
    torch.testing.assert_close(found, (1 - weight) * nats + weight * divergence(wanted, student, 1.0))
    found.sum().backward()
    assert student.grad is not None
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


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
