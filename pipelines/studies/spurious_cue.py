"""Spurious correlations: a cue that foretells the answer in training and misleads in use.

MNIST (scikit-learn's digits in ``--quick``), ten classes, an MLP. The cue is a background: an eighth of the image, at
its left, is bright, where no digit has ink, in 95 % of the train images of 5 to 9 and 5 % of those of 0 to 4. Test
images are read with the cue as in training, and with the cue turned round. Nothing is told at test time, and all units
run, but those of an expert that is removed.

Two ways to separate in training are tried. By class: rows of 0-4 and of 5-9 teach units of their own and a shared
core. By agreement: rows that agree with the cue teach the core and an expert, which is removed afterwards; those that
contradict it teach the core alone, and where routes are hard do not run the expert. Balancing uses the same knowledge,
of which rows contradict, without any routing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from sklearn.datasets import load_digits
from torch import Tensor, nn

from moeify import rows as rows_of
from moeify.clean_modules import without_units
from moeify.data.images import HOLDS, load
from moeify.data.root import data_root
from moeify.models.build import Autoencoder
from moeify.recipe.config import RunConfig
from moeify.recipe.model import AutoencoderModel
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Redrawn
from moeify.tasks.tensors import TensorTask
from pipelines.studies.recipes import UNCUT
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, shipped_recipe
from pipelines.studies.training import trained

_AGREES = 0.95
"""Share of train examples whose cue agrees with their class."""
_TESTED = 0.25
"""Share of scikit-learn's images."""
_CLASSES = ("low", "high")
"""The half of the classes that the cue does not foretell, and that which it does."""
_AGREEMENT = ("agrees", "contradicts")
_SHARE = 0.4
"""Of each site, for each half of the classes."""
_REMOVED = 0.5
"""Of each site, for the rows that agree; then removed."""


How = Literal["plain", "balanced", "random", "agreement"]


