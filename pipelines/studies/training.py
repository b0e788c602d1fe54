"""What arms of studies do with a bench: run the loop, train a model their own way, read its test losses."""

from collections.abc import Collection
from statistics import fmean

from torch import isin, tensor

from moeify.evaluation import row_losses
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.result import Result
from moeify.routed.gradients import GradientRouter
from moeify.routed.split_model import SplitModel
from moeify.state import State
from moeify.store import MemoryStore
from moeify.task import Batch, Redrawn, Task
from moeify.training import Contestant, train
from moeify.world import Solo
from pipelines.studies.study import Bench


def run_loop(bench: Bench) -> tuple[Result, SplitModel]:
    """Run the bench's recipe, and return its result and the split model."""
    store = MemoryStore()
    result = run(bench.config, bench.task, store=store, twins=bench.twins)
    newest = store.newest()
    assert newest is not None, "a run keeps a checkpoint at its end"
    return result, State.load(store, newest.name, bench.config).arms["split"].model.eval()


def trained(config: RunConfig, task: Task, model: SplitModel | None = None, *, steps: int | None = None) -> SplitModel:
    """Train a model, the task's dense network where none is given, as the recipe says; return it ready to be read.

    Its gradients are routed where the recipe's ``routing`` asks for that. ``steps``: instead of the recipe's, whose
    learning rate they keep to.
    """
    model = SplitModel(task.build(), task.categories) if model is None else model
    router = None
    if config.routing.gradients != "none":
        router = GradientRouter(config.routing, model.categories, model.space.readers, config.seed)
    settings = config.training if steps is None else config.training.model_copy(update={"steps": steps})
    contestant = Contestant(model, settings, router)
    train(contestant, task, Solo(), settings, settings.steps, settings.steps, lambda *_: None)
    return model.eval()


def test_losses(model: SplitModel, bench: Bench) -> dict[str, float]:
    """Return category -> nats per unit on test data, each row along its category's route."""
    return row_losses(model, bench.task, Solo(), bench.config.evaluation, "test").by_category(bench.task)


def mean_of(losses: dict[str, float], categories: Collection[str]) -> float:
    """Return the unweighted mean over these categories."""
    return fmean(losses[category] for category in categories)


def without_rows(task: Task, kept: Collection[str]) -> Redrawn:
    """Return the task with the train rows of these categories alone: a step has fewer rows, and they are the same."""
    places = tensor([task.categories.index(name) for name in kept])

    def some(step: int) -> Batch:
        batch = task.train_batch(step)
        return batch.take(isin(batch.categories, places).nonzero()[:, 0])

    return Redrawn(task, some)
