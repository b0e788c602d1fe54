"""Unlearning as fine-tuning: the same after pre-training, by routing, by adapters for each category, and by the loop.

A network learns stories, some of which mention trees or woods and are to be removed. Then it is trained on, for half as
many steps at a third of the rate, in a way that shall make them removable. Either it has learned them in pre-training
already, or (``new:``) they come with the fine-tuning, and only have to be kept apart.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import nn

from moeify.routed.split_model import SplitModel
from moeify.training import Contestant
from moeify.twin_cache import fingerprint
from moeify.world import Solo
from pipelines.studies import removal
from pipelines.studies.apart import train_apart
from pipelines.studies.low_rank import Adapters
from pipelines.studies.removal import Removed, in_shares
from pipelines.studies.study import Arm, Bench, Column, Measures, Size, Study, changed
from pipelines.studies.subsets import Subset
from pipelines.studies.training import test_losses, trained, without_rows
from pipelines.studies.unlearning import INSTALLED, ROWS, SHARES, STORIES, terms, texts_recipe

_RANK = 8
_PRETRAINED: dict[str, nn.Module] = {}
"""Those of this process: arms of a seed go on from the same one."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return every way to fine-tune."""
    steps = {"quick": 8, "full": 320, "large": 1000}[size]
    recipe = texts_recipe(size, INSTALLED if size == "quick" else STORIES, steps)
    return (
        Arm("dense twin", recipe, dense_twin),
        Arm("filtered twin", recipe, filtered),
        Arm("the rest alone", recipe, rest_alone),
        Arm("routed", recipe, routed),
        Arm("routed, whole", recipe, routed_whole),
        Arm("attribution", recipe, attributed),
        Arm("adapters, base frozen", recipe, adapters_frozen),
        Arm("adapters, base learns", recipe, adapters_all),
        Arm("adapters, base learns the rest", recipe, adapters_rest),
        Arm("loop", recipe, loop),
        Arm("new: dense twin", recipe, new_dense_twin),
        Arm("new: routed", recipe, new_routed),
        Arm("new: routed, whole", recipe, new_routed_whole),
        Arm("new: adapters, base frozen", recipe, new_adapters_frozen),
        Arm("new: adapters, base learns", recipe, new_adapters_all),
    )


def dense_twin(bench: Bench) -> Measures:
    """Train on with everything, remove nothing."""
    mine = _tuning(bench)
    return _judged(mine, None)


def filtered(bench: Bench) -> Measures:
    """Learn it neither before nor now; held against the twin that has learned it."""
    mine, fresh = _tuning(bench), _tuning(bench, new=True)
    return _judged(mine, removal.never_seen(fresh, terms(mine).kept(mine)))


def rest_alone(bench: Bench) -> Measures:
    """Train on with what is kept alone, and hope that the other is forgotten."""
    mine = _tuning(bench)
    return _judged(mine, removal.never_seen(mine, terms(mine).kept(mine)))


def routed(bench: Bench, *, new: bool = False) -> Measures:
    """Expand, route, ablate, as moeify's recipes do it."""
    mine = _tuning(bench, new=new)
    return _judged(mine, removal.routed(mine, terms(mine), hard=True))


def routed_whole(bench: Bench, *, new: bool = False) -> Measures:
    """Expand, route, ablate, where what is to be removed teaches fresh units and nothing else."""
    mine = _tuning(bench, new=new)
    return _judged(mine, removal.routed(mine, terms(mine), hard=True, whole=True))


def attributed(bench: Bench) -> Measures:
    """Train on as ever, and remove as many units by attribution."""
    mine = _tuning(bench)
    return _judged(mine, removal.attributed(mine, terms(mine)))


def adapters_frozen(bench: Bench, *, new: bool = False) -> Measures:
    """Train an adapter for each category, and nothing else."""
    return _adapters(_tuning(bench, new=new), "frozen")


def adapters_all(bench: Bench, *, new: bool = False) -> Measures:
    """Train an adapter for each category, and the base with every row."""
    return _adapters(_tuning(bench, new=new), "learns")