@dataclass(frozen=True)
class Examples:
    """What is learned from, and what is tested on; a cue that is on foretells the upper half of the classes."""

    inputs: Float[Tensor, "train features"]
    labels: Int[Tensor, " train"]
    test_inputs: Float[Tensor, "test features"]
    test_labels: Int[Tensor, " test"]
    classes: int
    luck: Float[Tensor, " train"]
    """A number 0..1 of each train example: its cue agrees with its class where it is below the share that does."""
    cued: Callable[[Float[Tensor, "rows features"], Bool[Tensor, " rows"]], Float[Tensor, "rows features"]]
    """Returns inputs with the cue on where it says so, and off elsewhere."""

    def high(self, labels: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
        """Say which of these are of the upper half of the classes."""
        return labels >= self.classes // 2


class Problem(Protocol):
    """Where examples come from: the same for the same bench."""

    @property
    def hidden(self) -> int:
        """Units of the classifier's two hidden layers."""
        ...

    def examples(self, bench: Bench) -> Examples:
        """Return them."""
        ...


@dataclass(frozen=True)
class Way:
    """Train a classifier in one way, and test it with the cue as it was and turned round."""

    problem: Problem
    how: How
    """``plain``: rows as they come, gradients routed by class where the recipe says so. ``balanced``: as many rows that
    contradict the cue as agree with it. ``random``: a cue that says nothing. ``agreement``: rows that agree with the
    cue are routed to an expert, which is then removed."""

    def __call__(self, bench: Bench) -> Measures:
        """Return shares of test examples that are read right."""
        examples, by_agreement = self.problem.examples(bench), self.how == "agreement"
        agrees, high = examples.luck < (0.5 if self.how == "random" else _AGREES), examples.high(examples.labels)
        weights = None
        if self.how == "balanced":
            weights = torch.where(agrees, 1.0 / agrees.sum(), 1.0 / (~agrees).sum())
        inputs = examples.cued(examples.inputs, high == agrees)
        categories, names = ((~agrees).long(), _AGREEMENT) if by_agreement else (high.long(), _CLASSES)
        model = self._trained(bench, inputs, examples, categories, names, weights)
        if not by_agreement:
            return _accuracies(model, examples)
        expert = {
            site.name: torch.arange(site.units - round(_REMOVED * site.units), site.units)
            for site in model.space.readers
        }
        with without_units(model, expert):
            return _accuracies(model, examples)

    def _trained(
        self,
        bench: Bench,
        inputs: Tensor,
        examples: Examples,
        categories: Int[Tensor, " rows"],
        names: tuple[str, str],
        weights: Float[Tensor, " rows"] | None,
    ) -> SplitModel:
        """Train on rows drawn alike, or by their weights; each is in one of two categories."""
        rows, seed, share = bench.config.training.rows, bench.config.seed, None
        if weights is not None:
            share = (weights / weights.sum()).double().numpy()
            share = share / share.sum()
        given = {
            name: (inputs[categories == place], examples.labels[categories == place])
            for place, name in enumerate(names)
        }

        def draw(step: int) -> Batch:
            picks = rows_of.generator(seed, "train", step).choice(len(inputs), size=rows, p=share)
            some = torch.from_numpy(picks)
            some = some[categories[some].argsort(stable=True)]
            ids = torch.arange(step * rows, (step + 1) * rows)
            return Batch(inputs[some], examples.labels[some], categories[some], ids, some)

        network = _classifier(inputs.shape[1], self.problem.hidden, examples.classes, seed)
        task = TensorTask(network, given, "classes", rows=rows, seed=seed)
        return trained(bench.config, Redrawn(task, draw))


def ways(problem: Problem, recipe: Callable[..., RunConfig]) -> tuple[Arm, ...]:
    """Return ways to train on the same examples; ``recipe`` takes what it is to say of ``routing``."""
    halves = [{"categories": [name], "units": _SHARE} for name in _CLASSES]
    agreeing = [{"categories": [_AGREEMENT[0]], "units": _REMOVED}, {"categories": [_AGREEMENT[1]]}]

    def arm(name: str, how: How, **routing: Any) -> Arm:
        return Arm(name, recipe(routing), Way(problem, how))

    return (
        arm("as it comes", "plain"),
        arm("balanced rows", "balanced"),
        arm("cue at random", "random"),
        arm("by class, parameters", "plain", gradients="parameters", experts=halves),
        arm("by class, activations", "plain", gradients="activations", experts=halves),
        arm("by agreement, removed", "agreement", gradients="parameters", experts=agreeing),
        arm("same, hard", "agreement", gradients="parameters", experts=agreeing, hard=(_AGREEMENT[1],)),
    )


def _classifier(inputs: int, hidden: int, classes: int, seed: int) -> nn.Module:
    """Return an MLP of two hidden layers with a narrow one between, the same bits for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Autoencoder(inputs, hidden, 32)
        network.decoder.down = nn.Linear(hidden, classes)
    return network


@torch.no_grad()
def _accuracies(model: SplitModel, examples: Examples) -> Measures:
    """Return the share of test examples that are read right, cue as in training and turned round."""
    high, labels = examples.high(examples.test_labels), examples.test_labels
    categories = torch.zeros(len(high), dtype=torch.long)  # nothing is cut: every row runs every unit
    found = {}
    for name, cue in (("as_trained", high), ("turned", ~high)):
        outputs = model(examples.cued(examples.test_inputs, cue), categories)
        found[name] = (outputs.argmax(1) == labels).double().mean().item()
    return found | {"worse": min(found.values())}


@dataclass(frozen=True)
class _Digits:
    """scikit-learn's."""

    hidden: int

    def examples(self, bench: Bench) -> Examples:
        digits, random = load_digits(), rows_of.generator(bench.config.seed, "split")
        inputs = torch.from_numpy(digits.data / 16).float()
        labels = torch.from_numpy(digits.target).long()
        order = torch.from_numpy(random.permutation(len(labels)))
        tested, train = order[: round(_TESTED * len(order))], order[round(_TESTED * len(order)) :]
        luck = torch.from_numpy(random.random(len(train)))
        return Examples(inputs[train], labels[train], inputs[tested], labels[tested], 10, luck, _lit)


@dataclass(frozen=True)
class _Mnist:
    """All of it, as published."""

    hidden: int

    def examples(self, bench: Bench) -> Examples:
        splits = load("mnist", data_root(None, Path.cwd(), HOLDS["mnist"]))
        inputs, tested = (torch.from_numpy(split.pixels).flatten(1).float() / 255 for split in splits)
        labels, answers = (torch.from_numpy(split.labels) for split in splits)
        luck = torch.from_numpy(rows_of.generator(bench.config.seed, "split").random(len(labels)))
        return Examples(inputs, labels, tested, answers, 10, luck, _lit)


def _lit(inputs: Tensor, cue: Tensor) -> Tensor:
    """Return square images whose left eighth is bright where the cue is on, and dark where it is off."""
    side = math.isqrt(inputs.shape[1])
    images = inputs.view(-1, side, side).clone()
    images[:, :, : side // 8] = cue[:, None, None].float()
    return images.flatten(1)


def arms(size: Size) -> tuple[Arm, ...]:
    """Return ways to train on the same images; those of MNIST come from the folder that MOEIFY_DATA names."""
    steps = {"quick": 30, "full": 1500, "large": 6000}[size]
    training = {"steps": steps, "rows": 100, "learning_rate": 2e-3, "weight_decay": 0.01, "explosion": 1e9}

    def recipe(routing: Mapping[str, Any]) -> RunConfig:
        return shipped_recipe("digits", training=training, rounds=UNCUT, controls=(), routing=routing)

    model = recipe({}).model
    assert isinstance(model, AutoencoderModel)
    return ways(_Digits(model.hidden) if size == "quick" else _Mnist(model.hidden), recipe)


STUDY = Study(
    arms,
    columns=(
        Column("as_trained", "cue as in training"),
        Column("turned", "cue turned round"),
        Column("worse", "the worse"),
    ),
    reference="as it comes",
    seeds=5,
    note=(
        "Share of MNIST's test images that are read right, ten classes, with the cue as in training and turned round, "
        "and the worse of the two. 'cue at random' is what training without the correlation gives."
    ),
)
