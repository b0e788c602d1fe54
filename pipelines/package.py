"""What goes with a recipe to a machine that does not have the user's files: the text itself, and small local data.

Relative paths of a recipe name files that belong to it: they are copied. Absolute paths name what every node sees at
the same place, URLs what it fetches for itself: they stay as they are.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from moeify.recipe.config import RunConfig
from moeify.recipe.data import ImageData, JsonLines, MixedText, StreamedText, Table, TextData, TextFolders
from moeify.recipe.model import PretrainedModel
from moeify.recipe.where import url_of

RECIPE = "recipe.yaml"
"""File of the recipe in a package."""
_CHECKPOINT = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Suffixes of the files of a checkpoint that are read; others stay where they are."""
MOST_MEGABYTES = 64.0
"""Data that goes with a recipe, in 10^6 bytes; more belongs where all nodes see it."""


def pack(config: RunConfig, base: Path, to: Path) -> list[Path]:
    """Copy the files that the recipe names by relative paths from ``base`` to the folder ``to``; return absolute ones.

    Raises:
        ValueError: A relative path leaves the recipe's folder, or names more than ``MOST_MEGABYTES``.
    """
    _check(config, base)
    copied = 0
    for name, path in _files(config, base):
        copied += path.stat().st_size
        if copied > MOST_MEGABYTES * 1e6:
            raise ValueError(
                f"the recipe names more than {MOST_MEGABYTES:g} MB by relative paths, too much to go with the recipe; "
                f"put it where all nodes see it and name it by an absolute path or a URL"
            )
        target = to / name
        assert ".." not in target.relative_to(to).parts, f"{name} is not below {to}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return [path for _, path in _named(config) if path.is_absolute()]


def _from(root: Path, path: Path) -> Path:
    """Return where a path of a part starts."""
    return path if url_of(path) else root / path


def _goes(path: Path) -> bool:
    """Whether what a recipe names goes with it."""
    return not path.is_absolute() and url_of(path) is None


def _check(config: RunConfig, base: Path) -> None:
    if isinstance(config.data, ImageData) and (root := config.data.root) and _goes(root):
        raise ValueError(
            f"data.root: got {str(root)!r}, which does not go with the recipe; give an absolute path that all nodes "
            f"see, or a URL, or leave it out and set MOEIFY_DATA on every node"
        )
    for key, path in _named(config):
        if not _goes(path):
            continue
        whole, top = (base / path).resolve(), base.resolve()
        if not whole.is_relative_to(top):
            raise ValueError(
                f"{key}: got {str(path)!r}, which lies outside of the recipe's folder and cannot go with it; move it "
                f"below {base}, or give an absolute path that all nodes see, or a URL"
            )
        if ".." in path.parts:  # there, what it goes up from may have another name, or not be there
            raise ValueError(
                f"{key}: got {str(path)!r}, wanted a path without '..' for what goes with a recipe; write "
                f"{whole.relative_to(top).as_posix()!r}, or give an absolute path that all nodes see, or a URL"
            )


def _named(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """Yield key and value of every path in the recipe."""
    if isinstance(config.data, TextData):
        match config.data.source:
            case TextFolders(categories=categories):
                yield from ((f"data.source.categories.{name}", path) for name, path in categories.items())
            case JsonLines(path=path) | Table(path=path):
                yield "data.source.path", path
            case MixedText(root=Path() as root, categories=parts):
                yield "data.source.root", root
                for name, part in parts.items():
                    if part.kind != "installed":
                        yield f"data.source.categories.{name}.path", _from(root, part.path)
            case StreamedText(categories=streamed):
                for name, files in streamed.items():
                    yield from ((f"data.source.categories.{name}.files", Path(each)) for each in files.files)
    elif isinstance(config.data, ImageData) and config.data.root:
        yield "data.root", config.data.root
    if isinstance(config.model, PretrainedModel):
        yield "model.path", config.model.path


def _files(config: RunConfig, base: Path) -> Iterator[tuple[Path, Path]]:
    """Yield every file that relative paths name: its name below ``base``, and where it is."""
    from moeify.data.sources import files_in
    from moeify.data.streamed_files import files_of, said_of
    from moeify.data.tables import parts_of

    if isinstance(config.data, TextData):
        match config.data.source:
            case TextFolders(categories=categories, pattern=pattern):
                for folder in dict.fromkeys(categories.values()):
                    if _goes(folder):
                        yield from ((folder / name, path) for name, path in files_in(base / folder, pattern))
            case JsonLines(path=path) if _goes(path):
                yield path, base / path
            case Table(path=path) if _goes(path):
                whole = base / path
                yield from ((path / file.relative_to(whole), file) for file in parts_of(whole))
            case MixedText(root=Path() as root, categories=parts):
                for part in parts.values():
                    if part.kind == "installed" or not _goes(_from(root, part.path)):
                        continue
                    path = root / part.path
                    if part.kind == "folder":
                        yield from ((path / name, found) for name, found in files_in(base / path, part.pattern))
                    else:
                        yield path, base / path
            case StreamedText(categories=streams):
                for name, each in streams.items():
                    near = tuple(file for file in each.files if _goes(Path(file)))
                    if near:
                        mine = each.model_copy(update={"files": near})
                        found = (Path(file.told) for file in files_of(mine, base, said_of(name)))
                        yield from ((path.relative_to(base), path) for path in found)
    if isinstance(config.model, PretrainedModel) and _goes(folder := config.model.path):
        files = sorted(path for path in (base / folder).iterdir() if path.suffix in _CHECKPOINT)
        yield from ((folder / path.name, path) for path in files)
