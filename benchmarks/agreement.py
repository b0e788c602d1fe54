"""Which score to trust: every method against exact ablation, and against the loss after a cut and a short retraining.

Two questions, two tables. Single units and sets of half a site's units, site by site, against exact ablation. And whole
partitions (every category keeps a core, a third of all units, and its own expert), as the partitioner cuts them by one
score or another, more or less blurred with chance, with equal, best or random widths over sites, and compensated: what
a method or J predicts from the network before the cut, against the held-out loss after some steps of retraining.

Four networks (see ``benchmarks.studies``), three seeds each; intervals are Student's t over seeds, the random control
is in every table. The full benchmark takes about an hour and a half on two cores; ``--quick`` one small network and
seed; ``--study`` one network of the four.
"""

import copy
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from attribution.ablation import Value
from attribution.affinity import group, profile_affinity
from attribution.agreement import ESTIMATES, Comparison, Items, compare, pearson, spearman
from attribution.measure import Moments, measure
from attribution.methods import scores
from attribution.sites import Site, output_weight
from attribution.subject import Rows, Subject
from attribution.table import AttributionTable
from benchmarks.report import Cell, Figure, parser, report
from benchmarks.studies import STUDIES, Study
from moeify.comparison import mean_interval
from moeify.data.root import NoDataError
from moeify.splitting.assignment import assign
from moeify.splitting.compensation import compensate
from moeify.splitting.knapsack import Curve, cheapest

CORE = 1 / 3
"""The share of all units that stays with every category."""
WIDTHS = ("equal", "best", "random")
GUIDES = ("fisher", "absolute", "wanda", "magnitude")
BLURS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURED = "(loss at once)"
"""Beside the methods: the held-out loss right after the cut, measured and not foreseen."""
SLOW = ("conductance", "influence", "integrated")


def main() -> None:
    """Run both comparisons on every network and seed."""
    asks = parser(__doc__)
    asks.add_argument("--study", choices=list(STUDIES), help="this network alone")
    asked = asks.parse_args()
    seeds, names = (range(1), ["text"]) if asked.quick else (range(3), list(STUDIES))
    names = [asked.study] if asked.study else names
    size = Size(2, 8, 6, 2) if asked.quick else Size(4, 32, 40, 60)
    units: dict[tuple[str, str], list[Comparison]] = {}
    cuts: dict[str, list[Cuts]] = {}
    for name, seed in product(names, seeds):
        try:
            study = STUDIES[name](seed, size.rows, asked.quick)
        except NoDataError as error:
            _say(f"{name}: skipped, {error}")
            continue
        methods = {k: v for k, v in ESTIMATES.items() if not (asked.quick and k in SLOW)}
        for kind, sites in kinds(study.subject.sites).items():
            _say(f"{name}, seed {seed}: {kind}, exact ablation")
            part = Subject(
                study.subject.network, sites, study.subject.categories, study.subject.nats, study.subject.sample
            )
            values: tuple[Value, ...] = ("zero",) if asked.quick else ("zero", "mean")
            found = compare(part, study.probe, methods, values=values, sets=size.sets, removed=0.5, seed=seed)
            units.setdefault((name, kind), []).append(found)
        if name != "cifar-jpeg":
            cuts.setdefault(name, []).append(compare_cuts(study, methods, size, seed))
    rows = [*unit_rows(units), *cut_rows(cuts)]
    report("agreement", rows, figures(units, cuts), asked.json, quick=asked.quick)


@dataclass(frozen=True)
class Size:
    """How much is tried."""

    rows: int
    """Of each category, for scores and ablation."""
    sets: int
    partitions: int
    steps: int
    """Of retraining."""


