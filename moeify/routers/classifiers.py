"""How a router learns: classifiers of leaves, of which validation data chooses one.

Axes: R rows, P positions, D numbers of the early representation, F features, K positions drawn from a row, N examples.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from moeify.routed.split_model import SplitModel
from moeify.routers.router import Layer, early, features, leaf_of_category, leaves, remember, scores
from moeify.task import Batch

_POSITIONS = 8
"""Drawn from each row to fit on, as often from 2 to 4 tokens as from 64 to 128: it is at its first tokens that a row is
routed wrong. Positions drawn alike made a router that cost more, and was calibrated worse, on validation data."""
_PENALTY = 0.1
"""Inverse strength of the logistic regression's L2 penalty, as scikit-learn counts it."""
_HIDDEN, _SEATS = 64, 4
"""Hidden numbers of a perceptron, and perceptrons of a committee. Over the best of its members, cross-entropy fell by
.008 to .011 on validation rows of ``text``, and by .035 over the logistic regression."""
_DECAY = 0.3
"""Strength of a perceptron's L2 penalty, as scikit-learn counts it; .01 and 1 did a little worse."""
_EPOCHS = 30
"""At most: a perceptron stops where a tenth of the examples, kept back, gain nothing from three more."""
_BATCH, _RATE = 1000, 5e-3
"""Examples of a perceptron's step, where there are a hundred times as many, and its learning rate: half the time that
scikit-learn's own take, at the same cross-entropy."""
_FEWEST = 20
"""Examples of each leaf, for perceptrons: some of each must be among those kept back."""
_MOST_ROWS, _ROOM = 4096, 2**27
"""Rows of each category to fit on, and numbers that their evidence may take."""


def rows_to_fit(model: SplitModel, inputs: Tensor) -> int:
    """Return from how many rows of each category a router learns, given some of the network's inputs."""
    numbers = 2 * early(model.network, inputs[:1]).shape[-1] + 1
    return max(1, min(_MOST_ROWS, _ROOM // (len(model.categories) * _POSITIONS * numbers)))


@torch.no_grad()
def train(model: SplitModel, batches: Iterable[Batch], validation: Iterable[Batch], seed: int) -> tuple[Layer, ...]:
    """Fit a router's layers to labelled rows; the network is read and not changed.

    A few positions are drawn from each row. Of several classifiers it is the one whose probabilities have the least
    cross-entropy on the ``validation`` rows. ValueError where there is one expert alone.
    """
    if len(leaves(model)) < 2:
        raise ValueError(
            f"the split model has one leaf, {leaves(model)[0]!r}, that serves everything; nothing to route"
        )
    generator = torch.Generator().manual_seed(seed)
    train_NF, train_N = _examples(model, batches, generator)
    held_NF, held_N = _examples(model, validation, generator)
    mean_F, deviation_F = train_NF.mean(0), train_NF.std(0).clamp_min(1e-9)
    found = []
    for (weight_OF, bias_O), *others in _classifiers((train_NF - mean_F) / deviation_F, train_N, seed):
        weight_OF = weight_OF / deviation_F
        layers = (Layer(weight_OF, bias_O - weight_OF @ mean_F), *others)
        found.append((nn.functional.cross_entropy(scores(layers, held_NF), held_N).item(), layers))
    return min(found, key=lambda each: each[0])[1]


def _classifiers(
    scaled_NF: Float64[Tensor, "examples features"], leaf_N: Int[Tensor, " examples"], seed: int
) -> Iterator[list[Layer]]:
    """Yield the layers of a logistic regression, and of a committee of perceptrons."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    given, labels = scaled_NF.numpy(), leaf_N.numpy()
    line = LogisticRegression(C=_PENALTY, max_iter=2000).fit(given, labels)
    yield [_for_each(Layer(torch.from_numpy(line.coef_), torch.from_numpy(line.intercept_)))]
    if leaf_N.unique(return_counts=True)[1].min() < _FEWEST:
        return
    hidden, last = [], []
    for seat in range(_SEATS):
        bent = MLPClassifier(
            (_HIDDEN,),
            alpha=_DECAY,
            batch_size=max(_FEWEST, min(_BATCH, len(leaf_N) // 100)),
            learning_rate_init=_RATE,
            max_iter=_EPOCHS,
            early_stopping=True,
            n_iter_no_change=3,
            random_state=(_SEATS * seed + seat) % 2**32,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what it has found by then is judged like any other
            bent.fit(given.astype(np.float32), labels)
        pairs = [map(torch.from_numpy, pair) for pair in zip(bent.coefs_, bent.intercepts_, strict=True)]
        one, other = (Layer(weight.t().double(), bias.double()) for weight, bias in pairs)
        hidden.append(one)
        last.append(_for_each(other))
    yield [Layer(*map(torch.cat, zip(*hidden, strict=True))), _averaged(last)]


def _averaged(last: Sequence[Layer]) -> Layer:
    """Return the layer that gives the mean score of several, each of which reads its own part of what it reads."""
    weights = torch.cat([layer.weight_OI for layer in last], dim=1)
    return Layer(weights / len(last), torch.stack([layer.bias_O for layer in last]).mean(0))


def _for_each(last: Layer) -> Layer:
    """Return a layer with a score for each class: of two, scikit-learn has one, of the second against the first."""
    if len(last.bias_O) > 1:
        return last
    return Layer(*(torch.cat([-each, each]) / 2 for each in last))


def _examples(
    model: SplitModel, batches: Iterable[Batch], generator: torch.Generator
) -> tuple[Float64[Tensor, "examples features"], Int[Tensor, " examples"]]:
    """Return the evidence at positions drawn from each row, and the leaf that serves the row."""
    leaf_C = leaf_of_category(model)
    found, labels = [], []
    for batch in batches:
        sums_RPD = remember(early(model.network, batch.inputs))
        rows, positions, dim = sums_RPD.shape
        drawn_RK = torch.rand(rows, min(_POSITIONS, positions), generator=generator, dtype=torch.float64)
        drawn_RK = ((positions + 1.0) ** drawn_RK).long().clamp_max(positions) - 1
        sums_RKD = sums_RPD.gather(1, drawn_RK.unsqueeze(-1).expand(-1, -1, dim))
        found.append(features(sums_RKD, drawn_RK + 1).flatten(0, 1))
        labels.append(leaf_C[batch.categories].repeat_interleave(drawn_RK.shape[1]))
    return torch.cat(found), torch.cat(labels)
