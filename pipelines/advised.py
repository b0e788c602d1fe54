"""What ``moeify advise`` looks at: an undivided network, its categories' rows, and a recipe that says the rest."""

from dataclasses import dataclass, replace
from pathlib import Path

from moeify.conversion import Wish, conversion
from moeify.data.survey import look
from moeify.models import pretrained
from moeify.recipe.config import RunConfig
from moeify.recipe.load import load_recipe, parse_recipe
from moeify.recipe.model import PretrainedModel
from moeify.routed.split_model import SplitModel
from moeify.split_folder import load_from_run
from moeify.starter import Machine
from moeify.task import Task
from moeify.tasks.build import build_task
from pipelines import copies, machine, runs
from pipelines.find_recipe import find_recipe, shipped
from pipelines.runs import RunFolder

_YAML = (".yaml", ".yml")
_DENSE = "@dense"


@dataclass(frozen=True)
class Advised:
    """A network that is not split yet, in eval mode, and what is known of it."""

    name: str
    """For people."""
    model: SplitModel
    task: Task
    config: RunConfig
    trained: bool
    """False for a recipe's network before its first step."""


def find_advised(target: str, data: str | None) -> Advised:
    """Return what a person named.

    A folder with a ``config.json`` is a checkpoint, and ``data`` its recipe or texts; one with a ``resolved.yaml`` is a
    run's, and so is what ``moeify.runs`` finds by an id, with or without ``@dense``; a recipe that comes with moeify
    goes by its name, and yours by its file's. ValueError for anything else.
    """
    folder = Path(target)
    if folder.is_dir() and (folder / "config.json").is_file():
        if data is None:
            raise ValueError(f"--data: got none, wanted texts in categories or a recipe for the checkpoint {target}")
        return _of_checkpoint(folder, data)
    if data is not None:
        raise ValueError(f"--data: got {data!r}, and {target!r} is no checkpoint (a folder with a config.json)")
    if (folder / "resolved.yaml").is_file():
        return _of_run(RunFolder(folder.absolute()))
    if folder.suffix in _YAML or target in shipped():
        text, where, base = find_recipe(target)
        return _of_recipe(target, parse_recipe(text, where=where), base)
    return _of_run(runs.find(target.removesuffix(_DENSE), runs.home()))


def _of_run(folder: RunFolder) -> Advised:
    """Return a run's dense twin, as its newest checkpoint has it."""
    config = load_recipe(folder.resolved)
    copies.fetch_checkpoint(folder)
    task = build_task(config, cache=runs.cache(), base=folder.base, shelf=runs.shelf("text"))
    return Advised(f"{folder.id} (dense)", load_from_run(folder.path, "dense").eval(), task, config, trained=True)


def _of_recipe(name: str, config: RunConfig, base: Path) -> Advised:
    task = build_task(config, cache=runs.cache(), base=base, shelf=runs.shelf("text"))
    model = SplitModel(task.build(), task.categories, kinds=config.partition.units).eval()
    trained = isinstance(config.model, PretrainedModel)
    return Advised(f"recipe {name}" if trained else f"recipe {name}, untrained", model, task, config, trained)


def _of_checkpoint(folder: Path, data: str) -> Advised:
    pretrained.look(folder)  # before the texts are read, which takes longer
    name = folder.absolute().name
    if Path(data).suffix in _YAML or data in shipped():
        text, where, base = find_recipe(data)
        config = _with_checkpoint(parse_recipe(text, where=where), folder)
    else:
        here = Machine(machine.cores(), machine.free_memory())
        config = conversion(folder, look(Path(data)), "advised", Wish(), here, runs.cache()).config
        base = Path.cwd()
    return replace(_of_recipe(name, config, base), name=name)


def _with_checkpoint(given: RunConfig, folder: Path) -> RunConfig:
    """Return a recipe for the checkpoint of what the given one says of data, rows and rounds."""
    known = given.model_dump(mode="json", include={"name", "seed", "data", "training", "attribution", "rounds"})
    return RunConfig.model_validate(known | {"model": {"kind": "pretrained", "path": str(folder.absolute())}})
