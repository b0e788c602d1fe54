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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn

from moeify.routed.split_model import SplitModel
from moeify.split_folder import split_hash
from moeify.store import read_manifest, read_part, understood, write_folder

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

_KEPT = 1.0 - 1.0 / MEMORY
"""Of a token's weight, at every later one."""


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
        return torch.log_softmax(scores(self.layers, features(sums, counts)), dim=-1)

    def read(self, early_RPD: Float64[Tensor, "rows positions dim"]) -> Float64[Tensor, "rows positions experts"]:
        """Return log probabilities at every position, each from the positions up to it."""
        counts = torch.arange(1, early_RPD.shape[1] + 1, device=early_RPD.device)
        return self.log_probabilities(remember(early_RPD), counts.expand(early_RPD.shape[:2]))


def scores(layers: Iterable[Layer], given: Float64[Tensor, "*shape features"]) -> Float64[Tensor, "*shape experts"]:
    """Return each expert's score, given the evidence."""
    first, *others = layers
    found = given @ first.weight_OI.t() + first.bias_O
    for layer in others:
        found = found.relu() @ layer.weight_OI.t() + layer.bias_O
    return found


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
