"""Removing a category from a trained network, and what is left of it: the trial that every arm goes through alike.

A removal leaves a plain network that runs every row, whatever its category. It is read right away; again after a
recovery, a few more steps on rows of the categories that are kept; and then while it is attacked: trained on a few rows
of the removed one. All arms of a bench have the same budgets, rates and rows, those that nothing is removed from too.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeify.attributing import table_of
from moeify.evaluation import row_losses
from moeify.export.pruning import only, prune
from moeify.models.families import describe
from moeify.models.resizing import copy_units, shaped, widened
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Training
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Redrawn, Task
from moeify.training import Contestant, train
from moeify.twin_cache import fingerprint
from moeify.world import Solo
from pipelines.studies.study import Bench, Measures, changed
from pipelines.studies.training import mean_of, run_loop, test_losses, trained, without_rows

_ATTACK_ROWS = 8
"""Of a step of the attack."""
_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly."""
_POINTS = 10
"""Of the dense twin's loss curve."""


@dataclass(frozen=True)
class Terms:
    """What is removed, and the budgets of what follows."""

    removed: str
    """The category."""
    fresh: int
    """Units of each site that are removed with it, where an arm adds such units."""
    recovery: int
    """Steps on rows of what is kept, at the rate that training ended with."""
    examples: int
    """Rows of the removed category that the attack has."""
    attack: tuple[int, ...]
    """Steps of the attack after which it is read, at a third of the recipe's rate."""

    def kept(self, bench: Bench) -> list[str]:
        """Return the other categories."""
        return [each for each in bench.task.categories if each != self.removed]


@dataclass(frozen=True)
class Removed:
    """What an arm came to."""

    before: Mapping[str, float]
    """Category -> test loss before the removal, nats per token, as the arm runs its rows."""
    left: nn.Module
    """The network without what was removed."""


@dataclass(frozen=True)
class _Twin:
    """The dense twin's own trial, and how it got there."""

    found: Measures
    curve: Sequence[tuple[float, float]]
    """Share of its steps, those of its recovery included, and the mean test loss of what is kept."""


_TWINS: dict[str, _Twin] = {}
"""Those of this process: arms of a seed ask for the same one."""


def in_shares(task: Task, shares: Sequence[float], rows: int) -> Redrawn:
    """Return the task with so many rows a step, each category's share of them spread evenly over steps.

    The task itself has to yield as many rows of every category.
    """
    ends = np.cumsum(shares)[:-1]

    def some(step: int) -> Batch:
        batch = task.train_batch(step)
        drawn = np.searchsorted(ends, np.arange(step * rows, (step + 1) * rows) * _GOLDEN % 1.0, side="right")
        counts = np.bincount(drawn, minlength=len(shares))
        each = [(batch.categories == number).nonzero()[:count, 0] for number, count in enumerate(counts)]
        return batch.take(torch.cat(each))

    return Redrawn(task, some)


# --- ways to remove ---------------------------------------------------------------------------------------


def never_seen(bench: Bench, kept: Sequence[str]) -> Removed:
    """Train the dense network on rows of what is kept alone: as many of them as any arm has."""
    model = trained(bench.config, without_rows(bench.task, kept))
    return Removed(test_losses(model, bench), model.network)


def routed(bench: Bench, terms: Terms, *, hard: bool = False, whole: bool = False, labelled: float = 1.0) -> Removed:
    """Expand, route, ablate: of all feed-forward units, rows of the removed category teach fresh ones alone.

    Rows of the others teach the rest alone. ``hard``: fresh units do not even run for these; ``whole``: what is no
    feed-forward unit does not learn from rows of the removed category either; ``labelled``: the share of rows whose
    label is known, the others teach everything.
    """
    config = _routing(bench, terms, hard=hard, whole=whole, core="frozen", labelled=labelled)
    model = trained(config, bench.task, _expanded(bench, terms))
    old = {site.name: torch.arange(site.units - terms.fresh) for site in model.space.sites}
    return Removed(test_losses(model, bench), with_units(model, old))


