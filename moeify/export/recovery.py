"""Recovery of a split model that lost experts: more steps on train rows of the categories that keep theirs.

Rows go on where the run's training ended, in the recipe's settings; the rate warms up to where the run left it. No row
of a category whose expert was taken out is read, but on validation data, to say what is left.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from moeify.distillation import Teacher, teaching
from moeify.evaluation import held_out_loss
from moeify.further import Further
from moeify.recipe.training import Training
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Redrawn, Task, tokens_read
from moeify.training import Contestant
from moeify.world import Solo

_LEAST_RATE = 0.1
"""Of the recipe's rate, where the run itself ended lower."""
_TURNS = 1000
"""Steps that are looked at for a retained row: a recipe may take fewer rows a step than there are categories."""


@dataclass(frozen=True)
class Recovery:
    """What a recovery took, and what became of the losses."""

    steps: int
    rows: int
    """That it read, of retained categories alone."""
    read: int
    """Tokens (or examples) of these rows."""
    unit: Literal["token", "example"]
    retained: tuple[str, ...]
    intact: Mapping[str, float]
    """Category -> validation loss of the whole split model, nats per unit."""
    before: Mapping[str, float]
    """The same without the experts."""
    after: Mapping[str, float]
    """And after the recovery."""


@dataclass(frozen=True)
class Recover(Further):
    """So many optimizer steps on a run's data."""

    what: ClassVar[str] = "recovery"
    began: str = ""
    """Hash of the network that the run began with, for recipes that distil from it; empty: unknown."""

    def __call__(self, whole: SplitModel, part: SplitModel, dropped: Collection[str]) -> Recovery:
        """Train ``part``, which is ``whole`` without the experts of ``dropped``, in place.

        The same bits each time, in one process. Raises ValueError where nothing is retained, where the teacher is not
        the run's, or where training diverges.
        """
        retained = tuple(category for category in self.task.categories if category not in dropped)
        if not retained:
            raise ValueError("every category's expert is taken out, so there is nothing to recover; export without")
        teacher, training = self._teacher(), self._training()
        intact, before = self._losses(whole), self._losses(part)
        rows = _Retained(self.task, retained, self.config.training.steps, self.steps)
        with teaching(teacher, part) as taught:
            self.train(Contestant(part, training), rows, training, taught)
        read = rows.seen * tokens_read(self.task)
        return Recovery(self.steps, rows.seen, read, self.task.unit, retained, intact, before, self._losses(part))

    def _teacher(self) -> Teacher | None:
        """Return the teacher of the recipe, where it has one; ValueError where that is not the run's."""
        teacher = Teacher.of(self.config, self.task)
        if teacher:
            teacher.check(self.began)
        return teacher

    def _training(self) -> Training:
        """Return the recipe's settings for a schedule of its own, which starts where the run's ended."""
        given = self.config.training
        rate = given.learning_rate * max(given.final_learning_rate, _LEAST_RATE)
        return given.model_copy(update={"steps": self.steps, "learning_rate": rate})

    def _losses(self, model: SplitModel) -> dict[str, float]:
        return held_out_loss(model, self.task, Solo(), self.config.evaluation, "validation")


class _Retained(Redrawn):
    """A task whose train rows are those of some categories, from a step on; all else is the task's own."""

    def __init__(self, task: Task, retained: Sequence[str], first: int, steps: int) -> None:
        super().__init__(task, self._rows)
        self.task, self.first, self.steps = task, first, steps
        self.retained = torch.tensor([category in retained for category in task.categories])
        self.seen = 0
        """Train rows that were returned."""

    def _rows(self, step: int) -> Batch:
        """Return the retained rows of a step; of a later one, that no other step returns, where it has none.

        ValueError where a recipe takes so few rows a step that none of them ever comes.
        """
        for turn in range(_TURNS):
            batch = self.task.train_batch(self.first + step + turn * self.steps)
            if (kept := self.retained[batch.categories].nonzero()[:, 0]).numel():
                self.seen += len(kept)
                return batch.take(kept)
        names = ", ".join(each for each, stays in zip(self.categories, self.retained.tolist(), strict=True) if stays)
        raise ValueError(f"recovery: rows of {names} never came in {_TURNS} steps; raise training.rows in a new run")