def kinds(sites: Sequence[Site]) -> dict[str, tuple[Site, ...]]:
    """Group sites by what their units are."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        kind = "heads" if site.name.endswith("heads") else "ffn" if site.name.endswith("ffn") else "channels"
        found.setdefault("hidden" if site.name == "hidden" else kind, []).append(site)
    return {kind: tuple(mine) for kind, mine in found.items()}


# --- partitions, and what they cost -----------------------------------------------------------------------

Keeps = Mapping[str, Bool[Tensor, "categories units"]]
"""Site -> the units that each category keeps."""


@dataclass(frozen=True)
class Cuts:
    """Partitions of one network: what was predicted of each, and what came of it."""

    predicted: dict[str, list[float]]
    immediate: list[float]
    """Rise of the held-out loss, before retraining."""
    retrained: list[float]
    """The same after it."""


def compare_cuts(study: Study, methods: Mapping[str, object], size: Size, seed: int) -> Cuts:
    """Cut, compensate, retrain and put back, again and again."""
    subject = study.subject
    table = measure(subject, study.measured, seed=seed, moments=Moments(2048))
    found = {}
    for name in methods:
        try:
            found[name] = scores(ESTIMATES[name], subject, study.measured, seed=seed)
        except ValueError as error:
            _say(f"{study.name}: {name} left out, {error}")
    cutter = Cutter(subject, table, seed)
    plans = list(product(WIDTHS, GUIDES, BLURS))
    plans = [plans[i] for i in np.linspace(0, len(plans) - 1, size.partitions).round().astype(int)]
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
        before, after = retrain(study, keeps, cutter.compensated(keeps), size.steps)
        immediate.append(before - start)
        retrained.append(after - start)
        _say(
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


# --- what is said -------------------------------------------------------------------------------------------


def unit_rows(units: Mapping[tuple[str, str], Sequence[Comparison]]) -> list[dict[str, Cell]]:
    """Return a line for each network, kind of unit and method."""
    rows: list[dict[str, Cell]] = []
    for (name, kind), found in units.items():
        methods = list(dict.fromkeys(row.method for each in found for row in each.rows))
        for method in methods:
            row: dict[str, Cell] = {"network": name, "what": kind, "method": method}
            asked: tuple[tuple[Items, Value], ...] = (
                ("units", "zero"),
                ("units", "mean"),
                ("sets", "zero"),
                ("sets", "mean"),
            )
            for of, value in asked:
                each = [comparison.mean(method, of, value) for comparison in found]
                row[f"{of} {value} spearman"] = interval([e.spearman for e in each])
                if of == "units" and value == "zero":
                    row["top tenth"] = interval([e.overlap for e in each])
                if of == "sets" and value == "zero":
                    row["sets zero pearson"] = interval([e.pearson for e in each])
            pooled = [p for comparison in found if (p := comparison.pooled(method, "zero"))]
            row["pooled spearman"] = interval([p.spearman.value for p in pooled])
            row["true / predicted"] = interval([p.slope.value for p in pooled if p.slope])
            row["cost"] = statistics.median(comparison.costs[method] for comparison in found)
            rows.append(row)
    return rows


def cut_rows(cuts: Mapping[str, Sequence[Cuts]]) -> list[dict[str, Cell]]:
    """Return a line for each network and method: whole partitions."""
    rows: list[dict[str, Cell]] = []
    for name, found in cuts.items():
        for method in (*found[0].predicted, MEASURED):
            rows.append({"network": name, "what": "partitions", "method": method})
            foreseen = [c.immediate if method == MEASURED else c.predicted[method] for c in found]
            for label, third in (("", False), (" best third", True)):
                each = [correlations(p, c.retrained, third) for p, c in zip(foreseen, found, strict=True)]
                rows[-1][f"retrained pearson{label}"] = interval([p for p, _ in each])
                rows[-1][f"retrained spearman{label}"] = interval([s for _, s in each])
            at_once = [correlations(p, c.immediate, False)[0] for p, c in zip(foreseen, found, strict=True)]
            rows[-1]["at once pearson"] = interval(at_once)
    return rows


def correlations(predicted: Sequence[float], true: Sequence[float], third: bool) -> tuple[float, float]:
    """Return Pearson's and Spearman's correlation, over all partitions or the third of them with the lowest loss."""
    x, y = np.array(predicted), np.array(true)
    if third:
        best = y.argsort(kind="stable")[: math.ceil(len(y) / 3)]
        x, y = x[best], y[best]
    return float(pearson(x[:, None], y[:, None])[0]), float(spearman(x[:, None], y[:, None])[0])


def interval(values: Sequence[float]) -> str | None:
    """Return a mean over seeds with half of its 95 % interval."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    mean, half = mean_interval(known)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ±{half:.3f}"


def figures(units: Mapping[tuple[str, str], Sequence[Comparison]], cuts: Mapping[str, Sequence[Cuts]]) -> list[Figure]:
    """Return the headlines: of the defaults, the means over networks and seeds."""
    found = []
    for name, method in (
        ("spearman_unit", "report8"),
        ("spearman_unit_one_draw", "report"),
        ("spearman_unit_random", "random"),
    ):
        pooled = [c.pooled(method, "zero") for all_ in units.values() for c in all_]
        each = [p.spearman.value for p in pooled if p]
        found.append(Figure(name, statistics.mean(each), ">= .95" if method == "report8" else "for comparison"))
    for name, third in (("pearson_sets", False), ("pearson_sets_best_third", True)):
        each = [correlations(c.predicted["J"], c.retrained, third)[0] for all_ in cuts.values() for c in all_]
        if each:
            found.append(Figure(name, statistics.mean(each), ">= .95" if not third else "> 0"))
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
