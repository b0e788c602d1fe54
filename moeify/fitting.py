"""One call for a notebook: split a network by the categories of its data, with training around the cuts or without."""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

from torch import nn

from attribution.measure import Moments
from moeify.attributing import table_of
from moeify.events import MemoryTracker
from moeify.export.stock import to_dense
from moeify.following import cut
from moeify.loop import run
from moeify.models.families import DETECTED, detected, traits
from moeify.models.fused import closed
from moeify.notebook import Split, Trained, loss_of
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.data import GivenData
from moeify.recipe.load import read_values
from moeify.recipe.model import GivenModel
from moeify.routed.proof import prove
from moeify.routed.split_model import SplitModel
from moeify.splitting.propose import menu
from moeify.splitting.terms import terms_in_reach
from moeify.state import State
from moeify.store import MemoryStore
from moeify.task import tokens_read
from moeify.tasks.tensors import Data, Loss, TensorTask, whole_number
from moeify.world import Solo

_RECOVER = 0.4
"""Share of a round's steps that comes after its cut."""
_FIRST = 0.9
"""Share of the separation that the first of several rounds asks for: later ones divide what its experts own."""
_ROWS = 4
"""Of a step, where no step is made."""
_WANTED: tuple[Arm, ...] = ("split", "dense")
_UNTRAINED = ("attribution", "evaluation", "partition", "tree")
"""Sections of a recipe that mean something where nothing is trained."""
_TRAINED = (*_UNTRAINED, "budget", "checkpoints", "distillation", "routing", "training")
"""Those that mean something where network and rows are at hand, in one process that tracks nothing."""
_ARGUMENTS = ("steps", "rows")
"""Keys of ``training`` that are arguments here."""


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
    1e-3}``), of ``attribution``, ``budget``, ``checkpoints``, ``distillation`` (from the network as it was given),
    ``evaluation``, ``partition``, ``routing``, ``training`` (its steps and rows are the arguments) and ``tree``; what
    they say holds. ValueError for anything that does not fit.

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
    _check_sections(sections, _TRAINED)
    task = _task(network, data, loss, rows, seed)
    rounds = _rounds(task, rounds, whole_number("branching", branching, 2))
    steps = whole_number("steps", steps, 2 * rounds, ", two a round at least")
    planned = _plan(steps, _fraction(separation), rounds, branching)
    config = _config(task, steps, planned, rows, seed, controls, sections)
    if config.distillation and loss == "pixels":
        raise ValueError("distillation: got a mapping beside the loss 'pixels', wanted a loss with classes to foretell")
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

    Output weights follow (``partition.compensation.follow``), for two forward passes a site. Its tax is what the cut
    costs by itself; ``fit`` trains around its cuts. ``network``: as for ``fit``, or the dense twin of a split.
    ``branching``: children of every expert that is divided in one of ``rounds`` cuts; not given, one for each category,
    so that one cut is all. ``sections``: those of a recipe that mean something here, ``attribution``, ``evaluation``,
    ``partition`` and ``tree``. All else is as in ``fit``.

    >>> import torch
    >>> from moeify.models.build import Autoencoder
    >>> torch.manual_seed(0) is not None
    True
    >>> data = {name: (torch.rand(40, 6) < chance).float() for name, chance in (("dark", 0.2), ("light", 0.8))}
    >>> found = split(Autoencoder(6, 16, 3), data, loss="pixels", separation=0.3)
    >>> found.partition.separation >= 0.3, found.tax["mean"] < 0.1
    (True, True)
    """
    _check_sections(sections, _UNTRAINED)
    task = _task(network, data, loss, _ROWS, seed)
    branching = len(task.categories) if branching is None else whole_number("branching", branching, 2)
    planned = _plan(1, _fraction(separation), _rounds(task, rounds, branching), branching)
    untrained = [{**each, "train": 0, "recover": 0} for each in planned]
    sections["partition"] = _over({"compensation": {"follow": True}}, sections.get("partition", {}))
    config = _config(task, 1, untrained, _ROWS, seed, (), sections)
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
        proposal = choices.refined(choices.cut(config.rounds[number - 1].separation))
        rows = partial(task.probe_batches, number, asked.rows, asked.rows_at_once)
        cut(model, proposal, table, partition.compensation, None, task, rows, Solo())


def _rounds(task: TensorTask, rounds: int | None, branching: int) -> int:
    """Return as many rounds as were asked for, or as it takes to part all categories."""
    if rounds is not None:
        return whole_number("rounds", rounds, 1)
    return max(1, math.ceil(math.log(len(task.categories), branching)))


def _fraction(separation: object) -> float:
    """Return the separation that was asked for; ValueError where there is no such one."""
    asked = float(separation) if isinstance(separation, Real) else math.nan
    if not 0.0 < asked < 1.0:
        raise ValueError(f"separation: got {separation!r:.60}, wanted a number > 0 and < 1")
    return asked


def _check_sections(sections: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise ValueError for a section that would mean nothing, though a recipe may have it."""
    odd = sorted(sections.keys() - set(known))
    if untrained := [name for name in odd if name in _TRAINED]:
        told = ", ".join(untrained)
        raise ValueError(f"got {told}, of which nothing is known where nothing is trained; use moeify.fit")
    for name in odd:
        wanted = f"wanted some of {', '.join(sorted(known))}"
        if name in RunConfig.model_fields:
            raise ValueError(
                f"{name}: got a section that says nothing where network and rows are at hand, {wanted}; leave it out, "
                f"or write a recipe and run that (moeify run)"
            )
        close = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"{name}: got an unknown section, {wanted}{f'; nearest: {close[0]}' if close else ''}")
    training = sections.get("training")
    for name in _ARGUMENTS:
        if isinstance(training, Mapping) and name in training:
            raise ValueError(f"training.{name}: got {training[name]!r:.60}, wanted it as the argument {name}")


def _plan(steps: int, separation: float, rounds: int, branching: int) -> list[dict[str, Any]]:
    """Return so many rounds that take the first three quarters of the run."""
    each = max(2, 3 * steps // (4 * max(1, rounds)))
    recover = round(_RECOVER * each)
    shares = [1.0] if rounds == 1 else [_FIRST + (1.0 - _FIRST) * place / (rounds - 1) for place in range(rounds)]
    lengths = {"train": each - recover, "recover": recover, "branching": branching}
    return [{**lengths, "separation": separation * share} for share in shares]


def _config(
    task: TensorTask,
    steps: int,
    rounds: Sequence[Mapping[str, Any]],
    rows: int,
    seed: int,
    controls: Sequence[str],
    sections: Mapping[str, Any],
) -> RunConfig:
    """Return a recipe of a network and rows at hand; ValueError, a line for each problem."""
    at_hand = {"name": "fit", "data": GivenData(), "model": GivenModel(traits=traits(task.build()))}
    training = _over({"steps": steps, "rows": rows}, sections.get("training", {}))
    partition = _over({"multiple": 2, "min_units": 2}, sections.get("partition", {}))
    asked = {"seed": seed, "controls": controls, "rounds": rounds, "training": training, "partition": partition}
    return read_values({**sections, **at_hand, **asked})


def _over(defaults: Mapping[str, Any], given: Any) -> Any:
    """Return a section with what it does not say filled in, at every depth; what is no mapping as it is, to be
    refused."""
    if not isinstance(given, Mapping):
        return given
    deeper = {key: _over(own, given[key]) for key, own in defaults.items() if key in given and isinstance(own, Mapping)}
    return {**defaults, **given, **deeper}
