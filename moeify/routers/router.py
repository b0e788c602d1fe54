"""Routers: which expert serves a text that nobody has labelled, read from the text itself.

A router reads what the network reads before any route is taken (token embeddings, or a numeric input as it is), so
what it sees does not depend on what it decides. Its evidence is the mean m of the tokens so far, in which a token
counts less the longer ago it was, and m sqrt(n), n being how many tokens such a mean is worth: a mean of more tokens
says more, and independent tokens would say n times as much as one. Neighbours in a text are far from independent; on
text in four categories the root was calibrated as it is, and beat the mean and the sum alone. A multinomial logistic
regression, or a committee of perceptrons of one hidden layer, turns evidence into the probability of each leaf.

Forgetting lets the route follow a text that changes, and n never outgrows what training has shown. A memory of 32
tokens cost rows of one category .03 % of their loss; rows that change category halfway ended 0.5 nats a token better
in their last quarter than with a mean of all tokens (benchmarks/LOG.md).

Axes: R rows, P positions (1 where a row is one example), D numbers of the early representation, F features, E experts,
N examples to fit on; a layer reads I numbers and gives O.
"""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from moeify.routed.split_model import SplitModel
from moeify.split_folder import split_hash
from moeify.store import read_manifest, read_part, understood, write_folder
from moeify.task import Batch

Kind = Literal["document", "token"]
"""``document``: one decision a row, once its first tokens have been read; ``token``: one at every token, from the
tokens up to it. The classifier is the same: trained on beginnings of all lengths, it is nearly as good at each as one
that was trained on that length alone."""

MEMORY = 32
"""Tokens after which a token counts 1/e of a new one, about."""
VERSION = 2
"""Of what is kept; other evidence is another version. 1: a logistic regression, the same as one layer."""
FOLDER = "router"
"""Below the run's folder."""

_POSITIONS = 8
"""Drawn from each row to fit on, as often from 2 to 4 tokens as from 64 to 128: it is at its first tokens that a row is
routed wrong. Positions drawn alike made a router that cost more, and was calibrated worse, on validation data."""
_KEPT = 1.0 - 1.0 / MEMORY
"""Of a token's weight, at every later one."""
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


def leaves(model: SplitModel) -> tuple[str, ...]:
    """Return the names of the experts that a router chooses from: the leaves of the tree."""
    tree = model.partition.tree
    return tuple(tree.nodes[leaf].name for leaf in tree.leaves)


def leaf_of_category(model: SplitModel) -> Int[Tensor, " categories"]:
    """Return which leaf serves each of the model's categories."""
    tree = model.partition.tree
    found = {c: place for place, leaf in enumerate(tree.leaves) for c in tree.nodes[leaf].categories}
    return torch.tensor([found[category] for category in model.categories])


def category_of_leaf(model: SplitModel) -> Int[Tensor, " experts"]:
    """Return a category of each leaf, by which to route there."""
    tree = model.partition.tree
    return torch.tensor([model.categories.index(tree.nodes[leaf].categories[0]) for leaf in tree.leaves])


def early(network: nn.Module, inputs: Tensor) -> Float64[Tensor, "rows positions dim"]:
    """Return what the network reads before any route: each token's embedding, or a numeric row as one position."""
    if inputs.is_floating_point():
        return inputs.flatten(1).unsqueeze(1).double()
    embedding: nn.Module = cast(Any, network).get_input_embeddings()  # as every decoder of transformers has
    return embedding(inputs).double()


def remember(
    early_RPD: Float64[Tensor, "rows positions dim"], before_RD: Float64[Tensor, "rows dim"] | None = None
) -> Float64[Tensor, "rows positions dim"]:
    """Return at each position the sum of the positions up to it, each fading with every later one.

    ``before_RD``: the sum at the position before the first.
    """
    sums_RPD = early_RPD.clone()
    for place in range(early_RPD.shape[1]):
        earlier_RD = sums_RPD[:, place - 1] if place else before_RD
        if earlier_RD is not None:
            sums_RPD[:, place] += _KEPT * earlier_RD
    return sums_RPD


def features(sums: Float64[Tensor, "*shape dim"], counts: Tensor) -> Float64[Tensor, "*shape features"]:
    """Return the evidence in the fading sum of ``counts`` positions: their mean m, m sqrt(n) and sqrt(n).

    n = (sum of weights)^2 / (sum of their squares): what the weighted mean of independent positions would be worth.
    """
    counts = counts.double().unsqueeze(-1)
    weights = (1.0 - _KEPT**counts) / (1.0 - _KEPT)
    squares = (1.0 - _KEPT ** (2.0 * counts)) / (1.0 - _KEPT**2)
    mean, root = sums / weights, weights / squares.sqrt()
    return torch.cat([mean, mean * root, root.expand(*sums.shape[:-1], 1)], dim=-1)


