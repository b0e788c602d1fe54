"""What to do about it: the expert tree, the partition, surgery, training, the loop and the exports.

The names below load on first use, so that ``import moeify`` costs nothing.
"""

from typing import Any

_HOMES = {
    "RunConfig": "moeify.recipe.config",
    "attribute": "moeify.attributing",
    "build_task": "moeify.tasks.build",
    "fit": "moeify.fitting",
    "load_recipe": "moeify.recipe.load",
    "load_split": "moeify.split_folder",
    "run": "moeify.loop",
    "save_split": "moeify.split_folder",
    "split": "moeify.fitting",
}


def __getattr__(name: str) -> Any:
    """Return a public name from the module that owns it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moeify' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
