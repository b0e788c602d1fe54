"""CIFAR-10 (JPEG) in two halves, classes 0-4 and 5-9: features that are routed, and channels that are split.

Cloud et al. 2024 (arXiv 2410.04332) tell of such a split and print no numbers. A ResNet says the class, ten logits
whatever the half. By routing: of the features that its linear layer reads, rows of 0-4 teach the first half alone and
rows of 5-9 the second, a stop-gradient as for the split autoencoder, regularised as there or not. A row's route is then
its half of the features. Gradients of a ResNet's channels are not routed here: all convolutions learn from every row,
and so what is kept apart is what the features say, not what the maps compute. By the loop: the channels inside of
blocks are cut, and a row's route is the core and its half's expert.

A route tells the network which half a row is of, which the dense network has to find out: so there is a told twin. It
is also why accuracy along the route is to be held against accuracy along the other half's: that is what is still
there when its own part is gone. Probes, linear layers that learn all classes from a half of the features and teach
nothing else, say the same without any route.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attribution.sites import Site
from moeify.models.resnet import ResNet
from moeify.recipe.config import RunConfig
from moeify.recipe.data import ImageData
from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.learning import damp
from moeify.splitting.partition import Partition
from moeify.training import learning_rate
from pipelines.studies.recipes import UNCUT
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed, shipped_recipe
from pipelines.studies.training import run_loop

HALVES: dict[str, tuple[int, ...]] = {"0-4": (0, 1, 2, 3, 4), "5-9": (5, 6, 7, 8, 9)}
L1, CORRELATION = 3e-3, 0.1
"""Weights of the regularisers, those of the split autoencoder."""
_NETWORKS = {"quick": (4, 1), "full": (16, 3), "large": (16, 3)}
"""Channels of the first stage, and blocks a stage: a ResNet-20, the published network."""
_STEPS = {"quick": 6, "full": 400, "large": 6000}
_ROUTING = Routing.model_validate(
    {"gradients": "activations", "experts": [{"categories": [name], "units": 0.5} for name in HALVES]}
)


@dataclass(frozen=True)
class _Features:
    """Train on the halves of the features."""

    routed: bool
    regularised: bool

    def __call__(self, bench: Bench) -> Measures:
        """Train, and return accuracies on test images."""
        model = trained(bench, routed=self.routed, regularised=self.regularised)

        def read(images: Tensor, route: Tensor | None) -> Tensor:
            features = model.network.features(images)
            if route is None:
                return model.network.linear(features)
            return model.network.linear(features * model.own(route))

        found = _accuracies(bench, read)
        found["probe_own"] = _accuracy(bench, model.probed)["mean"]
        found["probe_other"] = _accuracy(bench, lambda images, half: model.probed(images, 1 - half))["mean"]
        return found


def arms(size: Size) -> tuple[Arm, ...]:
    """Return routed features, with and without regularisation, and split channels."""
    loop = recipe_of(size)
    uncut = changed(loop, rounds=UNCUT, controls=())
    return (
        Arm("dense", uncut, _Features(routed=False, regularised=False)),
        Arm("regularised", uncut, _Features(routed=False, regularised=True)),
        Arm("routed", uncut, _Features(routed=True, regularised=False)),
        Arm("routed, regularised", uncut, _Features(routed=True, regularised=True)),
        Arm("loop", loop, split),
        Arm("loop, random owners", changed(loop, partition={"owners": {"kind": "random"}}), split),
    )


def recipe_of(size: Size) -> RunConfig:
    """Return the recipe ``cifar`` with two halves."""
    steps, (width, blocks) = _STEPS[size], _NETWORKS[size]
    rounds = [{"train": steps // 4, "recover": steps // 4, "branching": 2, "separation": 0.35}]
    recipe = shipped_recipe(
        "cifar",
        model={"width": width, "blocks": blocks},
        training={"steps": steps, "rows": 16 if size == "quick" else 128 if size == "large" else 64},
        attribution={"rows": 8 if size == "quick" else 256},
        rounds=rounds,
        controls=("told",),
        evaluation={"validation_rows": 8 if size == "quick" else 256, "test_rows": 5000},
    )
    # Sections are merged, and groups of classes must not be.
    data = ImageData(kind="images", source="cifar10-jpeg", categories=HALVES, augment=size == "large")
    return recipe.model_copy(update={"data": data})


class _Parted(nn.Module):
    """A ResNet whose features are in halves, and a probe of each."""

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.network, self.size = network, network.linear.in_features // 2
        self.probes = nn.ModuleList(nn.Linear(self.size, network.linear.out_features) for _ in HALVES)

    def own(self, half: Tensor) -> Tensor:
        """Return 1 at each row's half of the features, 0 at the other [rows features]."""
        return torch.stack([half == 0, half == 1], 1).float().repeat_interleave(self.size, dim=1)

    def read(self, features: Tensor) -> list[Tensor]:
        """Return what each probe says; nothing flows back."""
        halves = features.detach().chunk(2, dim=1)
        return [probe(mine) for probe, mine in zip(self.probes, halves, strict=True)]

    def probed(self, images: Tensor, half: Tensor) -> Tensor:
        """Return for each row what the probe of this half says."""
        return torch.stack(self.read(self.network.features(images)))[half, torch.arange(len(half))]


