"""Held-out losses row by row, and how sure a tax is."""

import pytest
import torch

from moeify.evaluation import RowLosses, held_out_loss, row_losses, tax_error
from moeify.loop import run
from moeify.split_model import SplitModel
from moeify.world import Solo
from tests.toy import ToyTask, toy_config


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
    assert tax_error(same_rise, twin) == pytest.approx(0.0, abs=1e-12)
    # Rises of the first category .0 .3 .6 (variance .09), of the second all .1: sqrt(.09 / 3 + 0) / 2.
    assert tax_error(losses(5.0, 1.1, 2.3, 9.1, 4.6, 3.1), twin) == pytest.approx((0.09 / 3) ** 0.5 / 2)


def test_draws_of_rows_scatter_as_the_error_says() -> None:
    generator = torch.Generator().manual_seed(0)
    rises, errors = [], []
    for _ in range(400):
        rows = torch.randn(60, generator=generator, dtype=torch.float64)
        rise = 0.2 + torch.randn(60, generator=generator, dtype=torch.float64) * (1 + torch.arange(60) % 2)
        mine, twin = (RowLosses(each, torch.arange(60) % 2) for each in (rows + rise, rows))
        errors.append(tax_error(mine, twin))
        rises.append(rise.mean().item())
    assert torch.tensor(rises).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.1)


def test_every_round_and_the_result_say_how_sure_their_tax_is() -> None:
    result = run(toy_config(), ToyTask(toy_config()))
    assert result.tax_error is not None
    assert 0 < result.tax_error < 1
    assert all(ended.tax_error is not None for ended in result.rounds)
