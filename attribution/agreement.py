"""How far a method's scores agree with the truth: with exact ablation, of single units and of whole sets of them.

A score that orders single units well can fail on sets, where what the units do together counts; so both are asked.
Everything is compared on the rows that the scores were taken from: what is told is the error of the method, not that
of the sample.

Axes: items X (units, or sets of them), categories C, units U, sets S, bootstrap draws B.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from scipy.stats import rankdata
from torch import Tensor

from attribution.ablation import Value, ablation_rises, check_value, single
from attribution.measure import Moments, measure
from attribution.methods import (
    Absolute,
    ActivationRate,
    Conductance,
    Fisher,
    IntegratedGradients,
    InternalInfluence,
    LinearOutputs,
    Method,
    Random,
    RelP,
    Scores,
    Taylor,
    TaylorFisher,
    Wanda,
    WeightMagnitude,
    scores,
)
from attribution.moments import marginals, schur_residual
from attribution.sites import output_weight
from attribution.subject import Probe, Subject
from attribution.table import AttributionTable

ESTIMATES: Mapping[str, Method] = {
    "taylor": Taylor(),
    "absolute": Absolute(),
    "fisher": Fisher("model"),
    "fisher sampled": Fisher("sampled"),
    "empirical": Fisher("true"),
    "report": TaylorFisher(),
    "report8": TaylorFisher(samples=8),
    "report sampled": TaylorFisher(labels="sampled"),
    "report8 sampled": TaylorFisher(samples=8, labels="sampled"),
    "linear": LinearOutputs(),
    "integrated": IntegratedGradients(8),
    "conductance": Conductance(8),
    "influence": InternalInfluence(8),
    "relp": RelP(),
    "wanda": Wanda(),
    "magnitude": WeightMagnitude(),
    "rate": ActivationRate(),
    "random": Random(0),
}
"""Every method but the oracle, by the name it has in tables."""
RESIDUALS: tuple[str, str] = ("kfac", "J")
"""What second moments say of a set: ``J``, the Schur residual, with the kept units' weights fitted again; ``kfac``, the
same without: 1/2 tr(H W_R^T A_RR W_R)."""
_NOT_NATS = Wanda | WeightMagnitude | ActivationRate | Random
_TRIES = 5
"""Forward passes that the unit of costs is the shortest of."""
EVERY = "*"
"""Stands for all sites together."""
SELECTORS = ("fisher", "absolute", "wanda", "magnitude")
"""Whose choices, more or less blurred, are the sets that are tried."""


Items = Literal["units", "sets"]


@dataclass(frozen=True)
class Estimate:
    """A statistic, and its 95 % bootstrap interval over items."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f} {self.high:.3f}]"


@dataclass(frozen=True)
class Agreement:
    """How well one method does at one site."""

    method: str
    site: str
    """Or ``EVERY``, for the units of all sites together: whether sites can be compared with each other."""
    of: Items
    value: Value
    """What stood in for the removed units."""
    items: int
    """Units or sets compared, for each category."""
    spearman: Estimate
    """Rank correlation with the true rise, mean over categories."""
    pearson: Estimate
    """Correlation with the true rise, mean over categories."""
    overlap: Estimate
    """Of the tenth of items that truly matter most, the share also in the method's first tenth; mean over categories.
    A tenth at random."""
    slope: Estimate | None
    """True rise over predicted, fitted through 0 over all categories: 1 is a calibrated estimate; None if the method
    does not speak of nats."""


class Means(NamedTuple):
    """Means over sites."""

    spearman: float
    pearson: float
    overlap: float


@dataclass(frozen=True)
class Comparison:
    """All methods against the truth."""

    rows: tuple[Agreement, ...]
    costs: Mapping[str, float]
    """Time of each method for all sites, and that of exact ablation (``ablation``, single units), in plain forward
    passes of the same rows."""
    refused: Mapping[str, str]
    """Methods that make no sense for the network, and why."""

    def pooled(self, method: str, value: Value) -> Agreement | None:
        """Return the agreement on the units of all sites together; None where the method was refused."""
        wanted = (method, EVERY, "units", value)
        return next((r for r in self.rows if (r.method, r.site, r.of, r.value) == wanted), None)

    def mean(self, method: str, of: Items, value: Value) -> Means:
        """Return the means over all sites; NaN where there are no such rows."""
        mine = [r for r in self.rows if (r.method, r.of, r.value) == (method, of, value) and r.site != EVERY]
        if not mine:
            return Means(math.nan, math.nan, math.nan)
        each = [(row.spearman.value, row.pearson.value, row.overlap.value) for row in mine]
        return Means(*np.array(each).mean(0).tolist())


