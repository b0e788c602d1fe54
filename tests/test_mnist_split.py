"""The split autoencoder's gradients, held against the published way: decode once a half, the other one detached."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attribution.sites import Site
from benchmarks.mnist_split import main
from moeify.tasks.build import build_task
from pipelines.studies.mnist_split import (
    DIGITS,
    Setting,
    SplitAutoencoder,
    arms,
    correlation,
    errors,
    laplace_nats,
    laplace_sample,
    objective,
    order_by_attribution,
    part_of,
    value_of,
)
from pipelines.studies.study import Bench

SETTING = Setting((24, 12), routed=(0, 1))
SETTINGS = [
    SETTING,
    replace(SETTING, regularised=False),
    replace(SETTING, routed=()),
    replace(SETTING, routed=(0,)),
    replace(SETTING, parts=DIGITS, routed=tuple(range(10))),
]


def bench() -> Bench:
    config = arms("quick")[0].config
    return Bench(config, build_task(config, cache=Path(), base=Path()), Path())


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(40, 784, generator=random, dtype=torch.float64) * 2 - 1
    return images, torch.arange(40) % 10


def by_hand(setting: Setting, model: SplitAutoencoder, images: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Decode once for each part, all that its digits may not teach detached."""
    code = model.encoder(images)
    pieces = code[:, model.order].chunk(len(setting.parts), dim=1)
    loss = torch.zeros((), dtype=code.dtype)
    for number, each in enumerate(pieces):
        mine = number in setting.routed
        seen = torch.cat([p if not mine or k == number else p.detach() for k, p in enumerate(pieces)], 1)
        miss = (model.decoder(seen[:, model.order.argsort()]) - images).abs()
        loss = loss + miss[part == number].mean() * 2 / len(pieces)
        loss = loss + (model.certificates[number](each.detach()) - images).abs().mean()
    if setting.regularised:
        crossed = []
        for i, one in enumerate(pieces):
            for other in pieces[i + 1 :]:
                table = torch.corrcoef(torch.cat([one, other], 1).t())
                crossed.append(table[: one.shape[1], one.shape[1] :].abs().mean() * (len(code) - 1) / len(code))
        loss = loss + 3e-3 * code.abs().mean(0).sum() + 0.1 * torch.stack(crossed).mean()
    return loss


@pytest.mark.parametrize("setting", SETTINGS, ids=["both", "unregularised", "none", "one side", "ten parts"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gradients_of_a_mixed_batch_are_the_published_ones(setting: Setting, shuffled: bool) -> None:
    torch.manual_seed(0)
    model, (images, digit) = SplitAutoencoder(784, setting).double(), rows()
    if shuffled:
        model.order.copy_(torch.randperm(setting.code))
    part, order = part_of(setting)[digit].sort(stable=True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    mixed = objective(model, setting, images[order], part, routing=True)
    wanted = by_hand(setting, model, images[order], part)
    torch.testing.assert_close(mixed, wanted)
    found = zip(torch.autograd.grad(mixed, parameters), torch.autograd.grad(wanted, parameters), strict=True)
    for name, (one, other) in zip(names, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_every_arm_of_the_quick_form_ends_with_errors() -> None:
    prepared = bench()
    for arm in arms("quick"):
        found = arm.work(prepared)
        assert set(found) == {f"{kind}_{of}" for kind in ("mse", "mae") for of in ("other", "own", "decoder")}
        assert all(0.0 < value < 4.0 for value in found.values()), arm.name


def test_errors_are_means_over_pixels_of_own_and_other_digits() -> None:
    prepared, asked = bench(), arms("quick")[0].config.evaluation
    torch.manual_seed(0)
    model = SplitAutoencoder(64, SETTING)
    batches = list(prepared.task.held_out_batches("test", asked.test_rows, asked.rows_at_once))
    images, high = torch.cat([b.inputs for b in batches]) * 2 - 1, torch.cat([b.categories for b in batches]) >= 5
    with torch.no_grad():
        miss = model.certificates[0](model.encoder(images)[:, :16]) - images
    found = errors(model, SETTING, prepared)
    assert found["mse_own"] == pytest.approx(miss[high].square().mean().item(), rel=1e-5)
    assert found["mae_other"] == pytest.approx(miss[~high].abs().mean().item(), rel=1e-5)


def test_attribution_gives_each_half_the_units_that_matter_to_its_digits() -> None:
    prepared = bench()
    torch.manual_seed(0)
    model = SplitAutoencoder(64, SETTING)
    order, value_UP = order_by_attribution(model, SETTING, prepared), value_of(model, SETTING, prepared)
    first, second = order[:16], order[16:]
    assert sorted(order.tolist()) == list(range(32))
    gain = value_UP[:, 0] - value_UP[:, 1]
    assert gain[first].min() >= gain[second].max() - 1e-12  # so that no exchange is worth more


def test_pixels_are_drawn_from_the_distribution_whose_nats_they_cost() -> None:
    outputs = torch.zeros(4, 50_000)
    drawn = laplace_sample(outputs, [1, 2, 3, 1])
    assert torch.equal(drawn[0], drawn[3])
    assert float(drawn.abs().mean()) == pytest.approx(1.0, abs=0.02)  # of a Laplace distribution of scale 1
    assert float(drawn.var()) == pytest.approx(2.0, abs=0.06)
    assert laplace_nats(outputs, drawn)[1] == pytest.approx(float(drawn[1].abs().sum()))


def test_correlation_is_of_units_of_different_parts() -> None:
    random = torch.Generator().manual_seed(0)
    one = torch.randn(500, 3, generator=random)
    assert float(correlation([one, one.clone()])) > 0.33
    assert float(correlation([one, torch.randn(500, 3, generator=random)])) < 0.15
    assert Site("code", "decoder.0", 32).units == SETTING.code


def test_without_data_the_benchmark_says_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEIFY_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["mnist_split"])
    with pytest.raises(SystemExit, match=r"mnist_split: skipped, .*MOEIFY_DATA is not set"):
        main()
