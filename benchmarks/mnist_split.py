"""The split autoencoder of Cloud et al. 2024 ("Gradient Routing", arXiv 2410.04332, section 4.1), routed and not.

An autoencoder of MNIST, 784-2048-512-32 and back, ReLU, learns the mean absolute error of pixels in -1..1. Routed,
digits 5-9 teach the encoder through the first half of the code alone, and 0-4 through the second: a stop-gradient at
the other half, row by row in mixed batches (routing.gradients: activations). Each half's certificate, a decoder of its
own, sees that half and learns all digits: what it cannot draw is not there. Regularisation is the published one: the L1
norm of the code, and the mean absolute correlation between units of the two halves. ``constant`` is what one and the
same image gets for all: each pixel's median.

Published (20 runs of 6,000 steps of 2,048 rows; the certificate of the half that 5-9 are routed to; printed as MAE, but
computed as MSE) are the goals. Needs ``mnist`` in the folder that MOEIFY_DATA names. The full set-up is for a GPU, used
if there is one: a step is 130 GFLOP. ``--steps 1500 --rows 128 --bfloat16`` takes about a minute and a half of one core
a run, where the processor multiplies in bfloat16; with ``--hidden 512 128``, a fifth. --quick is a smaller network on
few images.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from attribution.sites import Site
from benchmarks.report import Cell, Figure, parser, report
from moeify.data.images import load
from moeify.data.root import data_root
from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.learning import damp
from moeify.splitting.partition import Partition

HALVES = ("5-9", "0-4")
"""Digits that are routed to the first and to the second half of the code."""
CODE = 32
L1, CORRELATION = 3e-3, 0.1
"""Weights of the regularisers."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    routed: bool
    regularised: bool
    published: tuple[float, float]
    """The certificate's error on 0-4 and on 5-9."""


ARMS = (
    Arm("routed", True, True, (0.32, 0.08)),
    Arm("routed_unregularised", True, False, (0.32, 0.32)),
    Arm("regularised", False, True, (0.13, 0.13)),
    Arm("neither", False, False, (0.08, 0.09)),
)


@dataclass(frozen=True)
class Setting:
    """How large and how long."""

    hidden: tuple[int, ...]
    steps: int
    rows: int
    bfloat16: bool
    device: torch.device


@dataclass(frozen=True)
class Digits:
    """Images [rows 784] in -1..1, and to which half of the code each belongs."""

    images: Tensor
    halves: Tensor


