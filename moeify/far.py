"""What a recipe names by URL, copied to this machine before anything reads it; streamed files when they are read.

Copies lie in the cache by what the store says of each object (its mark): an object that was written anew is fetched
anew, and one that is there already is not. What opens the store is in the environment of each node.
"""

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import assert_never

from filelock import FileLock

from moeify.place import Item, Place
from moeify.recipe.config import RunConfig
from moeify.recipe.data import (
    ImageData,
    InstalledPart,
    InstalledText,
    JsonLines,
    MixedText,
    Part,
    Source,
    StreamedText,
    Table,
    TextData,
    TextFolders,
)
from moeify.recipe.model import PretrainedModel
from moeify.recipe.where import url_of
from moeify.storing import StorageError, storing


def near(config: RunConfig, cache: Path) -> RunConfig:
    """Return the recipe with what it names by URL named by where the copy lies, below ``cache``.

    ValueError where nothing is at a URL; StorageError where its store cannot be reached, or there is no room here.
    """
    config = near_model(config, cache)
    data: TextData | ImageData
    match config.data:
        case TextData(source=source):
            data = config.data.model_copy(update={"source": _source(source, cache)})
        case ImageData(root=Path() as root):
            data = config.data.model_copy(update={"root": _copy(root, cache, "data.root")})
        case _:
            return config
    return config.model_copy(update={"data": data})


def near_model(config: RunConfig, cache: Path) -> RunConfig:
    """Return the recipe with the same done for its checkpoint alone."""
    if not isinstance(config.model, PretrainedModel):
        return config
    path = _copy(config.model.path, cache, "model.path")
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _source(source: Source, cache: Path) -> Source:
    said = "data.source"
    match source:
        case InstalledText():
            return source
        case JsonLines(path=path) | Table(path=path):
            return source.model_copy(update={"path": _copy(path, cache, f"{said}.path")})
        case TextFolders(categories=folders):
            found = {name: _copy(path, cache, f"{said}.categories.{name}") for name, path in folders.items()}
            return source.model_copy(update={"categories": found})
        case MixedText(root=root, categories=parts):
            there = root if root and url_of(root) else None
            mine = {name: _part(part, there, cache, f"{said}.categories.{name}.path") for name, part in parts.items()}
            return source.model_copy(update={"root": None if there else root, "categories": mine})
        case StreamedText():
            return source  # file by file, by who reads it: moeify.data.streamed_files
        case _ as never:
            assert_never(never)


def _part(part: Part, root: Path | None, cache: Path, said: str) -> Part:
    if isinstance(part, InstalledPart):
        return part
    path = part.path if url_of(part.path) or root is None else root / part.path
    return part.model_copy(update={"path": _copy(path, cache, said)})


def _copy(path: Path, cache: Path, said: str) -> Path:
    """Return where the object, or all that is below a prefix, lies on this machine."""
    if (url := url_of(path)) is None:
        return path
    place = Place(url)
    if there := place.found():
        return copied(place, there, cache)
    above, _, name = url.rpartition("/")
    with suppress(FileNotFoundError):
        if not above.endswith(":/"):  # else the bucket itself
            return copied(Place(above), {name: Place(above).item(name)}, cache) / name
    raise ValueError(f"{said}: nothing is at {url}; wanted an object, or a prefix with objects below it")


def copied(place: Place, there: Mapping[str, Item], cache: Path) -> Path:
    """Return the folder with copies of these objects, made if it is not there; whole, or not at all."""
    known_by = hashlib.sha256(place.url.encode())
    for name, item in sorted(there.items()):
        known_by.update(f"\n{name} {item.mark}".encode())
    shelf = cache / "far"
    folder = shelf / known_by.hexdigest()[:32]
    with storing(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                draft = shelf / f".{folder.name}"
                shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
                for name in there:
                    target = draft.joinpath(*PurePosixPath(name).parts)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    place.download(name, target)
                now = place.found() if len(there) > 1 else {name: place.item(name) for name in there}
                if changed := [name for name, item in there.items() if name not in now or now[name].mark != item.mark]:
                    raise StorageError(
                        f"{place.url}/{changed[0]} was written anew while it was fetched; begin again when it is done"
                    )
                draft.rename(folder)
    return folder