def compare(
    subject: Subject,
    batches: Sequence[Probe],
    methods: Mapping[str, Method] = ESTIMATES,
    *,
    values: Sequence[Value] = ("zero",),
    removed: float = 0.5,
    sets: int = 32,
    columns: int | None = 2048,
    draws: int = 200,
    seed: int = 0,
    said: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Hold every method's scores, and J, against exact ablation of each unit and of sets of units, site by site.

    ``removed``: the share of a site's units that is in a set; ``sets``: how many are tried (fewer where a site has
    fewer, none where it has under 8), from those that ``SELECTORS`` would remove to random ones; ``columns``: see
    ``Moments``; ``said`` hears what is being done. Takes one forward pass of the data for every unit and every set.
    ValueError for settings that make no sense.

    >>> found = compare(asked, rows, {"taylor": Taylor()}, draws=20)
    >>> [(row.site, row.of, round(row.pearson.value, 3)) for row in found.rows if row.method == "taylor"][:2]
    [('first', 'units', 1.0), ('second', 'units', 1.0)]
    """
    if not values:
        raise ValueError("no values to stand in for removed units; give 'zero', 'mean' or both")
    for value in values:
        check_value(value)
    if not 0 < removed < 1:
        raise ValueError(f"removed must be a share of a site's units between 0 and 1, got {removed}")
    if sets < 0 or draws < 1:
        raise ValueError(f"sets must be at least 0 and draws at least 1, got {sets} and {draws}")
    costs: dict[str, float] = {}
    refused: dict[str, str] = {}
    found: dict[str, Scores] = {}
    table: AttributionTable | None = None
    for name, method in methods.items():
        said(f"scores: {name}")
        with _timed(costs, name), _refusals(refused, [name]):
            found[name] = scores(method, subject, batches, seed=seed)
    said("second moments")
    with _timed(costs, "J"), _refusals(refused, RESIDUALS):
        table = _second_moments(subject, batches, columns, seed)
    costs["kfac"] = costs["J"]
    nats = {name: not isinstance(methods.get(name), _NOT_NATS) for name in (*found, *RESIDUALS)}
    generator = torch.Generator().manual_seed(seed)
    rows: list[Agreement] = []
    pools: dict[tuple[str, Value], list[tuple[Tensor, Tensor]]] = {}
    for site in subject.sites:
        units = {name: each[site.name] for name, each in found.items()}
        guides = [units[name] for name in SELECTORS if name in units]
        items: dict[Items, Bool[Tensor, "items units"]] = {"units": single(site.units)}
        chosen_SU = cut_sets(guides, site.units, round(removed * site.units), sets, generator)
        if len(chosen_SU):
            items["sets"] = chosen_SU
        for of, items_XU in items.items():
            predicted = {name: items_XU.double() @ score_UC for name, score_UC in units.items()}
            if table is not None:
                predicted |= _residuals(subject, table, site.name, items_XU)
            for value in values:
                said(f"exact ablation ({value}) of {len(items_XU)} {of}: {site.name}")
                with _timed(costs, "ablation" if of == "units" else "ablation of sets"):
                    truth_XC = ablation_rises(subject, batches, site.name, items_XU, value=value)
                for name, estimate_XC in predicted.items():
                    rows.append(
                        agreement(name, site.name, of, value, estimate_XC, truth_XC, draws, seed, nats=nats[name])
                    )
                    if of == "units":
                        pools.setdefault((name, value), []).append((estimate_XC, truth_XC))
    for (name, value), parts in pools.items():
        estimate_XC, truth_XC = (torch.cat(some) for some in zip(*parts, strict=True))
        rows.append(agreement(name, EVERY, "units", value, estimate_XC, truth_XC, draws, seed, nats=nats[name]))
    forward = _forward_seconds(subject, batches)
    costs = {name: seconds / forward for name, seconds in costs.items() if name not in refused}
    costs["ablation"] /= len(values)
    costs.pop("ablation of sets", None)
    return Comparison(tuple(rows), costs, refused)


@contextmanager
def _refusals(refused: dict[str, str], names: Sequence[str]) -> Iterator[None]:
    """Take down why methods make no sense here."""
    try:
        yield
    except ValueError as error:
        refused |= dict.fromkeys(names, str(error))


def cut_sets(
    guides: Sequence[Float64[Tensor, "units categories"]],
    units: int,
    size: int,
    count: int,
    generator: torch.Generator,
) -> Bool[Tensor, "sets units"]:
    """Return distinct sets of ``size`` units: those a guide would remove for a category, blurred from not at all to
    wholly random; none where there are fewer than 8 different ones.
    """
    if not 0 < size < units or math.comb(units, size) < 8:
        return torch.zeros(0, units, dtype=torch.bool)
    columns = [column for guide_UC in guides for column in guide_UC.T] or [torch.zeros(units, dtype=torch.float64)]
    rank_XU = torch.stack([column.argsort(stable=True).argsort() for column in columns]).double()
    found: dict[tuple[int, ...], None] = {}
    for number in range(4 * count):
        blur = (number % count) / max(1, count - 1)
        noise_U = torch.rand(units, generator=generator, dtype=torch.float64) * units
        mixed_U = (1 - blur) * rank_XU[number % len(rank_XU)] + blur * noise_U
        found.setdefault(tuple(mixed_U.argsort(stable=True)[:size].sort().values.tolist()))
        if len(found) == count:
            break
    sets_SU = torch.zeros(len(found), units, dtype=torch.bool)
    for row_U, members in zip(sets_SU, found, strict=True):
        row_U[list(members)] = True
    return sets_SU


def agreement(
    method: str,
    site: str,
    of: Items,
    value: Value,
    estimate_XC: Float[Tensor, "items categories"],
    truth_XC: Float[Tensor, "items categories"],
    draws: int,
    seed: int,
    *,
    nats: bool,
) -> Agreement:
    """Hold one method's estimates against the truth; ``nats``: whether they speak of nats.

    >>> estimate, truth = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
    >>> found = agreement("mine", "first", "units", "zero", estimate, truth, draws=20, seed=0, nats=True)
    >>> found.spearman.value, found.slope.value
    (1.0, 2.0)
    """
    estimate, truth = estimate_XC.double().numpy(), truth_XC.double().numpy()
    picks_BX = np.random.default_rng(seed).integers(len(truth), size=(draws, len(truth)))
    return Agreement(
        method,
        site,
        of,
        value,
        len(truth),
        bootstrap(lambda x, y: spearman(x, y).mean(-1), estimate, truth, picks_BX),
        bootstrap(lambda x, y: pearson(x, y).mean(-1), estimate, truth, picks_BX),
        bootstrap(lambda x, y: top_overlap(x, y, 0.1).mean(-1), estimate, truth, picks_BX),
        bootstrap(slope, estimate, truth, picks_BX) if nats else None,
    )


Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From estimates and truth, both [*draws items categories], to one number a draw."""