class SplitAutoencoder(nn.Module):
    """Encoder, decoder, and a certificate for each half of the code."""

    def __init__(self, hidden: Sequence[int]) -> None:
        super().__init__()
        inputs, down, up = 28 * 28, list(hidden), list(reversed(hidden))
        self.encoder = _layers([inputs, *down, CODE], bias=False)
        self.decoder = _layers([CODE, *up, inputs])
        self.certificates = nn.ModuleList(_layers([CODE // 2, *up, inputs]) for _ in HALVES)

    def certified(self, code: Tensor) -> list[Tensor]:
        """Return what each certificate draws of its half; nothing flows back into the code."""
        halves = code.detach().chunk(2, dim=1)
        return [certificate(half) for certificate, half in zip(self.certificates, halves, strict=True)]


def _layers(sizes: Sequence[int], *, bias: bool = True) -> nn.Sequential:
    """Return linear layers with ReLU between; ``bias``: of the last one."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    layers[-2] = nn.Linear(sizes[-2], sizes[-1], bias=bias)
    return nn.Sequential(*layers[:-1])


def main() -> None:
    """Train every arm with every seed and report what each half holds."""
    asked = arguments()
    try:
        train, test = (_digits(each.pixels, each.labels) for each in load("mnist", data_root(None, Path.cwd())))
    except ValueError as error:
        raise SystemExit(f"mnist_split: skipped, {error}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(tuple(asked.hidden), asked.steps, asked.rows, asked.bfloat16, device)
    if asked.quick:
        setting = Setting((256, 64), 60, 128, False, torch.device("cpu"))
        train, test = (Digits(each.images[:4000], each.halves[:4000]) for each in (train, test))
    errors: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    median = train.images.median(0).values
    errors["constant"] = [_errors({"median of the train split": median}, test.images, test)]
    for seed in range(asked.seeds):
        for arm in ARMS:
            began = time.perf_counter()
            found = evaluate(trained(arm, setting, train, seed), test, setting)
            errors[arm.name].append(found)
            shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if "mse" in name)
            print(f"seed {seed}, {arm.name}, {time.perf_counter() - began:.0f} s: {shown}", file=sys.stderr, flush=True)
    figures = [
        Figure(
            f"{arm.name}_mse_{digits.replace('-', '_')}",
            statistics.mean(each[f"certificate of 5-9, mse, {digits}"] for each in errors[arm.name]),
            f"published {published:.2f}",
        )
        for arm in ARMS
        for digits, published in zip(("0-4", "5-9"), arm.published, strict=True)
    ]
    report("mnist_split", _table(errors), figures, asked.json, quick=asked.quick)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: 1)")
    made.add_argument("--steps", type=int, default=6000, help="of each run (default: 6000, as published)")
    made.add_argument("--rows", type=int, default=2048, help="images a step (default: 2048, as published)")
    made.add_argument("--hidden", type=int, nargs="+", default=[2048, 512], help="widths (default: 2048 512)")
    made.add_argument("--bfloat16", action="store_true", help="multiply matrices in bfloat16 while training")
    asked = made.parse_args()
    for name in ("seeds", "steps", "rows", "hidden"):
        if np.min(given := getattr(asked, name)) < 1:
            made.error(f"--{name}: got {given}, wanted 1 or more")
    return asked


def _digits(pixels: np.ndarray, labels: np.ndarray) -> Digits:
    images = torch.tensor(pixels).flatten(1).float() / 127.5 - 1
    return Digits(images, (torch.tensor(labels) < 5).long())


def trained(arm: Arm, setting: Setting, train: Digits, seed: int) -> SplitAutoencoder:
    """Return a trained autoencoder with its certificates; every arm of a seed begins and goes on alike."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SplitAutoencoder(setting.hidden).to(setting.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=5e-5)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(setting.steps):
        if len(order) < setting.rows:
            order = torch.randperm(len(train.images), generator=random)
        rows, order = order[: setting.rows], order[setting.rows :]
        rows = rows[torch.argsort(train.halves[rows], stable=True)]
        images, halves = train.images[rows].to(setting.device), train.halves[rows]
        loss = objective(arm, model, images, halves, bfloat16=setting.bfloat16)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model


def objective(arm: Arm, model: SplitAutoencoder, images: Tensor, halves: Tensor, *, bfloat16: bool = False) -> Tensor:
    """Return what is minimised; rows of each half lie side by side."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        code = model.encoder(images)
        drawn, certified = model.decoder(_routed(code, halves) if arm.routed else code), model.certified(code)
    miss = (drawn.to(images.dtype) - images).abs().mean(1)
    loss = torch.stack([miss[halves.to(miss.device) == half].mean() for half in range(2)]).sum()
    for each in certified:
        loss = loss + (each.to(images.dtype) - images).abs().mean()
    if arm.regularised:
        code = code.to(images.dtype)
        loss = loss + L1 * code.abs().mean(0).sum() + CORRELATION * _correlation(code)
    return loss


def _routed(code: Tensor, halves: Tensor) -> Tensor:
    """Return the code, each half of which is taught by its own digits alone."""
    site = Site("code", "decoder", CODE)
    experts = [{"categories": [half], "units": 0.5} for half in HALVES]
    routing = Routing.model_validate({"gradients": "activations", "experts": experts})
    router, undivided = GradientRouter(routing, HALVES, [site], seed=0), Partition.undivided(HALVES, [site])
    learning = router.learning(undivided, halves, torch.ones_like(halves, dtype=torch.bool))
    assert learning is not None
    return damp(code, learning.damped(site.name))


def _correlation(code: Tensor) -> Tensor:
    """Return the mean absolute correlation between units of the two halves."""
    first, second = ((code - code.mean(0)) / code.std(0)).chunk(2, dim=1)
    return (first.t() @ second / len(code)).abs().mean()


@torch.no_grad()
def evaluate(model: SplitAutoencoder, test: Digits, setting: Setting) -> dict[str, float]:
    """Return mean errors of pixels, by who draws, kind of error and digits."""
    images = test.images.to(setting.device)
    code = model.encoder(images)
    certificates = zip((f"certificate of {half}" for half in HALVES), model.certified(code), strict=True)
    return _errors({**dict(certificates), "decoder": model.decoder(code)}, images, test)


def _errors(pictures: Mapping[str, Tensor], images: Tensor, test: Digits) -> dict[str, float]:
    found = {}
    for name, drawn in pictures.items():
        miss = drawn - images
        for kind, error in (("mse", miss.square()), ("mae", miss.abs())):
            for half in (1, 0):
                found[f"{name}, {kind}, {HALVES[half]}"] = error.mean(1).cpu()[test.halves == half].mean().item()
    return found


def _table(errors: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for arm, runs in errors.items():
        for name in dict.fromkeys(key.split(", ")[0] for key in runs[0]):
            row: dict[str, Cell] = {"arm": arm, "drawn by": name}
            for kind in ("mse", "mae"):
                for half in reversed(HALVES):
                    values = [run[f"{name}, {kind}, {half}"] for run in runs]
                    row[f"{kind} {half}"] = statistics.mean(values)
                    row[f"± {kind} {half}"] = _interval(values)
            rows.append(row)
    return rows


def _interval(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % interval (Student's t); None of one value."""
    if len(values) < 2:
        return None
    spread = statistics.stdev(values) / len(values) ** 0.5
    return float(stats.t.ppf(0.975, len(values) - 1)) * spread


if __name__ == "__main__":
    main()