def trained(bench: Bench, *, routed: bool, regularised: bool) -> _Parted:
    """Return a trained network with its probes; arms of a seed see the same rows in the same order."""
    training = bench.config.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.config.seed)
        network = bench.task.build()
        assert isinstance(network, ResNet)
        model = _Parted(network)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.95))
    model.train()
    for step in range(training.steps):
        batch = bench.task.train_batch(step)
        loss = objective(model, batch.inputs, batch.targets, batch.categories, routed=routed, regularised=regularised)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), training.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        optimizer.step()
    return model.eval()


def objective(
    model: _Parted, images: Tensor, classes: Tensor, half: Tensor, *, routed: bool, regularised: bool
) -> Tensor:
    """Return what is minimised; rows of each half lie side by side."""
    features = seen = model.network.features(images)
    if routed:
        site = Site("features", "linear", features.shape[1])
        router = GradientRouter(_ROUTING, tuple(HALVES), [site], seed=0)
        undivided = Partition.undivided(tuple(HALVES), [site])
        learning = router.learning(undivided, half, torch.ones_like(half, dtype=torch.bool))
        assert learning is not None
        seen = damp(features, learning.damped(site.name))
    loss = F.cross_entropy(model.network.linear(seen), classes)
    for said in model.read(features):
        loss = loss + F.cross_entropy(said, classes)
    if regularised:
        loss = loss + L1 * features.abs().mean(0).sum() + CORRELATION * _correlation(features)
    return loss


def _correlation(features: Tensor) -> Tensor:
    """Return the mean absolute correlation across halves; a feature that never varies, as after a ReLU, has none."""
    unit = (features - features.mean(0)) / features.std(0).clamp(min=1e-6)
    first, second = unit.chunk(2, dim=1)
    return (first.t() @ second / len(features)).abs().mean()


def split(bench: Bench) -> Measures:
    """Run the loop, and return the accuracies of its arms on test images."""
    result, model = run_loop(bench)
    found = _accuracies(bench, model, whole=False)
    accuracy = result.accuracy
    assert accuracy is not None
    found |= {f"before/{name}": accuracy["dense"][name] for name in HALVES} | {"before": accuracy["dense"]["mean"]}
    return found | {"told": accuracy["told"]["mean"], "active": 1.0 - model.partition.separation}


Read = Callable[[Tensor, Tensor | None], Tensor]
"""Returns logits of images, each along the route of a half; None: with everything."""


def _accuracies(bench: Bench, read: Read, *, whole: bool = True) -> Measures:
    """Return shares of test images that are read right: with everything, along their own route, and along the other."""
    found: Measures = {}
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "after": lambda images, half: read(images, half),
        "other": lambda images, half: read(images, 1 - half),
    }
    if whole:
        ways["before"] = lambda images, _: read(images, None)
    for way, run in ways.items():
        accuracy = _accuracy(bench, run)
        found |= {f"{way}/{name}": accuracy[name] for name in HALVES} | {way: accuracy["mean"]}
    return found


@torch.no_grad()
def _accuracy(bench: Bench, run: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Return half -> the share of its test images that are read right, and the mean of both."""
    asked, right = bench.config.evaluation, {name: list[bool]() for name in HALVES}
    for batch in bench.task.held_out_batches("test", asked.test_rows, asked.rows_at_once):
        hits = (run(batch.inputs, batch.categories).argmax(1) == batch.targets).tolist()
        for hit, half in zip(hits, batch.categories.tolist(), strict=True):
            right[bench.task.categories[half]].append(hit)
    shares = {name: sum(hits) / len(hits) for name, hits in right.items()}
    return {**shares, "mean": fmean(shares.values())}


STUDY = Study(
    arms,
    columns=(
        Column("before/0-4", "before: 0-4"),
        Column("before/5-9", "5-9"),
        Column("after/0-4", "own route: 0-4"),
        Column("after/5-9", "5-9"),
        Column("other", "other route"),
        Column("probe_own", "probe: own"),
        Column("probe_other", "other"),
        Column("told", "told", against=False),
        Column("active", "active", against=False),
    ),
    reference="dense",
    note=(
        "Share of test images, CIFAR-10 (JPEG), that are read right, ten classes. before: with all features; of the "
        "loop, its dense twin. own route: with the features of the image's half alone; of the loop, core and expert. "
        "other route: the same by the other half's (the less, the better apart). probe: a linear layer on a half of "
        "the features, on images of that half and of the other. told: the loop's dense twin that is given the half. "
        "active: share of the channels inside of blocks. A route says the half, and one of five classes is then right "
        "by chance in .2. Needs cifar10-jpeg in the folder that MOEIFY_DATA names."
    ),
)
