"""The split autoencoder's gradients, held against the published way: decode once a half, the other one detached."""

import sys

import pytest
import torch

from benchmarks.mnist_split import (
    ARMS,
    HALVES,
    Arm,
    Digits,
    Setting,
    SplitAutoencoder,
    evaluate,
    main,
    objective,
    trained,
)

SETTING = Setting((24, 12), 1, 40, False, torch.device("cpu"))


def digits() -> Digits:
    random = torch.Generator().manual_seed(0)
    return Digits(torch.rand(40, 784, generator=random) * 2 - 1, torch.randint(2, (40,), generator=random))


def by_hand(arm: Arm, model: SplitAutoencoder, data: Digits) -> torch.Tensor:
    images, code = data.images, model.encoder(data.images)
    first, second = code[:, :16], code[:, 16:]
    seen = (
        torch.cat([first, second.detach() if arm.routed else second], 1),
        torch.cat([first.detach() if arm.routed else first, second], 1),
    )
    loss = torch.zeros(())
    for half in range(len(HALVES)):
        miss = (model.decoder(seen[half]) - images).abs()
        loss = loss + miss[data.halves == half].mean()
        loss = loss + (model.certificates[half]((first, second)[half].detach()) - images).abs().mean()
    if arm.regularised:
        unit = (code - code.mean(0)) / code.std(0)
        correlation = (unit[:, :16].T @ unit[:, 16:] / len(code)).abs().mean()
        loss = loss + 3e-3 * code.abs().mean(0).sum() + 0.1 * correlation
    return loss


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_gradients_of_a_mixed_batch_are_the_published_ones(arm: Arm) -> None:
    torch.manual_seed(0)
    model, data = SplitAutoencoder(SETTING.hidden).double(), digits()
    data = Digits(data.images.double(), data.halves.sort().values)
    names, parameters = zip(*model.named_parameters(), strict=True)
    mixed = objective(arm, model, data.images, data.halves)
    wanted = by_hand(arm, model, data)
    torch.testing.assert_close(mixed, wanted)
    found = zip(torch.autograd.grad(mixed, parameters), torch.autograd.grad(wanted, parameters), strict=True)
    for name, (one, other) in zip(names, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_errors_are_means_over_pixels_of_each_half() -> None:
    data = digits()
    model = trained(ARMS[0], SETTING, data, 0)
    with torch.no_grad():
        miss = model.certificates[1](model.encoder(data.images)[:, 16:]) - data.images
    found = evaluate(model, data, SETTING)
    high = data.halves == HALVES.index("5-9")
    assert found["certificate of 0-4, mse, 5-9"] == pytest.approx(miss[high].square().mean().item(), rel=1e-4)
    assert found["certificate of 0-4, mae, 0-4"] == pytest.approx(miss[~high].abs().mean().item(), rel=1e-4)


def test_without_data_it_says_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEIFY_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["mnist_split", "--quick"])
    with pytest.raises(SystemExit, match=r"mnist_split: skipped, .*MOEIFY_DATA is not set"):
        main()
