"""A short phase in which a network and the routers inside of it learn together.

Routers that are distilled from labels in a frozen network (``moeify.routers.by_layer``) send many tokens elsewhere than
their label would, to experts that never saw such, and read states in which nothing had to be said of the category.
Here every block routes by its own router while the whole network goes on learning: experts from the tokens that they
get. Routers learn their tokens' labels still, and so, through what they read, does what lies before them: attention
learns to carry the category. Network and dense twin each also learn from the mean of what they lately were: the split
model from what that says, and holds in its residual stream, along labels' routes. So what it says by its own routes is
drawn to what it says by labels', while both go on (after Tarvainen and Valpola, "Mean teachers are better role models",
2017, arXiv 1703.01780).
"""

import copy
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moeify.distillation import Teacher, teaching
from moeify.further import Further
from moeify.models.build import PRECISIONS
from moeify.models.families import streams
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation, Training
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import Distil, JointReport, LayerRouters, reading
from moeify.routers.router import leaf_of_category
from moeify.task import Batch, Redrawn, Task, tokens_read
from moeify.training import Contestant, Lesson

_SELF = Distillation(weight=0.5, stream=3.0)
"""How much they learn from what they lately were; where there is no such stream, from what it says alone."""
_RATE = 1.0
"""Of the recipe's learning rate; it warms up to it and falls as the recipe's does."""
_RATE_ALONE = 0.3
"""The same where there is no such stream to hold a network back from forgetting."""
_MEMORY = 50
"""Steps after which what they were counts 1/e of what they are, about, in the mean that teaches them."""
_WEIGHT = 0.1
"""Of a token's nats about its leaf, mean over sites, beside its nats about the next token (benchmarks/LOG.md)."""
_SHARPEST = 10
"""Scores begin at the power of two, up to two to this, that foretells labels best."""


class Joined(NamedTuple):
    """What came of it."""

    routers: LayerRouters
    report: JointReport


@dataclass(frozen=True)
class Joint(Further):
    """So many optimizer steps on rows that come after those of a run's training."""

    what: ClassVar[str] = "joint training"

    def __call__(self, model: SplitModel, dense: SplitModel | None = None) -> Joined:
        """Train a split model that serves all of the task's categories, in place, and return routers for it.

        ``dense``: the run's dense twin, which is trained on the same rows at the same rates, in place, to say what the
        same tokens do for it. The same bits each time, in one process. Raises ValueError as ``Distil`` does, and where
        training diverges.
        """
        if model.categories != self.task.categories:
            raise ValueError("joint training is for the whole split model, which serves all of the run's categories")
        distil = Distil(self.task, self.config)
        first, label = distil.start(model), distil.losses(model, None)
        lately = _Lately(model, self.task, self.config)
        training = self._training(_RATE if lately.streams else _RATE_ALONE)
        with teaching(lately, model) as taught:
            assert taught, "a teacher teaches"
            learner = lately.learner = _Learner(model, training, first)
            learner.sharpen(self._rows().train_batch(0))
            self.train(learner, self._rows(), training, _Lesson(learner, taught))
        if dense is not None:
            lately = _Lately(dense, self.task, self.config)
            with teaching(lately, dense) as taught:
                lately.learner = Contestant(dense, training)
                self.train(lately.learner, self._rows(), training, taught)
        return Joined(
            learner.routers,
            JointReport(
                steps=self.steps,
                tokens=self.steps * training.rows * tokens_read(self.task),
                label=label,
                dense=distil.losses(dense, None) if dense is not None else None,
            ),
        )

    def _rows(self) -> Redrawn:
        return Redrawn(self.task, lambda step: self.task.train_batch(self.config.training.steps + step))

    def _training(self, rate: float) -> Training:
        given = self.config.training
        return given.model_copy(update={"steps": self.steps, "learning_rate": rate * given.learning_rate})


class _Lately(Teacher):
    """The mean of what a model lately was, each row along its category's route: of its weights, a step ago and before,
    each counting less with every later step."""

    def __init__(self, model: SplitModel, task: Task, config: RunConfig) -> None:
        self._model = copy.deepcopy(model)
        self._model.autocast = PRECISIONS[config.training.autocast]
        settings = _SELF if streams(model.network) else _SELF.model_copy(update={"stream": 0.0})
        super().__init__(self._model.network, settings, self._model.autocast, task.units_per_row)
        self.learner: Contestant | None = None
        """Whom it follows; None: nobody, it stays what it is."""
        self._step = 0

    @torch.no_grad()
    def outputs(self, rows: Batch) -> Tensor:
        """Return what it says of rows; once for each step of the learner, it takes a part of the learner's weights."""
        if self.learner is not None and self._step < self.learner.step:
            for mean, now in zip(self._model.parameters(), self.learner.model.parameters(), strict=True):
                mean.lerp_(now, 1.0 / _MEMORY)
            self._step = self.learner.step
        return self._model(rows.inputs, rows.categories)


class _Learner(Contestant):
    """A split model whose blocks route by routers that learn with it."""

    def __init__(self, model: SplitModel, training: Training, routers: LayerRouters) -> None:
        super().__init__(model, training)
        self._experts = routers.experts
        self._weights = {site: nn.Parameter(weight.clone()) for site, weight in routers.weights.items()}
        self.optimizer.add_param_group({"params": list(self._weights.values()), "weight_decay": 0.0})
        self._leaf_C = leaf_of_category(model)
        self.missed: Float[Tensor, " rows"] | None = None
        """Nats about their leaves, summed over the tokens of each row of the pass before, mean over sites."""

    @property
    def routers(self) -> LayerRouters:
        """The routers as they are now."""
        return LayerRouters(self._experts, {site: weight.detach().clone() for site, weight in self._weights.items()})

    def outputs(self, batch: Batch, run: nn.Module | None = None) -> Tensor:
        """Return what the network gives where its own routers choose."""
        with reading(self.model) as read:
            found = self.model.by_layer(batch.inputs, self.routers.weights)
        self.missed = self._missed(batch, read)
        return found

    @torch.no_grad()
    def sharpen(self, batch: Batch) -> None:
        """Scale each router's scores by the power of two that foretells a batch's leaves best: it chooses as before."""
        self.model.eval()
        with reading(self.model) as read:
            self.model.by_layer(batch.inputs, self.routers.weights)
        leaf_N = self._leaves(batch)
        for site, weight in self._weights.items():
            score_NE = read[site].float() @ weight.t()
            missed = [F.cross_entropy(score_NE * 2**power, leaf_N).item() for power in range(_SHARPEST + 1)]
            weight.mul_(2 ** missed.index(min(missed)))

    def _missed(self, batch: Batch, read: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        leaf_N = self._leaves(batch)
        each = [
            F.cross_entropy(read[site].float() @ weight.t(), leaf_N, reduction="none")
            for site, weight in self._weights.items()
        ]
        return torch.stack(each).mean(0).view(batch.inputs.shape).sum(1)

    def _leaves(self, batch: Batch) -> Tensor:
        return self._leaf_C[batch.categories].repeat_interleave(batch.inputs.shape[1])


@dataclass(frozen=True)
class _Lesson:
    """What a learner has to lower: its nats, as its teacher sees them, and those about leaves."""

    learner: _Learner
    taught: Lesson

    def loss(self, rows: Batch, outputs: Tensor, nats: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Return it for the rows of the learner's pass before."""
        assert self.learner.missed is not None
        return self.taught.loss(rows, outputs, nats) + _WEIGHT * self.learner.missed
