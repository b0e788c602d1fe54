"""Where a recipe comes from: those that ship with moeify, or a file."""

import difflib
from importlib.resources import files
from pathlib import Path


def find_recipe(reference: str) -> tuple[str, str, Path]:
    """Return a recipe's text, what to call it in errors, and where its relative paths start.

    A bare name means a recipe that comes with moeify first, and a file only where there is no such recipe.
    """
    from moeify.recipe.load import read_text

    shipped = {
        Path(entry.name).stem: entry for entry in files("pipelines.recipes").iterdir() if entry.name.endswith(".yaml")
    }
    if reference in shipped:
        return shipped[reference].read_text(encoding="utf-8"), f"recipe {reference!r}", Path.cwd()
    path = Path(reference)
    if path.exists():
        return read_text(path), str(path), path.absolute().parent
    close = difflib.get_close_matches(reference, shipped, 1)
    nearest = f"; nearest: {close[0]}" if close else ""
    raise ValueError(
        f"{reference!r} is neither a file nor a recipe that comes with moeify ({', '.join(sorted(shipped))}){nearest}"
    )