def attributed(bench: Bench, terms: Terms) -> Removed:
    """Train the expanded network as a dense one, and remove as many units as ``routed`` does: by attribution.

    Those go whose share of the removed category's attribution is furthest above their share of the others'.
    """
    model, asked = trained(bench.config, bench.task, _expanded(bench, terms)), bench.config.attribution
    table = table_of(model, bench.task, asked.rows, asked.rows_at_once, bench.config.seed, round_=1)
    place, left = bench.task.categories.index(terms.removed), {}
    for site in model.space.sites:
        shares_UC = table.score(site.name, asked.score)
        shares_UC = shares_UC / shares_UC.sum(0)
        others_U = (shares_UC.sum(1) - shares_UC[:, place]) / (shares_UC.shape[1] - 1)
        lead_U = shares_UC[:, place] - others_U
        left[site.name] = lead_U.argsort(stable=True)[: site.units - terms.fresh].sort().values
    return Removed(test_losses(model, bench), with_units(model, left))


def handed_over(bench: Bench, terms: Terms) -> Removed:
    """Route the whole network's gradients in the recipe, whose cut then gives the fresh units to the removed category's
    expert, and keep the part that the one other category runs."""
    config = _routing(bench, terms, hard=True, whole=True)
    owners = {"kind": "attribution", "hand_over": True}
    return split(replace(bench, config=changed(config, partition={"owners": owners})), terms)


def split(bench: Bench, terms: Terms) -> Removed:
    """Run the recipe, and keep the part that the one other category runs."""
    _, model = run_loop(bench)
    return Removed(test_losses(model, bench), prune(model, only(model.partition, terms.kept(bench))).network)


def _routing(bench: Bench, terms: Terms, *, hard: bool, whole: bool, **more: Any) -> RunConfig:
    kept = terms.kept(bench)
    experts = [{"categories": [terms.removed], "fresh": terms.fresh}, {"categories": kept}]
    sets = {"hard": kept if hard else [], "apart": [terms.removed] if whole else []}
    return changed(bench.config, routing={"gradients": "parameters", "experts": experts, **sets, **more})


def _expanded(bench: Bench, terms: Terms) -> SplitModel:
    return SplitModel(widened(bench.task.build(), lambda _: terms.fresh, bench.config.seed), bench.task.categories)


def with_units(model: SplitModel, kept: Mapping[str, Int[Tensor, " kept"]]) -> nn.Module:
    """Return the network with these units of each site alone."""
    network = shaped(describe(model.network), {site: len(units) for site, units in kept.items()})
    copy_units(model.network, model.space, kept, network)
    return network


# --- the trial --------------------------------------------------------------------------------------------


def judged(bench: Bench, terms: Terms, removed: Removed | None) -> Measures:
    """Put what is left to the trial, and hold it against the dense twin, from which nothing was removed; None: itself.

    Names: ``before/CATEGORY``, ``after/``, ``recovered/`` and ``attack-STEPS/``: test losses, nats per token;
    ``tax/CATEGORY`` of those kept after the recovery; and means of them, named in the notes of the studies.
    """
    twin, kept, own = _twin(bench, terms), terms.kept(bench), terms.removed
    found = twin.found if removed is None else _trial(bench, terms, removed)

    def above(moment: str, categories: Sequence[str]) -> float:
        return fmean(found[f"{moment}/{each}"] - twin.found[f"{moment}/{each}"] for each in categories)

    return found | {
        "tax_before": above("before", kept),
        "tax_after": above("after", kept),
        "tax": above("recovered", kept),
        **{f"tax/{category}": above("recovered", [category]) for category in kept},
        "gone_before": above("before", [own]),
        "gone_after": above("after", [own]),
        "gone": above("recovered", [own]),
        "relearned": found["attacked"] - twin.found["attacked"],
        "equivalent": _equivalent(fmean(found[f"recovered/{each}"] for each in kept), twin.curve),
    }


