"""Ways to say how much each unit matters to each category: ours, the published ones, and the oracle, in one form.

Unless its docstring says otherwise a method estimates the rise of the loss, in nats per token, if the unit were zeroed.
a: a unit's activation at its reader; g: gradient of the row's loss there; W: the reader's output weights.
Axes: units U, features F, categories C.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never, get_args
from zlib import crc32

import torch
from jaxtyping import Float64
from torch import Tensor

from attribution.ablation import Value, ablation_rises, check_value, single
from attribution.captum_methods import along_the_input
from attribution.hashing import row_seed
from attribution.integrated_gradients import along_the_activations
from attribution.measure import measure
from attribution.relp import relevance
from attribution.sites import Site, output_weight
from attribution.subject import Probe, Subject
from attribution.table import AttributionTable

Scores = dict[str, Float64[Tensor, "units categories"]]
"""By site."""


@dataclass(frozen=True)
class Taylor:
    """-E[g a], signed: the first order of what zeroing does.

    Molchanov et al. 2017 (arXiv 1611.06440) rank by its size; attribution patching (Syed, Rager and Conmy 2023, arXiv
    2310.10348) is the same for other stand-ins than zero.
    """


@dataclass(frozen=True)
class Absolute:
    """E|g a|: Michel, Levy and Neubig 2019 (arXiv 1905.10650) for heads; theirs by example, ours by token."""


@dataclass(frozen=True)
class Fisher:
    """1/2 E[(g a)^2], the second order of what zeroing does: Theis et al. 2018 (arXiv 1801.05787).

    With true labels it is the empirical Fisher information, which is not the curvature: Kunstner, Balles and Hennig
    2019 (arXiv 1905.12558).
    """

    labels: Literal["model", "sampled", "true"]
    """``model``: the model's own distribution, by random roots where the subject has them (``attribution.roots``);
    ``sampled``: the same by labels drawn from it."""
    samples: int = 1
    """Draws, a backward pass each, that the mean is taken over; not of true labels."""

    def __post_init__(self) -> None:
        _check_count("samples", self.samples)
        if self.labels not in ("model", "sampled", "true"):
            raise ValueError(f"labels must be 'model', 'sampled' or 'true', got {self.labels!r}")


@dataclass(frozen=True)
class TaylorFisher:
    """-E[g a] + 1/2 E[(g a)^2], labels of the second term the model's own: the report in nats.

    The expansion of LeCun, Denker and Solla 1989 (Optimal Brain Damage), of activations in place of weights, with the
    first order, which they drop, kept and the Fisher information for the Hessian.
    """

    samples: int = 1
    """Draws, a backward pass each, that the mean is taken over: over few rows the noise of one draw shows."""
    labels: Literal["model", "sampled"] = "model"
    """As of ``Fisher``."""

    def __post_init__(self) -> None:
        _check_count("samples", self.samples)
        if self.labels not in ("model", "sampled"):
            raise ValueError(f"labels must be 'model' or 'sampled', got {self.labels!r}")


@dataclass(frozen=True)
class LinearOutputs:
    """The loss itself at the outputs that the unit's removal would move in a straight line.

    nats(outputs - sum a d outputs / d a) - nats(outputs): what signed Taylor + 1/2 Fisher is the expansion of. The
    network made linear with its own loss, as Immer, Korzepa and Bauer 2021 (arXiv 2008.08400) do it in the weights.
    A backward pass an output, so for few of them: classes of an image, not a vocabulary.
    """

    limit: int = 100
    """Most outputs a row that are gone through."""

    def __post_init__(self) -> None:
        _check_count("limit", self.limit)


@dataclass(frozen=True)
class IntegratedGradients:
    """Minus a times the mean of g while the whole site's activations grow from zero, one site at a time.

    Sundararajan, Taly and Yan 2017 (arXiv 1703.01365), equation 1, of activations in place of inputs. Over a site's
    units it adds up to the rise if all of them were zeroed. ``steps`` forward and backward passes a site.
    """

    steps: int
    """Nodes of the Gauss-Legendre rule, as Captum's default."""

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)


