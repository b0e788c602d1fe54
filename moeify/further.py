"""More optimizer steps on a run's data, after its training: in one process, the same bits each time."""

from dataclasses import dataclass
from typing import ClassVar

from moeify.divergence import DivergedError, memory
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Training
from moeify.task import Task
from moeify.training import Contestant, Lesson, train
from moeify.world import Solo


@dataclass(frozen=True)
class Further:
    """So many steps; what is learned, and from which rows, is its subclasses' business."""

    what: ClassVar[str]
    """What it is called in errors."""
    task: Task
    config: RunConfig
    """The run's."""
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{self.what}: got {self.steps} steps, wanted one at least")

    def train(self, contestant: Contestant, rows: Task, training: Training, lesson: Lesson | None) -> None:
        """Train a model in place, by a schedule of its own, and leave it in eval mode; ValueError where it diverges."""
        try:
            with memory(lambda: self.what):
                train(contestant, rows, Solo(), training, self.steps, self.steps, lambda _, __: None, lesson)
        except DivergedError as error:
            raise ValueError(f"{self.what}: {error.what}; take fewer steps, or export without") from None
        contestant.model.autocast = None
        contestant.model.eval()
