"""Held-out losses row by row, and how sure a tax is."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from moeify.evaluation import RowLosses, held_out_loss, own_other_errors, row_losses, tax_error, tax_errors
from moeify.loop import run
from moeify.recipe.parallel import Replicate
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, HeldOut
from moeify.world import Solo, T
from tests.toy import TEXT_CONFIG, ToyTask, ToyTextTask, toy_config


class Pair(ToyTask):
    """Two categories of examples."""

    categories = ("a", "b")


class TextPair(ToyTextTask):
    """Two categories of rows of tokens."""

    categories = ("a", "b")


TASK = Pair(toy_config())


def losses(*values: float) -> RowLosses:
    """Rows of two categories in turn."""
    return RowLosses(torch.tensor(values, dtype=torch.float64), torch.arange(len(values)) % 2)


def test_rows_average_to_the_loss_of_each_category() -> None:
    config = toy_config()
    task = ToyTask(config)
    model = SplitModel(task.build(), task.categories)
    rows = row_losses(model, task, Solo(), config.evaluation, "test")
    assert len(rows.nats_R) == 4 * 32
    batches = list(task.held_out_batches("test", 32, 16))
    with torch.no_grad():
        direct = torch.cat([task.nats(model(b.inputs, b.categories), b.targets) for b in batches])
    torch.testing.assert_close(rows.nats_R.float(), direct)
    wanted = {c: direct[torch.cat([b.categories for b in batches]) == i].mean().item() for i, c in enumerate("abcd")}
    assert held_out_loss(model, task, Solo(), config.evaluation, "test") == pytest.approx(wanted, rel=1e-5)


def test_the_error_of_a_tax_is_that_of_paired_rows() -> None:
    twin = losses(5.0, 1.0, 2.0, 9.0, 4.0, 3.0)
    same_rise = losses(5.1, 1.1, 2.1, 9.1, 4.1, 3.1)
    assert tax_error(same_rise, twin, TASK) == pytest.approx(0.0, abs=1e-12)
    # Rises of the first category .0 .3 .6 (variance .09), of the second all .1: sqrt(.09 / 3 + 0) / 2.
    assert tax_error(losses(5.0, 1.1, 2.3, 9.1, 4.6, 3.1), twin, TASK) == pytest.approx((0.09 / 3) ** 0.5 / 2)
    errors = tax_errors(losses(5.0, 1.1, 2.3, 9.1, 4.6, 3.1), twin, TASK)
    assert errors == pytest.approx({"a": (0.09 / 3) ** 0.5, "b": 0.0}, abs=1e-12)


def test_a_removals_error_is_that_of_the_same_rows_with_and_without_the_expert() -> None:
    intact = losses(5.0, 1.0, 2.0, 9.0, 4.0, 3.0)
    removed = {"e": losses(5.0, 1.0, 2.3, 9.0, 4.6, 3.0), "one": losses(5.5, 1.0)}
    found = own_other_errors({"e": removed["e"]}, intact, TASK)
    assert found["a"] == pytest.approx({"e": (0.09 / 3) ** 0.5})
    assert found["b"] == {"e": 0.0}
    assert own_other_errors({"one": removed["one"]}, losses(5.0, 1.0), TASK) == {"a": {}, "b": {}}


def test_every_rise_of_a_run_has_its_error() -> None:
    config = toy_config()
    result = run(config, ToyTask(config))
    for category, rises in result.own_other.items():
        errors = result.own_other_error[category]
        assert errors.keys() == rises.keys()
        assert all((errors[expert] > 0.0) == (rise != 0.0) for expert, rise in rises.items())


def test_draws_of_rows_scatter_as_the_error_says() -> None:
    generator = torch.Generator().manual_seed(0)
    rises, errors = [], []
    for _ in range(400):
        rows = torch.randn(60, generator=generator, dtype=torch.float64)
        rise = 0.2 + torch.randn(60, generator=generator, dtype=torch.float64) * (1 + torch.arange(60) % 2)
        mine, twin = (RowLosses(each, torch.arange(60) % 2) for each in (rows + rise, rows))
        error = tax_error(mine, twin, TASK)
        assert error is not None
        errors.append(error)
        rises.append(rise.mean().item())
    assert torch.tensor(rises).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.1)


def test_the_error_is_per_unit_and_unknown_for_single_rows_and_infinite_losses() -> None:
    twin, mine = losses(1.0, 1.0, 2.0, 2.0), losses(1.0, 1.0, 2.6, 2.2)
    by_example, by_token = tax_error(mine, twin, TASK), tax_error(mine, twin, TextPair(toy_config(**TEXT_CONFIG)))
    assert by_example is not None
    assert by_token == pytest.approx(by_example / ToyTextTask.units_per_row)
    assert tax_error(losses(1.0, 2.0, 3.0), losses(1.0, 1.0, 1.0), TASK) is None
    assert tax_error(losses(1.0, 2.0, 3.0, float("inf")), losses(1.0, 1.0, 1.0, 1.0), TASK) is None


class Rank:
    """One of two ranks, whose sums arrive nowhere: what it alone knows."""

    size = 2
    device = torch.device("cpu")
    parallel = Replicate()

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def share(self, value: T) -> T:
        return value

    def gather(self, value: T) -> list[T]:
        return [value, value]


def test_two_ranks_rows_add_up_to_the_whole_whatever_their_ids() -> None:
    class Numbered(ToyTask):
        def held_out_batches(self, split: HeldOut, rows: int, rows_at_once: int) -> Iterator[Batch]:
            for batch in super().held_out_batches(split, rows, 13):  # of which a rank gets six rows or seven
                yield dataclasses.replace(batch, ids=batch.ids + 1000)

    config = toy_config()
    task = Numbered(config)
    model = SplitModel(task.build(), task.categories)
    whole = row_losses(model, task, Solo(), config.evaluation, "test")
    parts = [row_losses(model, task, Rank(rank), config.evaluation, "test") for rank in range(2)]
    torch.testing.assert_close(parts[0].nats_R + parts[1].nats_R, whole.nats_R, rtol=1e-6, atol=0)
    assert all(torch.equal(part.categories_R, whole.categories_R) for part in parts)
    assert sum(int((part.nats_R > 0).sum()) for part in parts) == len(whole.nats_R) == 128


def test_every_round_and_the_result_say_how_sure_their_tax_is() -> None:
    result = run(toy_config(), ToyTask(toy_config()))
    assert result.tax_error is not None
    assert 0 < result.tax_error < 1
    for told in (result, *result.rounds):
        assert told.tax_error is not None
        assert told.tax_error == pytest.approx(math.hypot(*told.tax_error_by_category.values()) / 4)
    gaps = [ended.gap for ended in result.rounds]
    assert all(gap is not None and gap < 1e-12 for gap in gaps)


def test_the_result_says_how_sure_the_split_models_place_among_its_controls_is() -> None:
    config = toy_config(controls=("random", "told"))
    result = run(config, ToyTask(config))
    assert set(result.error_over) == {"random", "told"}
    assert all(0 < error < 1 for error in result.error_over.values())