def bootstrap(statistic: Statistic, estimate: np.ndarray, truth: np.ndarray, picks_BX: np.ndarray) -> Estimate:
    """Return a statistic of all items, with the percentile interval over the drawn ones (``picks_BX``)."""
    value = float(statistic(estimate[None], truth[None])[0])
    drawn = statistic(estimate[picks_BX], truth[picks_BX])
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (math.nan, math.nan)
    return Estimate(value, float(low), float(high))


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return correlations over the last axis but one; 0 where one side is constant, since it then tells nothing."""
    x, y = x - x.mean(-2, keepdims=True), y - y.mean(-2, keepdims=True)
    norms = np.sqrt((x * x).sum(-2) * (y * y).sum(-2))
    return np.where(norms > 0, (x * y).sum(-2) / np.where(norms > 0, norms, 1), 0.0)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return rank correlations over the last axis but one, of equals the mean rank."""
    return pearson(rankdata(x, axis=-2), rankdata(y, axis=-2))


def top_overlap(x: np.ndarray, y: np.ndarray, share: float) -> np.ndarray:
    """Return the share of the truly largest ``share`` of items that is also among the largest by estimate."""
    count = max(1, round(share * x.shape[-2]))
    mine, true = ((-each).argsort(-2, kind="stable").argsort(-2) < count for each in (x, y))
    return (mine & true).sum(-2) / count


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the least-squares factor from ``x`` to ``y`` through 0, over items and categories; NaN if x is all 0."""
    squares = (x * x).sum((-2, -1))
    return np.where(squares > 0, (x * y).sum((-2, -1)) / np.where(squares > 0, squares, 1), np.nan)


def _second_moments(subject: Subject, batches: Sequence[Probe], columns: int | None, seed: int) -> AttributionTable:
    if not subject.draws:
        raise ValueError("needs labels of the model's own; give the subject 'root' or 'sample'")
    return measure(subject, batches, seed=seed, moments=Moments(columns))


def _residuals(
    subject: Subject, table: AttributionTable, site: str, sets_SU: Bool[Tensor, "sets units"]
) -> dict[str, Float64[Tensor, "sets categories"]]:
    """Return J and K-FAC of each set of removed units; those of single units go the short way."""
    where = subject.site(site)
    weight = output_weight(subject.reader(where), where).to("cpu", torch.float64)
    found: dict[str, list[Tensor]] = {"kfac": [], "J": []}
    for category in table.categories:
        inputs, curvature = table.second_moment(site, category), table.curvature(site, category)
        none = torch.zeros(where.units, dtype=torch.bool)
        alone = [schur_residual(inputs, curvature, weight, none, gone) for gone in sets_SU]
        found["kfac"].append(torch.tensor(alone, dtype=torch.float64))
        if bool((sets_SU.sum(1) == 1).all()):
            found["J"].append(sets_SU.double() @ marginals(inputs, curvature, weight, ~none, none))
        else:
            fitted = [schur_residual(inputs, curvature, weight, ~gone, gone) for gone in sets_SU]
            found["J"].append(torch.tensor(fitted, dtype=torch.float64))
    return {name: torch.stack(each, 1) for name, each in found.items()}


def _forward_seconds(subject: Subject, batches: Sequence[Probe]) -> float:
    """Return the least time of a few passes: one alone may be held up, and would make all methods look cheap."""
    tries: list[dict[str, float]] = [{} for _ in range(_TRIES)]
    with subject.still(), torch.no_grad():
        for seconds in tries:
            with _timed(seconds, "forward"):
                for batch in batches:
                    subject.forward(batch.inputs, batch.categories)
    return min(seconds["forward"] for seconds in tries)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that is spent inside to what ``name`` has taken."""
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