@dataclass(frozen=True)
class Conductance:
    """Minus the flow of the input's integrated gradients through the unit, from an input of zeros.

    Dhamdhere, Sundararajan and Yan 2018 (arXiv 1805.12233), in the form of Shrikumar, Su and Kundaje 2018
    (arXiv 1807.09946); Captum's ``LayerConductance``. Over a site that all paths cross it adds up, as ``steps`` grow,
    to the rise if the input were zeros. Slow to do so below an RMS norm, which turns a tiny embedding into a whole one:
    everything happens at the path's start. Float inputs, or a network with ``get_input_embeddings()``.
    """

    steps: int
    """Steps along the input's path, between Captum's Gauss-Legendre nodes; they leave out its two ends."""

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)


@dataclass(frozen=True)
class InternalInfluence:
    """Minus a times the mean of g while the input grows from zeros.

    Leino et al. 2018 (arXiv 1802.03788), whose influence, like Captum's ``InternalInfluence``, is the mean of g alone;
    times a it is in nats. Float inputs, or a network with ``get_input_embeddings()``.
    """

    steps: int
    """Nodes of the Gauss-Legendre rule along the input's path; Captum has its weights in float32."""

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)


@dataclass(frozen=True)
class RelP:
    """-E[g a] with g by the rules of relevance propagation (``attribution.relp``).

    Rezaei Jafari et al. 2025 (arXiv 2508.21258). Only for networks of functions that have a rule.
    """


@dataclass(frozen=True)
class WeightMagnitude:
    """Sum of abs(W) over a unit's features and outputs: Han et al. 2015 (arXiv 1506.02626), by unit. Not nats; no data.

    The same for all categories.
    """


@dataclass(frozen=True)
class ActivationRate:
    """Fraction of tokens at which the unit is not 0. Not nats.

    1 - the average percentage of zeros of Hu et al. 2016 (arXiv 1607.03250). Says something only of activation
    functions with exact zeros, such as ReLU; a head or a channel is 0 where all of it is.
    """


@dataclass(frozen=True)
class Wanda:
    """Sum of abs(W) sqrt(E[a^2]) over a unit's features and outputs. Not nats.

    Sun et al. 2023 (arXiv 2306.11695), equation 1, by unit, with the root mean square for the norm, so that categories
    of different sizes compare.
    """


@dataclass(frozen=True)
class Random:
    """Uniform in 0..1, by the site's name: the control."""

    seed: int


@dataclass(frozen=True)
class Ablation:
    """The true rise, unit by unit (``attribution.ablation``): the oracle. One forward pass of the data a unit.

    Morcos et al. 2018 (arXiv 1803.06959), who clamp units to zero or to their mean, and look at accuracy.
    """

    value: Value

    def __post_init__(self) -> None:
        check_value(self.value)


Method = (
    Taylor
    | Absolute
    | Fisher
    | TaylorFisher
    | LinearOutputs
    | IntegratedGradients
    | Conductance
    | InternalInfluence
    | RelP
    | WeightMagnitude
    | ActivationRate
    | Wanda
    | Random
    | Ablation
)
METHODS: tuple[type, ...] = get_args(Method)


def scores(method: Method, subject: Subject, batches: Sequence[Probe], *, seed: int = 0) -> Scores:
    """Return a method's score of every unit for every category; ``seed`` is that of draws from the model's labels.

    >>> scores(Ablation("zero"), asked, rows)["first"].tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    return all_scores([method], subject, batches, seed=seed)[method]


def all_scores(
    methods: Sequence[Method], subject: Subject, batches: Sequence[Probe], *, seed: int = 0
) -> dict[Method, Scores]:
    """Return the scores of several methods; those that ``measure`` knows share its passes.

    ``batches`` are gone through again and again. ValueError where a method makes no sense for the network.

    >>> found = all_scores([Taylor(), WeightMagnitude()], asked, rows)
    >>> found[Taylor()]["first"].tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    tables: dict[_Pass, AttributionTable] = {}
    found: dict[Method, Scores] = {}
    for method in methods:
        one = _pass(method)
        if one and one not in tables:
            asked = _asked(subject, batches, one)
            tables[one] = measure(asked, batches, seed=seed, samples=one.samples, exact_outputs=one.exact_outputs)
        found[method] = _scores(method, subject, batches, tables[one] if one else None)
    return found


@dataclass(frozen=True)
class _Pass:
    """What is asked of ``measure``."""

    samples: int = 1
    sampled: bool = False
    exact_outputs: int = 0


