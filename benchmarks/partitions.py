"""Whole partitions of a studied network: cut by one score or another, compensated, retrained, and what foresaw the end.

Every category keeps a core, a third of all units, and its own expert's. Owners go by one of ``GUIDES``, more or less
blurred with chance; widths over sites are equal, the best by a knapsack over J, or random.

Axes: units U, categories C, experts K, bins B (experts and the core), rows R.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from attribution.affinity import group, profile_affinity
from attribution.agreement import pearson, spearman
from attribution.measure import Moments, measure
from attribution.methods import Method, scores
from attribution.sites import Site, output_weight
from attribution.subject import Rows, Subject
from attribution.table import AttributionTable
from benchmarks.studies import Study
from moeify.splitting.assignment import assign
from moeify.splitting.compensation import compensate
from moeify.splitting.knapsack import Curve, cheapest

CORE = 1 / 3
"""The share of all units that stays with every category."""
WIDTHS = ("equal", "best", "random")
GUIDES = ("fisher", "absolute", "wanda", "magnitude")
BLURS = (0.0, 0.25, 0.5, 0.75, 1.0)


Keeps = Mapping[str, Bool[Tensor, "categories units"]]
"""Site -> the units that each category keeps."""


@dataclass(frozen=True)
class Effort:
    """How much is tried."""

    partitions: int
    """From the best by a score to random ones."""
    steps: int
    """Of retraining each."""


@dataclass(frozen=True)
class Cuts:
    """Partitions of one network: what was predicted of each, and what came of it."""

    predicted: dict[str, list[float]]
    immediate: list[float]
    """Rise of the held-out loss, before retraining."""
    retrained: list[float]
    """The same after it."""


def compare_cuts(
    study: Study, methods: Mapping[str, Method], effort: Effort, seed: int, *, said: Callable[[str], None]
) -> Cuts:
    """Cut, compensate, retrain and put back, again and again. ``said`` hears what is being done."""
    table = measure(study.subject, study.measured, seed=seed, moments=Moments(2048))
    cutter = Cutter(study.subject, table, seed)
    # Sites that stay whole, as heads do, have no say in what a cut costs.
    subject = replace(study.subject, sites=tuple(cutter.sites.values()))
    found = {}
    for name, method in methods.items():
        said(f"{study.name}, seed {seed}: scores before the cuts, {name}")
        try:
            found[name] = scores(method, subject, study.measured, seed=seed)
        except ValueError as error:
            said(f"{study.name}: {name} left out, {error}")
    plans = list(product(WIDTHS, GUIDES, BLURS))
    plans = [plans[i] for i in np.linspace(0, len(plans) - 1, effort.partitions).round().astype(int)]
    predicted: dict[str, list[float]] = {name: [] for name in (*found, "kfac", "J")}
    immediate, retrained = [], []
    start = loss(study, None)
    for number, (widths, guide, blur) in enumerate(plans):
        keeps = cutter.cut(found[guide], blur, widths)
        for name, each in found.items():
            lost = [(each[site] * ~keep_CU.T * table.shares).sum() for site, keep_CU in keeps.items()]
            predicted[name].append(float(sum(lost)))
        for name in ("kfac", "J"):
            costs = [cutter.residual(site, keep_CU, refit=name == "J") for site, keep_CU in keeps.items()]
            predicted[name].append(sum(costs))
        before, after = retrain(study, keeps, cutter.compensated(keeps), effort.steps)
        immediate.append(before - start)
        retrained.append(after - start)
        said(
            f"{study.name}, seed {seed}: partition {number + 1} of {len(plans)} ({widths}, {guide}, {blur}): "
            f"{immediate[-1]:+.4f}, retrained {retrained[-1]:+.4f}, J {predicted['J'][-1]:.4f}"
        )
    return Cuts(predicted, immediate, retrained)


class Cutter:
    """Makes partitions of a network: one expert for each group of categories, and a core of ``CORE`` of all units."""

    def __init__(self, subject: Subject, table: AttributionTable, seed: int) -> None:
        self.subject = subject
        self.table = table
        self.experts = min(5, len(subject.categories))
        groups = group(profile_affinity(table, "fisher"), self.experts, balanced=True)
        places = [next(k for k, part in enumerate(groups) if c in part) for c in range(len(subject.categories))]
        self.expert_C = torch.tensor(places)
        self.sites = {site.name: site for site in subject.sites if site.units >= 3 * self.experts}
        self.weights = {
            name: output_weight(subject.reader(site), site).to("cpu", torch.float64)
            for name, site in self.sites.items()
        }
        self.random = np.random.default_rng(seed)

    def cut(self, score: Mapping[str, Tensor], blur: float, widths: str) -> Keeps:
        """Return which units each category keeps, by a score blurred with chance; all experts of a site are as wide.

        ``equal``: as wide a share in every site; ``best``: by a knapsack over J; ``random``: by chance.
        """
        options, curves = {}, []
        for name, site in self.sites.items():
            value_UB = self._values(score[name], blur)
            widest = site.units // self.experts
            choices = sorted({round(widest * part / 6) for part in range(7)})
            options[name] = [self._assigned(site, value_UB, width) for width in choices]
            match widths:
                case "equal":
                    wanted = (1 - CORE) * site.units / self.experts
                    costs = [abs(width - wanted) for width in choices]
                case "best":
                    costs = [self.residual(name, keep_CU, refit=True) for keep_CU in options[name]]
                case _:
                    costs = (self.random.random() * np.array(choices)).tolist()
            curves.append(Curve(tuple(width - choices[0] for width in choices), tuple(costs)))
        total = sum(round((1 - CORE) * site.units / self.experts) for site in self.sites.values())
        picks = cheapest(curves, min(total, sum(curve.savings[-1] for curve in curves)))
        return {name: options[name][pick] for name, pick in zip(options, picks, strict=True)}

    def _values(self, score_UC: Tensor, blur: float) -> np.ndarray:
        """Return each unit's worth to each expert, and to the core (all of it)."""
        value_UK = torch.stack([score_UC[:, self.expert_C == k].sum(1) for k in range(self.experts)], 1).numpy()
        rank_UK = self.random.permuted(value_UK.argsort(0).argsort(0) / len(value_UK), axis=0)
        mixed = (1 - blur) * value_UK / max(np.abs(value_UK).max(), 1e-300) + blur * rank_UK
        return np.concatenate([mixed, mixed.sum(1, keepdims=True)], 1)

    def _assigned(self, site: Site, value_UB: np.ndarray, width: int) -> Bool[Tensor, "categories units"]:
        capacity = np.array([*[width] * self.experts, site.units - self.experts * width])
        owner_U = torch.from_numpy(assign(value_UB, capacity).owner)
        return (owner_U == self.expert_C[:, None]) | (owner_U == self.experts)

    def residual(self, site: str, keep_CU: Bool[Tensor, "categories units"], *, refit: bool) -> float:
        """Return J of one site's cut over all categories, or the same without fitting the kept weights again."""
        total = 0.0
        for category, kept_U, share in zip(self.table.categories, keep_CU, self.table.shares.tolist(), strict=True):
            kept = kept_U if refit else torch.zeros_like(kept_U)
            total += share * self.table.residual(site, category, self.weights[site], kept, ~kept_U)
        return total

    def compensated(self, keeps: Keeps) -> dict[str, Tensor]:
        """Return the weight of each reader with the closed-form correction for the cut, by parameter name."""
        found = {}
        for name, keep_CU in keeps.items():
            site, weight = self.sites[name], self.weights[name]
            wide = keep_CU.repeat_interleave(len(weight) // site.units, 1)
            moments = (self.table.second_moment(name, category) for category in self.table.categories)
            corrected = compensate(moments, weight, wide, self.table.shares, ridge=0.01)
            parameter = f"{site.reader}.weight"
            like = self.subject.network.get_parameter(parameter)
            found[parameter] = corrected.t().reshape(like.shape).to(like)
        return found


def retrain(study: Study, keeps: Keeps, weights: Mapping[str, Tensor], steps: int) -> tuple[float, float]:
    """Return the held-out loss with the cut, and after retraining with it; the network is put back."""
    network = study.subject.network
    saved = copy.deepcopy(network.state_dict())
    network.load_state_dict(weights, strict=False)
    before = loss(study, keeps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=study.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    network.train()
    for step in range(steps):
        batch = study.train(step)
        for part in optimizer.param_groups:
            part["lr"] = study.learning_rate * min(1.0, (step + 1) / 5) * (1 - step / (steps + 1))
        outputs = masked(study.subject, batch, keeps)
        (study.subject.nats(outputs, batch.targets).sum() / batch.targets.numel()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    after = loss(study, keeps)
    network.load_state_dict(saved)
    return before, after


def masked(subject: Subject, batch: Rows, keeps: Keeps) -> Tensor:
    """Run rows, each with its category's units only."""
    handles = []
    for site in subject.sites:
        if site.name in keeps:
            keep_RU = keeps[site.name][batch.categories].float()

            def hook(_: nn.Module, args: tuple[Tensor], site: Site = site, keep: Tensor = keep_RU) -> tuple[Tensor]:
                return (args[0] * site.keeping(keep, args[0]),)

            handles.append(subject.reader(site).register_forward_pre_hook(hook))
    try:
        return subject.forward(batch.inputs, batch.categories)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def loss(study: Study, keeps: Keeps | None) -> float:
    """Return the held-out loss, nats per token, the mean over categories."""
    sums, counts = torch.zeros(2, len(study.subject.categories), dtype=torch.float64)
    for batch in study.held_out:
        nats_R = study.subject.nats(masked(study.subject, batch, keeps or {}), batch.targets).double()
        sums.index_add_(0, batch.categories, nats_R)
        each = torch.full((len(nats_R),), batch.targets.numel() / len(nats_R), dtype=torch.float64)
        counts.index_add_(0, batch.categories, each)
    return float((sums / counts).mean())


def correlations(predicted: Sequence[float], true: Sequence[float], third: bool) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation, over all partitions or the third of them with the lowest loss."""
    x, y = np.array(predicted), np.array(true)
    if third:
        best = y.argsort(kind="stable")[: math.ceil(len(y) / 3)]
        x, y = x[best], y[best]
    return float(pearson(x[:, None], y[:, None])[0]), float(spearman(x[:, None], y[:, None])[0])
