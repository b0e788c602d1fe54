"""One call for a notebook: split a network by the categories of its data, with training around the cuts or without."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from attribution.measure import Moments
from moeify.attributing import table_of
from moeify.events import MemoryTracker
from moeify.export.stock import to_dense
from moeify.loop import run
from moeify.models.families import DETECTED, detected
from moeify.models.fused import closed
from moeify.notebook import Split, Trained, loss_of
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.routed.proof import prove
from moeify.routed.split_model import SplitModel
from moeify.splitting.propose import menu
from moeify.splitting.terms import terms_in_reach
from moeify.state import State
from moeify.store import MemoryStore
from moeify.task import tokens_read
from moeify.tasks.tensors import Data, Loss, TensorTask

_RECOVER = 0.4
"""Share of a round's steps that comes after its cut."""
_FIRST = 0.9
"""Share of the separation that the first of several rounds asks for: later ones divide what its experts own."""
_WANTED: tuple[Arm, ...] = ("split", "dense")
_UNTRAINED = ("attribution", "evaluation", "partition", "tree")
"""Sections of a recipe that mean something where nothing is trained."""


def fit(
    network: nn.Module,
    data: Data,
    *,
    loss: Loss,
    steps: int,
    separation: float = 0.4,
    rounds: int | None = None,
    branching: int = 2,
    rows: int = 32,
    seed: int = 0,
    controls: Sequence[str] = (),
    **sections: Any,
) -> Split:
    """Train a network and split it, round by round, into experts for the categories of its data.

    ``network``: an autoencoder of ``moeify.models.build``, a network of ``transformers`` (Llama, GPT-2, ViT, ...), or
    any other whose feed-forward blocks are modules by themselves (``moeify.models.detect``), trained or not; it is
    copied and stays as it is. ``data``: category -> rows, see ``moeify.tasks.tensors``.
    ``steps``: of the optimizer, of each model, in all. ``separation``: that the last round asks for. ``rounds``: as
    many as it takes to divide the categories by ``branching`` down to one, where not given. ``sections``: of a recipe,
    as a recipe has them (``partition={"min_units": 2}``, ``tree=[["a", "b"], "c"]``, ``training={"learning_rate":
    1e-3}``); what they say holds. ValueError for anything that does not fit.

    >>> import torch
    >>> from moeify.models.build import Autoencoder
    >>> torch.manual_seed(0) is not None
    True
    >>> data = {name: (torch.rand(40, 6) < chance).float() for name, chance in (("dark", 0.2), ("light", 0.8))}
    >>> found = fit(Autoencoder(6, 16, 3), data, loss="pixels", steps=30, rounds=1, partition={"min_units": 2})
    >>> sorted(found.partition.tree.categories)
    ['dark', 'light']
    >>> found.test_loss["split"].keys() == found.test_loss["dense"].keys() == {"dark", "light"}
    True
    """
    task = _task(network, data, loss, rows, seed)
    planned = _plan(steps, separation, _rounds(task, rounds, branching), branching)
    config = _config(loss, steps, planned, rows, seed, controls, sections)
    store, events = MemoryStore(), MemoryTracker()
    result = run(config, task, store=store, tracker=events)
    newest = store.newest()
    assert newest is not None
    arms = State.load(store, newest.name, config).arms
    split, dense = (arms[arm].model.eval() for arm in _WANTED)
    return Split(split, dense, task, config, result.test_loss, Trained(result, events))


