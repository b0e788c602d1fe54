"""From a recipe's data section to the task that the loop learns."""

from pathlib import Path
from typing import assert_never

from moeify.far import near
from moeify.recipe.config import RunConfig
from moeify.recipe.data import DigitsData, GivenData, ImageData, TextData
from moeify.recipe.model import PretrainedModel
from moeify.task import Task
from moeify.world import World


def build_task(
    config: RunConfig, *, cache: Path, base: Path, world: World | None = None, shelf: str | None = None
) -> Task:
    """Prepare the recipe's data and return its task; what was prepared before is read from ``cache``.

    ``base`` is the folder that the recipe's relative paths start at. What it names by URL is copied to ``cache`` first.
    ``world``: whose workers all call this at the same time, to share the work. ``shelf``: URL where machines find the
    text that others prepared.

    >>> from moeify.recipe.load import load_recipe
    >>> build_task(load_recipe(recipes / "digits.yaml"), cache=Path("cache"), base=Path(".")).unit
    'example'
    """
    config = near(config, cache)
    match config.data:
        case TextData():
            from moeify.tasks.language import LanguageTask
            from moeify.tasks.masked import MaskedTask

            task = LanguageTask.prepare(config, cache, base, world=world, shelf=shelf)
            model = config.model
            if isinstance(model, PretrainedModel) and (checkpoint := task.checkpoint) and checkpoint.hides:
                return MaskedTask(task, checkpoint, model.hidden)
            return task
        case DigitsData():
            from moeify.tasks.digits import DigitsTask

            return DigitsTask(config)
        case ImageData():
            from moeify.tasks.images import ImagesTask

            return ImagesTask.prepare(config, base)
        case GivenData():
            raise ValueError("data.kind: got 'given', rows at hand, which are no recipe's; moeify.fit makes their task")
        case _ as never:
            assert_never(never)
