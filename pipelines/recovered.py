"""Exports that learn: on the run's data, if it is what the run read; and what came of a recovery on one line."""

from collections.abc import Callable, Mapping, Sequence

from moeify.events import Started
from moeify.export.recovery import Recover, Recovery
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import Distil
from moeify.routers.joint import Joined, Joint
from moeify.split_folder import began_of_run, load_from_run
from moeify.task import Task, data_hash
from moeify.tasks.build import build_task
from pipelines import runs
from pipelines.journal import read_events
from pipelines.one_line import one_line


def recovery_on(folder: runs.RunFolder, steps: int) -> Recover:
    """Return a recovery of so many steps on a run's data; ValueError where that is not there, or not what it was."""
    config, task = _data_of(folder, "--recover needs", "export without --recover")
    return Recover(task, config, steps, began_of_run(folder.path))


def routers_on(folder: runs.RunFolder) -> Distil:
    """Return what trains a mixture's routers on a run's data; ValueError where that is not there, or has changed."""
    config, task = _data_of(folder, "--moe trains routers on", "name a category to --force, which needs no router")
    return Distil(task, config)


def joint_on(folder: runs.RunFolder, steps: int) -> Callable[[SplitModel], Joined]:
    """Return what has a run's split model learn with its routers, on the run's data, and its dense twin beside it."""
    config, task = _data_of(folder, "--joint needs", "export without --joint")
    joint = Joint(task, config, steps)
    return lambda split: joint(split, load_from_run(folder.path, "dense"))


def _data_of(folder: runs.RunFolder, asks: str, way_out: str) -> tuple[RunConfig, Task]:
    config, way_out = load_recipe(folder.resolved), f"put it back, or {way_out}"
    try:
        task = build_task(config, cache=runs.cache(), base=folder.base, shelf=runs.shelf("text"))
    except (OSError, ValueError) as error:
        said = one_line(error, None)
        raise ValueError(f"{asks} the data of run {folder.id}, which cannot be read: {said}; {way_out}") from None
    events, _ = read_events(folder.journal, 0)
    started = next((event for event in events if isinstance(event, Started)), None)
    if started:
        same = started.categories == task.categories
        if not same or (started.data_hash and started.data_hash != data_hash(task, config)):
            raise ValueError(f"{asks} the data of run {folder.id}, which has changed since; {way_out}")
    return config, task


def told(recovery: Recovery) -> str:
    """Return what a recovery took and did, on one line."""
    gone = [category for category in recovery.before if category not in recovery.retained]
    kept, taken = (_moved(recovery, categories) for categories in (recovery.retained, gone))
    return (
        f"recovered in {recovery.steps:,} steps on {recovery.read:,} {recovery.unit}s; "
        f"validation loss of what is kept {kept}, of what was taken out {taken}"
    )


def _moved(recovery: Recovery, categories: Sequence[str]) -> str:
    before, after = (_mean(loss, categories) for loss in (recovery.before, recovery.after))
    return f"{before:.4f} -> {after:.4f}"


def _mean(loss: Mapping[str, float], categories: Sequence[str]) -> float:
    return sum(loss[category] for category in categories) / len(categories)
