"""Spurious correlations: a cue that foretells the answer in training and misleads in use.

scikit-learn's digits, ten classes, an MLP. The cue is a bright left column, where no digit has ink: 95 % of the train
images of 5 to 9 have it, and 5 % of those of 0 to 4. Test images are read with the cue as in training, and with the
cue turned round. Nothing is told at test time, and all units run, but those of an expert that is removed.

Two ways to separate in training are tried. By class: rows of 0-4 and of 5-9 teach units of their own and a shared
core. By agreement: rows that agree with the cue teach the core and an expert, which is removed afterwards; those that
contradict it teach the core alone, and where routes are hard do not run the expert. Balancing uses the same knowledge,
of which rows contradict, without any routing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from moeify import rows as rows_of
from moeify.clean_modules import without_units
from moeify.models.build import Autoencoder
from moeify.recipe.model import AutoencoderModel
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Redrawn
from moeify.tasks.tensors import TensorTask
from pipelines.studies.recipes import UNCUT
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, shipped_recipe
from pipelines.studies.training import trained

_AGREES = 0.95
"""Share of train images whose cue agrees with their class."""
_HALF = 5
"""The first class that the cue foretells."""
_TESTED = 0.25
"""Share of all images."""
_CLASSES = ("0-4", "5-9")
_AGREEMENT = ("agrees", "contradicts")
_SHARE = 0.4
"""Of each site, for each half of the classes."""
_REMOVED = 0.5
"""Of each site, for the rows that agree; then removed."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return ways to train on the same images."""
    halves = [{"categories": [name], "units": _SHARE} for name in _CLASSES]
    agreeing = [{"categories": [_AGREEMENT[0]], "units": _REMOVED}, {"categories": [_AGREEMENT[1]]}]

    def arm(name: str, work: Any, **routing: Any) -> Arm:
        steps = {"quick": 30, "full": 600, "large": 4000}[size]
        training = {"steps": steps, "rows": 100, "learning_rate": 2e-3, "weight_decay": 0.01, "explosion": 1e9}
        recipe = shipped_recipe("digits", training=training, rounds=UNCUT, controls=(), routing=routing)
        return Arm(name, recipe, work)

    return (
        arm("as it comes", plain),
        arm("balanced rows", balanced),
        arm("cue at random", uncorrelated),
        arm("by class, parameters", plain, gradients="parameters", experts=halves),
        arm("by class, activations", plain, gradients="activations", experts=halves),
        arm("by agreement, removed", by_agreement, gradients="parameters", experts=agreeing),
        arm("same, hard", by_agreement, gradients="parameters", experts=agreeing, hard=(_AGREEMENT[1],)),
    )


@dataclass(frozen=True)
class _Images:
    """Train images with their cue, and test images without."""

    inputs: Tensor
    labels: Tensor
    agrees: Tensor
    """Whether an image's cue is what its class foretells."""
    test_inputs: Tensor
    test_labels: Tensor


def plain(bench: Bench) -> Measures:
    """Train on rows as they come, gradients routed by class where the recipe says so."""
    images = _images(bench.config.seed, _AGREES)
    return _accuracies(_trained(bench, images, images.labels // _HALF, _CLASSES), images)


def balanced(bench: Bench) -> Measures:
    """Train on as many rows that contradict the cue as agree with it."""
    images = _images(bench.config.seed, _AGREES)
    weights = torch.where(images.agrees, 1.0 / images.agrees.sum(), 1.0 / (~images.agrees).sum())
    return _accuracies(_trained(bench, images, images.labels // _HALF, _CLASSES, weights), images)


def uncorrelated(bench: Bench) -> Measures:
    """Train on images whose cue says nothing."""
    images = _images(bench.config.seed, 0.5)
    return _accuracies(_trained(bench, images, images.labels // _HALF, _CLASSES), images)


def by_agreement(bench: Bench) -> Measures:
    """Train with rows that agree with the cue routed to an expert, and remove it."""
    images = _images(bench.config.seed, _AGREES)
    model = _trained(bench, images, (~images.agrees).long(), _AGREEMENT)
    expert = {
        site.name: torch.arange(site.units - round(_REMOVED * site.units), site.units) for site in model.space.readers
    }
    with without_units(model, expert):
        return _accuracies(model, images)


def _images(seed: int, agrees: float) -> _Images:
    digits, random = load_digits(), rows_of.generator(seed, "split")
    inputs = torch.from_numpy(digits.data / 16).float()
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(random.permutation(len(labels)))
    tested, train = order[: round(_TESTED * len(order))], order[round(_TESTED * len(order)) :]
    right = torch.from_numpy(random.random(len(train)) < agrees)
    foretold = labels[train] >= _HALF
    return _Images(_cued(inputs[train], foretold == right), labels[train], right, inputs[tested], labels[tested])


def _cued(inputs: Tensor, cue: Tensor) -> Tensor:
    """Return images with the left column bright where the cue is on, and dark where it is off."""
    images = inputs.view(-1, 8, 8).clone()
    images[:, :, 0] = cue[:, None].float()
    return images.flatten(1)


def _trained(
    bench: Bench, images: _Images, categories: Tensor, names: tuple[str, str], weights: Tensor | None = None
) -> SplitModel:
    """Train a classifier on rows drawn alike, or by ``weights``; each is in one of two categories."""
    rows, seed = bench.config.training.rows, bench.config.seed
    given: Mapping[str, tuple[Tensor, Tensor]] = {
        name: (images.inputs[categories == place], images.labels[categories == place])
        for place, name in enumerate(names)
    }
    share = None if weights is None else (weights / weights.sum()).double().numpy()
    if share is not None:
        share = share / share.sum()

    def draw(step: int) -> Batch:
        picks = rows_of.generator(seed, "train", step).choice(len(images.labels), size=rows, p=share)
        some = torch.from_numpy(np.asarray(picks))
        some = some[categories[some].argsort(stable=True)]
        ids = torch.arange(step * rows, (step + 1) * rows)
        return Batch(images.inputs[some], images.labels[some], categories[some], ids, some)

    task = TensorTask(_classifier(bench), given, "classes", rows=rows, seed=seed)
    return trained(bench.config, Redrawn(task, draw))


def _classifier(bench: Bench) -> nn.Module:
    """Return an MLP of two hidden layers with a narrow one between, the same bits for the same seed."""
    assert isinstance(bench.config.model, AutoencoderModel)
    hidden = bench.config.model.hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.config.seed)
        network = Autoencoder(64, hidden, 32)
        network.decoder.down = nn.Linear(hidden, 10)
    return network


@torch.no_grad()
def _accuracies(model: SplitModel, images: _Images) -> Measures:
    """Return the share of test images that are read right, cue as in training and turned round."""
    high = images.test_labels >= _HALF
    categories = torch.zeros(len(high), dtype=torch.long)  # nothing is cut: every row runs every unit
    found = {}
    for name, cue in (("as_trained", high), ("turned", ~high)):
        outputs = model(_cued(images.test_inputs, cue), categories)
        found[name] = (outputs.argmax(1) == images.test_labels).double().mean().item()
    return found | {"worse": min(found.values())}


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
        "Share of test digits that are read right, ten classes, with the cue as in training and turned round, and the "
        "worse of the two. 'cue at random' is what training without the correlation gives."
    ),
)
