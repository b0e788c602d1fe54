"""What each expert does, by example: kept with its run at the end, read by the report."""

from typing import TYPE_CHECKING

from pydantic import ValidationError

from moeify.examples import Portraits
from pipelines.one_line import one_line, warn
from pipelines.runs import RunFolder

if TYPE_CHECKING:
    from moeify.recipe.config import RunConfig
    from moeify.task import Task


def keep(folder: RunFolder, config: "RunConfig", task: "Task") -> None:
    """Look at the split model of the newest checkpoint and write what each expert does; nothing where none asked."""
    from moeify.portraits import portraits
    from moeify.split_folder import load_from_run
    from moeify.store import write_atomically

    rows = config.evaluation.example_rows
    if rows:
        found = portraits(load_from_run(folder.path), task, rows, config.evaluation.rows_at_once)
        write_atomically(folder.portraits, (found.model_dump_json() + "\n").encode("utf-8", errors="replace"))


def keep_or_warn(folder: RunFolder, config: "RunConfig", task: "Task") -> bool:
    """Write what each expert does, and say whether it is there; what is wrong costs a line on stderr and no run."""
    try:
        keep(folder, config, task)
    except Exception as error:  # the run itself is done
        what = one_line(error, kind=True)
        warn(f"examples of what the experts do were not kept ({what})")
    return folder.portraits.is_file()


def read_portraits(folder: RunFolder) -> Portraits:
    """Return what a run keeps; FileNotFoundError where there is none, ValueError where it is damaged."""
    try:
        return Portraits.model_validate_json(folder.portraits.read_bytes())
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ValueError(
            f"{folder.portraits.name} is damaged ({what}); make it anew: moeify report {folder.id} --examples"
        ) from None
