"""One call for a notebook: split a network by the categories of its data, beside a dense twin that is not split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeify.evaluation import row_losses
from moeify.events import MemoryTracker
from moeify.examples import Portraits
from moeify.loop import run
from moeify.models.families import DETECTED, detected
from moeify.portraits import portraits
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.routed.proof import prove
from moeify.routed.split_model import SplitModel
from moeify.state import State
from moeify.store import MemoryStore
from moeify.tasks.tensors import Data, Loss, TensorTask
from moeify.world import Solo

_RECOVER = 0.4
"""Share of a round's steps that comes after its cut."""
_FIRST = 0.9
"""Share of the separation that the first of several rounds asks for: later ones divide what its experts own."""
_WANTED: tuple[Arm, ...] = ("split", "dense")


@dataclass(frozen=True)
class Fit:
    """What ``fit`` gives: two models trained alike on the same rows, and the run's figures."""

    split: SplitModel
    dense: SplitModel
    """The dense twin."""
    result: Result
    task: TensorTask
    config: RunConfig
    events: MemoryTracker
    """All that the run said, for curves."""

    def loss(self, model: SplitModel) -> dict[str, float]:
        """Return category -> a model's loss on the test rows, in nats per token or example.

        ``model`` serves the task's categories: ``split``, ``dense``, or what ``moeify.ablate`` makes of them.
        """
        return row_losses(model, self.task, Solo(), self.config.evaluation, "test").by_category(self.task)

    def portraits(self, rows: int = 16) -> Portraits:
        """Return what each expert does, by example (``moeify.portraits``)."""
        return portraits(self.split, self.task, rows, self.config.evaluation.rows_at_once)


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
) -> Fit:
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
    >>> sorted(found.split.partition.tree.categories)
    ['dark', 'light']
    >>> sorted(found.loss(found.split)) == sorted(found.loss(found.dense)) == ['dark', 'light']
    True
    """
    task = TensorTask(network, data, loss, rows=rows, seed=seed)
    if detected(network):
        DETECTED.remember(network)
        prove(network, task.train_batch(0).inputs[:4])
    rounds = max(1, math.ceil(math.log(len(task.categories), branching))) if rounds is None else rounds
    config = _config(loss, steps, _plan(steps, separation, rounds, branching), rows, seed, controls, sections)
    store, events = MemoryStore(), MemoryTracker()
    result = run(config, task, store=store, tracker=events)
    newest = store.newest()
    assert newest is not None
    arms = State.load(store, newest.name, config).arms
    split, dense = (arms[arm].model.eval() for arm in _WANTED)
    return Fit(split, dense, result, task, config, events)


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