class Layer(NamedTuple):
    """A linear map of a router; between two, what is below 0 is cut off."""

    weight_OI: Float64[Tensor, "out into"]
    bias_O: Float64[Tensor, " out"]


@dataclass(frozen=True)
class Router:
    """A classifier of leaves, and how its answers are used."""

    kind: Kind
    experts: tuple[str, ...]
    """Leaves, in the tree's order."""
    layers: tuple[Layer, ...]
    """From evidence to the experts' scores."""
    threshold: float
    """Probability; where the likeliest expert has less, the second is asked too. 0: never."""

    def __post_init__(self) -> None:
        widths = [layer.weight_OI.shape[0] for layer in self.layers]
        reads = [layer.weight_OI.shape[1] for layer in self.layers]
        biases = [layer.bias_O.shape for layer in self.layers]
        if widths[-1:] != [len(self.experts)] or widths[:-1] != reads[1:] or biases != [(width,) for width in widths]:
            shapes = [tuple(layer.weight_OI.shape) for layer in self.layers]
            raise ValueError(f"a router of {len(self.experts)} experts got weights {shapes}, which do not fit together")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: got {self.kind!r}, wanted one of {', '.join(get_args(Kind))}")
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold: got {self.threshold:g}, wanted a probability, 0 to 1")

    def log_probabilities(
        self, sums: Float64[Tensor, "*shape dim"], counts: Tensor
    ) -> Float64[Tensor, "*shape experts"]:
        """Return each expert's log probability, given the fading sum of ``counts`` positions (``remember``)."""
        return torch.log_softmax(_scores(self.layers, features(sums, counts)), dim=-1)

    def read(self, early_RPD: Float64[Tensor, "rows positions dim"]) -> Float64[Tensor, "rows positions experts"]:
        """Return log probabilities at every position, each from the positions up to it."""
        counts = torch.arange(1, early_RPD.shape[1] + 1, device=early_RPD.device)
        return self.log_probabilities(remember(early_RPD), counts.expand(early_RPD.shape[:2]))


def _scores(layers: Iterable[Layer], given: Float64[Tensor, "*shape features"]) -> Float64[Tensor, "*shape experts"]:
    first, *others = layers
    found = given @ first.weight_OI.t() + first.bias_O
    for layer in others:
        found = found.relu() @ layer.weight_OI.t() + layer.bias_O
    return found


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
        found.append((nn.functional.cross_entropy(_scores(layers, held_NF), held_N).item(), layers))
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


# --- files --------------------------------------------------------------------------------------------


def save_router(router: Router, run: Path, report: bytes) -> Path:
    """Keep a router in its run's folder, with the report as ``report.json``; the folder appears whole or not at all."""
    facts = {
        "router": VERSION,
        "kind": router.kind,
        "experts": list(router.experts),
        "threshold": router.threshold,
        "model": split_hash(run),
    }
    target = run / FOLDER
    tensors = {f"{name}.{place}": tensor for place, layer in enumerate(router.layers) for name, tensor in _named(layer)}
    write_folder(target, facts, {"router": tensors}, {"report.json": report})
    return target


def load_router(run: Path) -> Router:
    """Return the router that a run keeps.

    ValueError where there is none, or it was trained for another model; CorruptCheckpointError (a ValueError) where it
    is not what was written.
    """
    again = f"train it with: moeify route {run.name}"
    if not (run / FOLDER / "manifest.json").is_file():
        raise ValueError(f"{run.name} has no router; {again}")
    facts: dict[str, Any] = read_manifest(run / FOLDER)["facts"]
    if facts.get("router") not in (1, VERSION):
        raise ValueError(f"{run.name}: its router has version {facts.get('router')}, wanted {VERSION}; {again}")
    if facts.get("model") != split_hash(run):
        raise ValueError(f"{run.name}: its router was trained for another checkpoint of the split model; {again}")
    tensors = read_part(run / FOLDER, "router")
    with understood(f"the router of {run.name}"):
        layers = [Layer(tensors["weight"], tensors["bias"])] if facts["router"] == 1 else list(_layers(tensors))
        return Router(facts["kind"], tuple(facts["experts"]), tuple(layers), facts["threshold"])


def _named(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    return zip(("weight", "bias"), layer, strict=True)


def _layers(tensors: Mapping[str, Tensor]) -> Iterator[Layer]:
    for place in itertools.count():
        if f"weight.{place}" not in tensors:
            return
        yield Layer(tensors[f"weight.{place}"], tensors[f"bias.{place}"])