def _trial(bench: Bench, terms: Terms, removed: Removed) -> Measures:
    model = SplitModel(copy.deepcopy(removed.left), bench.task.categories)
    found = _named("before", removed.before) | _named("after", test_losses(model, bench))
    settings, rest = bench.config.training, without_rows(bench.task, terms.kept(bench))
    rate, end = settings.learning_rate, settings.steps

    slow = {"steps": terms.recovery, "learning_rate": rate * max(settings.final_learning_rate, 0.1)}
    recovery = settings.model_copy(update=slow)
    rows = Redrawn(bench.task, lambda step: rest.train_batch(end + step))
    _train(Contestant(model, recovery), rows, recovery, terms.recovery)
    recovered = test_losses(model, bench)
    found |= _named("recovered", recovered)

    steady = {"steps": terms.attack[-1], "learning_rate": rate / 3, "final_learning_rate": 1.0, "warmup": 0.0}
    attack, pool = settings.model_copy(update=steady), _examples(bench, terms)
    attacker, rows = Contestant(model, attack), Redrawn(bench.task, lambda step: _cycled(pool, step))
    best = _validation(model, bench, terms.removed), recovered[terms.removed]
    for steps in terms.attack:
        _train(attacker, rows, attack, steps)
        losses = test_losses(model, bench)
        found |= _named(f"attack-{steps}", losses)
        best = min(best, (_validation(model, bench, terms.removed), losses[terms.removed]))
    return found | {"attacked": best[1]}  # where validation rows say that the attack did best


def _train(contestant: Contestant, task: Task, settings: Training, until: int) -> None:
    train(contestant, task, Solo(), settings, until, until, lambda *_: None)


def _named(moment: str, losses: Mapping[str, float]) -> Measures:
    return {f"{moment}/{category}": loss for category, loss in losses.items()}


def _validation(model: SplitModel, bench: Bench, category: str) -> float:
    rows = row_losses(model, bench.task, Solo(), bench.config.evaluation, "validation")
    return rows.by_category(bench.task)[category]


def _examples(bench: Bench, terms: Terms) -> Batch:
    """Return the attack's rows: of the train split, drawn for steps that no arm trains on."""
    own, step = without_rows(bench.task, [terms.removed]), 10 * bench.config.training.steps
    found = own.train_batch(step)
    while len(found.categories) < terms.examples:
        step += 1
        found = _joined(found, own.train_batch(step))
    return found.take(torch.arange(terms.examples))


def _joined(one: Batch, other: Batch) -> Batch:
    assert one.examples is not None
    assert other.examples is not None
    return Batch(
        torch.cat([one.inputs, other.inputs]),
        torch.cat([one.targets, other.targets]),
        torch.cat([one.categories, other.categories]),
        torch.cat([one.ids, other.ids]),
        torch.cat([one.examples, other.examples]),
    )


def _cycled(pool: Batch, step: int) -> Batch:
    return pool.take(torch.arange(step * _ATTACK_ROWS, (step + 1) * _ATTACK_ROWS) % len(pool.categories))


def _twin(bench: Bench, terms: Terms) -> _Twin:
    """Return the dense twin of the bench, trained once in this process."""
    key = f"{fingerprint(bench.config, bench.task, Solo())} {terms}"
    if key not in _TWINS:
        settings, kept = bench.config.training, terms.kept(bench)
        contestant, curve = Contestant(SplitModel(bench.task.build(), bench.task.categories), settings), []
        ends = sorted({max(1, settings.steps * point // _POINTS) for point in range(1, _POINTS + 1)})
        for end in ends:
            _train(contestant, bench.task, settings, end)
            losses = test_losses(contestant.model, bench)
            curve.append((end / (settings.steps + terms.recovery), mean_of(losses, kept)))
        found = _trial(bench, terms, Removed(losses, contestant.model.network))
        curve.append((1.0, fmean(found[f"recovered/{each}"] for each in kept)))
        _TWINS[key] = _Twin(found, curve)
    return _TWINS[key]


def _equivalent(loss: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the share of the twin's steps at which its loss is first as low, between points on a line; 1 at most."""
    last = (0.0, float("inf"))
    for share, reached in curve:
        if reached <= loss:
            if last[1] == float("inf"):
                return share
            return last[0] + (share - last[0]) * (last[1] - loss) / (last[1] - reached)
        last = share, reached
    return 1.0