def adapters_rest(bench: Bench) -> Measures:
    """Train an adapter for each category, and the base with rows of what is kept."""
    return _adapters(_tuning(bench), "learns the rest")


def loop(bench: Bench) -> Measures:
    """Run the recipe on the trained network, and keep one category's part."""
    mine = _tuning(bench)
    return _judged(mine, removal.split(mine, terms(mine)))


def new_dense_twin(bench: Bench) -> Measures:
    """Learn it now, remove nothing."""
    mine = _tuning(bench, new=True)
    return _judged(mine, None)


def new_routed(bench: Bench) -> Measures:
    """``routed``, what is to be removed comes now."""
    return routed(bench, new=True)


def new_routed_whole(bench: Bench) -> Measures:
    """``routed_whole``, what is to be removed comes now."""
    return routed_whole(bench, new=True)


def new_adapters_frozen(bench: Bench) -> Measures:
    """``adapters_frozen``, what is to be removed comes now."""
    return adapters_frozen(bench, new=True)


def new_adapters_all(bench: Bench) -> Measures:
    """``adapters_all``, what is to be removed comes now."""
    return adapters_all(bench, new=True)


def _judged(mine: Bench, removed: Removed | None) -> Measures:
    return removal.judged(mine, terms(mine), removed)


def _tuning(bench: Bench, *, new: bool = False) -> Bench:
    """Return the bench of the fine-tuning, whose network is pre-trained; ``new``: on what is kept alone."""
    categories, first = bench.task.categories, 2 * bench.config.training.steps
    kept = categories[1:] if new else categories
    config = changed(bench.config, training={"learning_rate": bench.config.training.learning_rate / 3})
    mixed = replace(bench, task=in_shares(bench.task, SHARES, ROWS))
    network = _pretrained(mixed, kept, first)
    return replace(bench, config=config, task=Subset(mixed.task, categories, network, skipped=first))


def _pretrained(bench: Bench, kept: Sequence[str], steps: int) -> nn.Module:
    key = f"{fingerprint(bench.config, bench.task, Solo())} {kept}"
    if key not in _PRETRAINED:
        _PRETRAINED[key] = trained(bench.config, without_rows(bench.task, kept), steps=steps).network
    return _PRETRAINED[key]


def _adapters(mine: Bench, base: Literal["frozen", "learns", "learns the rest"]) -> Measures:
    model, removed = SplitModel(copy.deepcopy(mine.task.build()), mine.task.categories), terms(mine).removed
    adapters = Adapters(model, _RANK, mine.config.seed)

    def learners(category: str) -> Sequence[nn.Parameter]:
        adapters.run(category)
        alone = base == "frozen" or (base == "learns the rest" and category == removed)
        return adapters.of(category) if alone else [*adapters.of(category), *adapters.base()]

    train_apart(Contestant(model, mine.config.training), mine.task, mine.config.training, learners)
    before: dict[str, float] = {}
    for category in mine.task.categories:
        adapters.run(category)
        before[category] = test_losses(model, mine)[category]
    (kept,) = terms(mine).kept(mine)
    return _judged(mine, Removed(before, adapters.merged(kept)))


STUDY = Study(
    arms,
    columns=(
        Column("tax_before", "tax before", against=False),
        Column("tax", "tax, recovered", against=False),
        Column("gone_before", "gone before", against=False),
        Column("gone_after", "gone after", against=False),
        Column("gone", "gone, recovered", against=False),
        Column("relearned", "gone, attacked", against=False),
    ),
    note=(
        "Nats per token above the dense twin of the seed, which is trained on with everything from the same network, "
        "and has the same recovery and attack; that of the arms with new: is one to which what is removed is new too. "
        "tax: of what is kept, before the removal, and after a recovery on rows of what is kept. gone: of what is "
        "removed, before, right after the removal, after the recovery, and at the best of an attack that trains on 64 "
        "of its rows; what never saw it (filtered twin) says how much there is to go."
    ),
)
