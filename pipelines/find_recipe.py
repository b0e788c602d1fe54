"""Where a recipe comes from: those that ship with moeify, or a file."""

import difflib
from importlib.resources import files
from pathlib import Path

_FOLDER = files("pipelines.recipes")


def shipped() -> tuple[str, ...]:
    """Return the names of the recipes that come with moeify."""
    return tuple(sorted(Path(entry.name).stem for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml")))


def find_recipe(reference: str) -> tuple[str, str, Path]:
    """Return a recipe's text, what to call it in errors, and where its relative paths start.

    A bare name means a recipe that comes with moeify first, and a file only where there is no such recipe.
    """
    from moeify.recipe.load import read_text

    if reference in shipped():
        return (_FOLDER / f"{reference}.yaml").read_text(encoding="utf-8"), f"recipe {reference!r}", Path.cwd()
    path = Path(reference)
    if path.exists():
        return read_text(path), str(path), path.absolute().parent
    close = difflib.get_close_matches(reference, shipped(), 1)
    nearest = f"; nearest: {close[0]}" if close else ""
    raise ValueError(
        f"{reference!r} is neither a file nor a recipe that comes with moeify ({', '.join(shipped())}){nearest}"
    )