def _asked(subject: Subject, batches: Sequence[Probe], one: _Pass) -> Subject:
    """Return the subject with the labels of the model's own that a pass needs."""
    if one.sampled:
        if subject.sample is None:
            raise ValueError("labels='sampled' draws from the subject's 'sample'; give it, or take labels='model'")
        return replace(subject, root=None)
    if one.exact_outputs:
        _check_outputs(subject, batches, one.exact_outputs)
        if not subject.draws:  # The report is the loss itself, but a table has none without them.
            return replace(subject, root=lambda outputs, _: torch.zeros_like(outputs))
    return subject


def _pass(method: Method) -> _Pass | None:
    """Return the pass that a method's scores come out of; None for one that ``measure`` does not know."""
    match method:
        case Fisher() | TaylorFisher():
            return _Pass(method.samples, sampled=method.labels == "sampled")
        case LinearOutputs(limit):
            return _Pass(exact_outputs=limit)
        case Taylor() | Absolute() | ActivationRate() | Wanda():
            return _Pass()
        case _:
            return None


def _scores(method: Method, subject: Subject, batches: Sequence[Probe], table: AttributionTable | None) -> Scores:
    match method:
        case Taylor():
            return _of_table(table, lambda t, site: t.score(site.name, "taylor"), subject)
        case Absolute():
            return _of_table(table, lambda t, site: t.score(site.name, "absolute"), subject)
        case Fisher("true"):
            return _of_table(table, lambda t, site: t.score(site.name, "empirical"), subject)
        case Fisher():
            return _of_table(table, lambda t, site: t.score(site.name, "fisher"), subject)
        case TaylorFisher() | LinearOutputs():
            return _of_table(table, lambda t, site: t.score(site.name, "report"), subject)
        case ActivationRate():
            return _of_table(table, lambda t, site: t.score(site.name, "rate"), subject)
        case Wanda():
            return _of_table(table, lambda t, site: _weighted(subject, site, t.power(site.name).sqrt()), subject)
        case IntegratedGradients(steps):
            return along_the_activations(subject, batches, steps)
        case Conductance(steps):
            return along_the_input("conductance", subject, batches, steps)
        case InternalInfluence(steps):
            return along_the_input("internal influence", subject, batches, steps)
        case RelP():
            return relevance(subject, batches)
        case WeightMagnitude():
            return {site.name: _weighted(subject, site, _ones(subject, site.features)) for site in subject.sites}
        case Random(seed):
            return _random(subject, seed)
        case Ablation(value):
            return {
                site.name: ablation_rises(subject, batches, site.name, single(site.units), value=value)
                for site in subject.sites
            }
        case _:
            assert_never(method)


def _check_outputs(subject: Subject, batches: Sequence[Probe], limit: int) -> None:
    """Refuse a network whose outputs are too many, or of several positions."""
    with subject.still(), torch.no_grad():
        for batch in batches[:1]:
            outputs = subject.forward(batch.inputs, batch.categories)
            if outputs.ndim != 2 or outputs.shape[1] > limit:
                raise ValueError(
                    f"the network's outputs are {list(outputs.shape)}; LinearOutputs goes through at most {limit} "
                    f"outputs a row [rows outputs]; use TaylorFisher"
                )


def _of_table(
    table: AttributionTable | None, score: Callable[[AttributionTable, Site], Tensor], subject: Subject
) -> Scores:
    assert table is not None
    return {site.name: score(table, site) for site in subject.sites}


def _ones(subject: Subject, features: int) -> Float64[Tensor, "features categories"]:
    return torch.ones(features, len(subject.categories), dtype=torch.float64)


def _weighted(
    subject: Subject, site: Site, size_FC: Float64[Tensor, "features categories"]
) -> Float64[Tensor, "units categories"]:
    """Return each unit's sum of abs(W) times the size of the feature that W takes in."""
    weight = output_weight(subject.reader(site), site)
    reach_I = weight.abs().to("cpu", torch.float64).sum(1)
    size_IC = size_FC.repeat_interleave(len(reach_I) // site.features, 0)  # A convolution's kernel, channel by channel.
    return (reach_I[:, None] * size_IC).view(site.units, -1, len(subject.categories)).sum(1)


def _random(subject: Subject, seed: int) -> Scores:
    return {
        site.name: torch.rand(
            site.units,
            len(subject.categories),
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(row_seed(seed, crc32(site.name.encode()))),
        )
        for site in subject.sites
    }


def _check_count(what: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{what} must be at least 1, got {count}")
