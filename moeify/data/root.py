"""Where data lies that the package cannot carry: one folder, which the recipe or the environment names."""

import os
from pathlib import Path

VARIABLE = "MOEIFY_DATA"
"""Environment variable that names the folder, where the recipe does not."""


class NoDataError(ValueError):
    """The data is not there; the message says what is wanted, and where."""


def data_root(configured: Path | None, base: Path, holds: str = "the data") -> Path:
    """Return the folder of data: ``configured``, from ``base`` if relative, or else what MOEIFY_DATA names.

    ``holds`` says in the error what is looked for there.

    Raises NoDataError where neither is set, or the folder is not there.
    """
    if configured is not None:
        folder, said = base / configured, "data.root"
    elif named := os.environ.get(VARIABLE):
        folder, said = Path(named), VARIABLE
    else:
        raise NoDataError(f"data.root: got null, and {VARIABLE} is not set; set one to the folder that holds {holds}")
    if not folder.is_dir():
        raise NoDataError(f"{said}: {folder} is not a folder, wanted the one that holds {holds}")
    return folder


def data_file(root: Path, *names: str, what: str) -> Path:
    """Return the first of the named files below ``root``; ``what`` says in the error what it is and where it is had."""
    for name in names:
        if (root / name).is_file():
            return root / name
    raise NoDataError(f"{root} has no {' or '.join(names)}, wanted {what}")