def split(
    network: nn.Module,
    data: Data,
    *,
    loss: Loss,
    separation: float = 0.4,
    rounds: int = 1,
    branching: int | None = None,
    seed: int = 0,
    **sections: Any,
) -> Split:
    """Split a trained network as it is: measure, cut and compensate; nothing is trained.

    Its tax is what the cut costs by itself; ``fit`` trains around its cuts. ``network``: as for ``fit``, or the dense
    twin of a split. ``branching``: children of every expert that is divided in one of ``rounds`` cuts; not given, one
    for each category, so that one cut is all. ``sections``: those of a recipe that mean something here,
    ``attribution``, ``evaluation``, ``partition`` and ``tree``. All else is as in ``fit``.

    >>> import torch
    >>> from moeify.models.build import Autoencoder
    >>> torch.manual_seed(0) is not None
    True
    >>> data = {name: (torch.rand(40, 6) < chance).float() for name, chance in (("dark", 0.2), ("light", 0.8))}
    >>> found = split(Autoencoder(6, 16, 3), data, loss="pixels", separation=0.3)
    >>> found.partition.separation >= 0.3, found.tax["mean"] < 0.1
    (True, True)
    """
    if odd := sorted(sections.keys() - set(_UNTRAINED)):
        raise ValueError(f"got {', '.join(odd)}, of which nothing is known where nothing is trained; use moeify.fit")
    task = _task(network, data, loss, 4, seed)
    branching = branching or len(task.categories)
    planned = [{**each, "train": 0, "recover": 0} for each in _plan(1, separation, rounds, branching)]
    config = _config(loss, 1, planned, 4, seed, (), sections)
    if config.partition.null_test or config.partition.told:
        raise ValueError("got partition.null_test or partition.told, which take training; use moeify.fit")
    dense = SplitModel(task.build(), task.categories, kinds=config.partition.units).eval()
    made = SplitModel(task.build(), task.categories, kinds=config.partition.units).eval()
    _cut(made, task, config)
    arms: dict[Arm, SplitModel] = {"split": made, "dense": dense}
    return Split(made, dense, task, config, {arm: loss_of(model, task, config) for arm, model in arms.items()})


def _task(network: nn.Module, data: Data, loss: Loss, rows: int, seed: int) -> TensorTask:
    """Return data and network as a task; of a network without an adapter, prove what was found in it."""
    network = _plain(network)
    task = TensorTask(network, data, loss, rows=rows, seed=seed)
    if detected(network):
        DETECTED.remember(network)
        prove(network, task.train_batch(0).inputs[:4])
    return task


def _plain(network: nn.Module) -> nn.Module:
    """Return a network as its architecture has it; of a dense twin a copy of that."""
    if not isinstance(network, SplitModel):
        return network
    if len(network.partition.tree.nodes) > 1:
        raise ValueError("network: got a model that is split already, wanted a dense one, such as a split's dense twin")
    return closed(to_dense(network, network.categories, padded=False).network)


def _cut(model: SplitModel, task: TensorTask, config: RunConfig) -> None:
    """Cut a model in every round of a recipe, in place, measured anew each time."""
    asked, partition = config.attribution, config.partition
    terms = terms_in_reach(config, task.categories, model.network, model.space, tokens_read(task))
    for number in range(1, len(config.rounds) + 1):
        table = table_of(model, task, asked.rows, asked.rows_at_once, config.seed, Moments(asked.columns), number)
        known = model.partition, table, model.output_weights, partition, config.rounds[number - 1 :], asked.score
        choices = menu(*known, config.tree, None, model.input_weight, config.seed, terms)
        proposal = choices.cut(config.rounds[number - 1].separation)
        model.cut(proposal, table, partition.compensation)


def _rounds(task: TensorTask, rounds: int | None, branching: int) -> int:
    """Return as many rounds as were asked for, or as it takes to part all categories."""
    return max(1, math.ceil(math.log(len(task.categories), branching))) if rounds is None else rounds


def _plan(steps: int, separation: float, rounds: int, branching: int) -> list[dict[str, Any]]:
    """Return so many rounds that take the first three quarters of the run."""
    each = max(2, 3 * steps // (4 * max(1, rounds)))
    recover = round(_RECOVER * each)
    shares = [1.0] if rounds == 1 else [_FIRST + (1.0 - _FIRST) * place / (rounds - 1) for place in range(rounds)]
    lengths = {"train": each - recover, "recover": recover, "branching": branching}
    return [{**lengths, "separation": separation * share} for share in shares]


def _config(
    loss: Loss,
    steps: int,
    rounds: list[dict[str, Any]],
    rows: int,
    seed: int,
    controls: Sequence[str],
    sections: dict[str, Any],
) -> RunConfig:
    """Return a recipe. Of its sections ``data`` and ``model``, read by tasks of recipes, the kinds alone hold."""
    kinds: dict[str, Any] = {"data": {"kind": "digits"}, "model": {"kind": "autoencoder"}}
    if loss == "tokens":
        source = {"kind": "jsonl", "path": "tensors"}
        kinds = {"data": {"kind": "text", "source": source}, "model": {"kind": "llama"}}
    training = {"steps": steps, "rows": rows, **sections.pop("training", {})}
    partition = {"multiple": 2, "min_units": 2, **sections.pop("partition", {})}
    given = {"seed": seed, "controls": tuple(controls), "rounds": rounds, **sections}
    return RunConfig.model_validate({"name": "fit", **kinds, "training": training, "partition": partition, **given})
