"""Realistic unlearning: a small category with a near neighbour, where only some of it is labelled.

Of all tokens 4 % are of the category to be removed, 16 % of its neighbour, the rest of a third: the chapter on viruses
of a textbook of microbiology beside its chapters on cells; that textbook beside one of anatomy and physiology;
detective stories beside tales of horror. Rows of the category without a label teach everything, or are filtered out by
nobody: what SGTM asks (arXiv 2512.05648).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, assert_never

from moeify.recipe.routing import Routing
from moeify.routed.gradients import GradientRouter
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Redrawn, Task
from pipelines.studies import removal
from pipelines.studies.removal import Removed, in_shares
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study
from pipelines.studies.training import test_losses, trained
from pipelines.studies.unlearning import ROWS, terms, texts_recipe

_STEPS: Mapping[Size, int] = {"quick": 12, "full": 640, "large": 8000}
"""Four times as many as others have: a category of 4 % is to be seen often enough to be learned."""
SHARES = (0.04, 0.16, 0.8)
"""Of the tokens: what is to be removed, its neighbour, and the rest."""
_FIELDS = {"kind": "jsonl", "path": "text-openstax-bio/openstax-bio.jsonl.xz"}
_CELLS = ["The Cell", "Prokaryotic Diversity", "The Eukaryotes of Microbiology"]
_ANATOMY = {**_FIELDS, "where": {"label": ["anatomy-physiology"]}}
_NOVELS = {"kind": "jsonl", "path": "text-fiction/fiction-6genres.jsonl.xz", "group": "title"}
_TEXTS: Mapping[str, Mapping[str, Any]] = {
    "viruses": {
        "viruses": {**_FIELDS, "where": {"chapter": ["Acellular Pathogens"]}},
        "cells": {**_FIELDS, "where": {"chapter": _CELLS}},
        "anatomy": _ANATOMY,
    },
    "microbiology": {
        "microbiology": {**_FIELDS, "where": {"label": ["microbiology"]}},
        "anatomy": _ANATOMY,
        "fiction": _NOVELS,
    },
    "detective": {name: {**_NOVELS, "where": {"label": [name]}} for name in ("detective", "horror", "society-novel")},
}
"""Of each, what is to be removed, its neighbour, and the rest."""
_INSTALLED: Mapping[str, Any] = {name: {"kind": "installed", "source": name} for name in ("python", "prose", "c")}
"""Of ``--quick``, which needs no data of its own."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return for each category with its neighbour the dense twin, and each way to remove with all, some, few labels."""
    if size == "quick":
        return _arms(size, "", _INSTALLED)
    return tuple(arm for name, texts in _TEXTS.items() for arm in _arms(size, f"{name}: ", texts))


def _arms(size: Size, prefix: str, texts: Mapping[str, Any]) -> tuple[Arm, ...]:
    dense = texts_recipe(size, texts, _STEPS[size])
    found = [Arm(f"{prefix}dense twin", dense, dense_twin), Arm(f"{prefix}attribution", dense, attributed)]
    for labelled in (1.0, 0.4, 0.1):
        label = f"{labelled:.0%}".replace("%", " %")
        found.append(Arm(f"{prefix}filtered, {label}", dense, Labelled("filtered", labelled)))
        found.append(Arm(f"{prefix}routed, {label}", dense, Labelled("routed", labelled)))
        found.append(Arm(f"{prefix}routed, whole, {label}", dense, Labelled("routed, whole", labelled)))
    return tuple(found)


def unlabelled(task: Task, labelled: float, seed: int) -> Redrawn:
    """Return the task without the train rows of its first category whose label is known: that share of them."""
    sites = SplitModel(task.build(), task.categories).space.readers
    router = GradientRouter(Routing(labelled=labelled), task.categories, sites, seed)

    def some(step: int) -> Batch:
        batch = task.train_batch(step)
        known = router.labelled(batch.categories, batch.ids if batch.examples is None else batch.examples)
        return batch.take((~known | (batch.categories != 0)).nonzero()[:, 0])

    return Redrawn(task, some)


def dense_twin(bench: Bench) -> Measures:
    """Remove nothing."""
    return _judged(bench, None)


@dataclass(frozen=True)
class Labelled:
    """Remove by labels of which a share is known."""

    way: Literal["filtered", "routed", "routed, whole"]
    """``filtered``: never learn what is labelled. ``routed``: expand, route, ablate, as moeify's recipes do it.
    ``routed, whole``: the same, and labelled rows teach fresh units and nothing else in the whole network."""
    share: float
    """Of the rows, 0..1."""

    def __call__(self, bench: Bench) -> Measures:
        """Train, remove, judge."""
        mine = _bench(bench)
        match self.way:
            case "filtered":
                model = trained(mine.config, unlabelled(mine.task, self.share, mine.config.seed))
                removed = Removed(test_losses(model, mine), model.network)
            case "routed" | "routed, whole":
                whole = self.way == "routed, whole"
                removed = removal.routed(mine, terms(mine), hard=True, whole=whole, labelled=self.share)
            case _:
                assert_never(self.way)
        return _judged(bench, removed)


def attributed(bench: Bench) -> Measures:
    """Remove as many units of a network that was trained as ever."""
    mine = _bench(bench)
    return _judged(bench, removal.attributed(mine, terms(mine)))


def _bench(bench: Bench) -> Bench:
    """Return the bench as all arms have it: rows in their shares."""
    return replace(bench, task=in_shares(bench.task, SHARES, ROWS))


def _judged(bench: Bench, removed: Removed | None) -> Measures:
    mine = _bench(bench)
    found = removal.judged(mine, terms(mine), removed)
    _, neighbour, rest = bench.task.categories
    return found | {"tax_neighbour": found[f"tax/{neighbour}"], "tax_rest": found[f"tax/{rest}"]}


STUDY = Study(
    arms,
    columns=(
        Column("gone_before", "gone before", against=False),
        Column("gone_after", "gone after", against=False),
        Column("gone", "gone, recovered", against=False),
        Column("relearned", "gone, attacked", against=False),
        Column("tax_neighbour", "tax, neighbour", against=False),
        Column("tax_rest", "tax, rest", against=False),
    ),
    note=(
        "Nats per token above the dense twin of the seed, from which nothing is removed and which has the same "
        "recovery and attack. gone: of what is removed, before that, right after it, after a recovery on rows of what "
        "is kept, and at the best of an attack that trains on 64 of its rows; what never saw it (filtered, 100 %) says "
        "how much there is to go. tax: of its neighbour and of the rest, after the recovery. 100, 40, 10 %: of each "
        "category's rows, those whose label is known; filtered: the rows of the category that are known are left out."
    ),
)
