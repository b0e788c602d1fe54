"""Arguments that several commands share, and what a shell completes them with. No recipe or run is opened for it."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pipelines.find_recipe import shipped

LAST = "last"
_RECIPES = (".yaml", ".yml")


def runs(ctx: click.Context | None, parameter: click.Parameter | None, begun: str) -> list[CompletionItem]:
    """Return the ids of runs that begin so, the newest first, and ``last``."""
    home = os.environ.get("MOEIFY_HOME") or "runs"
    try:
        with os.scandir(home) as entries:
            there = [entry.name for entry in entries if os.path.isfile(os.path.join(entry.path, "resolved.yaml"))]  # noqa: PTH113, PTH118  no Path for each of many
    except OSError:  # no runs yet, or they are kept where a shell cannot look
        there = []
    newest = sorted(there, key=lambda name: name.rsplit("-", 3)[1:], reverse=True)
    return [CompletionItem(name) for name in (LAST, *newest) if there and name.startswith(begun)]


def recipes(ctx: click.Context | None, parameter: click.Parameter | None, begun: str) -> list[CompletionItem]:
    """Return the names of recipes that come with moeify, and files of recipes, that begin so; folders to go on in."""
    names = [CompletionItem(name) for name in shipped() if name.startswith(begun)]
    return names + _paths(begun)


def runs_or_models(ctx: click.Context | None, parameter: click.Parameter | None, begun: str) -> list[CompletionItem]:
    """Return ids of runs; where none begins so, let the shell complete a path."""
    return runs(ctx, parameter, begun) or [CompletionItem(begun, type="dir")]


def _paths(begun: str) -> list[CompletionItem]:
    folder, start = os.path.split(begun)
    try:
        entries = sorted(Path(folder or ".").iterdir())
    except OSError:
        return []
    found = []
    for entry in entries:
        if entry.name.startswith(start) and (start.startswith(".") or not entry.name.startswith(".")):
            path = f"{folder.rstrip('/')}/{entry.name}" if folder else entry.name
            if entry.suffix in _RECIPES and entry.is_file():
                found.append(CompletionItem(path))
            elif entry.is_dir():
                found.append(CompletionItem(f"{path}/"))
    return found


RUN = click.argument("run_", metavar="RUN", shell_complete=runs)
RUN_OR_NONE = click.argument("run_", metavar="[RUN]", required=False, shell_complete=runs)
RECIPE = click.argument("recipe", shell_complete=recipes)


def check_category(name: str, known: Sequence[str]) -> None:
    """Raise ValueError, with the nearest, for a name that is none of a run's categories."""
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise ValueError(f"no category {name!r}; the run has {', '.join(known)}{nearest}")


def examples(*lines: str) -> str:
    """Return what stands below a command's help; each line is a command as it may be typed."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])
