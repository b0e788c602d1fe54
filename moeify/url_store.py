"""A run's store behind a URL: what ``FolderStore`` writes, beside a copy of the newest checkpoint on this machine.

An object store has no rename. A checkpoint is published by its manifest, which is written last: one without a whole
manifest does not exist. Its parts lie in a folder named by the manifest's hash, so that a checkpoint which is written
once more never mixes with the one it replaces. What is read is first fetched into the copy and checked there, hash by
hash, and every reader of run folders (export, report, routers) reads the copy.
"""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from moeify.parts import Tensors, write_parts
from moeify.place import Place
from moeify.store import (
    CorruptCheckpointError,
    FolderStore,
    Found,
    checked_name,
    newest_whole,
    open_part,
    read_manifest,
    verify_folder,
    write_folder,
    write_manifest,
)
from moeify.storing import storing
from moeify.world import World

MANIFEST = "manifest.json"
_FOLDER = "checkpoints"
_UNSENT = ".unsent-"
_FETCHED = ".fetched-"


class UrlStore:
    """Keeps checkpoints in ``place/checkpoints`` and other files anywhere below ``place``; the same in ``copy``.

    ``fence`` is called before a checkpoint is published and raises where another process has taken the run over.
    """

    def __init__(self, place: Place, copy: Path, keep: int, fence: Callable[[], None] = lambda: None) -> None:
        self.place = place
        self.copy = copy
        self.keep = keep
        """Newest checkpoints that are kept."""
        self._fence = fence
        self._near = FolderStore(copy, keep)
        self._known: dict[str, bytes] = {}
        """Name -> manifest of a checkpoint whose copy was found whole."""

    def save(
        self,
        name: str,
        facts: Mapping[str, Any],
        tensors: Tensors,
        pinned: Collection[str] = (),
        world: World | None = None,
    ) -> None:
        """Publish a checkpoint, then drop all but the newest ``keep`` and the ``pinned``, and what kills left half.

        ``world``: whose workers share tensors out; then every rank calls this and sends its own files, and there is no
        copy here before one is asked for.
        """
        with storing(self._copies):
            self._copies.mkdir(parents=True, exist_ok=True)
            if world is None or world.rank == 0:
                clear(self._copies, _UNSENT)  # there is one run that writes, and it has none open now
        if world:
            world.share(None)
        with storing(self._copies):
            draft = Path(tempfile.mkdtemp(prefix=_UNSENT, dir=self._copies))
        try:
            if world:
                self._send_shares(draft, name, facts, tensors, world)
            else:
                write_folder(draft / name, facts, tensors)
                self._fence()
                publish(self.place.at(f"{_FOLDER}/{name}"), draft / name)
                with storing(self._copies):
                    replace(draft / name, self._copies / name)
            self._known.pop(name, None)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        if world is None or world.rank == 0:
            self._drop(pinned)

    def _send_shares(self, draft: Path, name: str, facts: Mapping[str, Any], tensors: Tensors, world: World) -> None:
        """Upload this worker's files; rank 0 publishes them when all are there."""
        place = self.place.at(f"{_FOLDER}/{name}")
        with storing(self._copies):
            files = write_parts(draft, tensors, world)
            if world.rank == 0:
                write_manifest(draft, facts, files)
        content = world.share((draft / MANIFEST).read_bytes() if world.rank == 0 else b"")
        for path in draft.glob("*.safetensors"):
            place.upload(f"{parts_folder(content)}/{path.name}", path)
        world.gather(None)
        if world.rank == 0:
            self._fence()
            place.write(MANIFEST, content)

    def _drop(self, pinned: Collection[str]) -> None:
        """Drop all checkpoints but the newest ``keep`` and the ``pinned``, and what kills left half."""
        there = self._there()
        old = [each for each in sorted(there) if MANIFEST in there[each]][: -self.keep]
        self._sweep(there, [each for each in old if each not in pinned])

    def newest(self) -> Found | None:
        """Return the newest checkpoint whose every hash holds, fetched; None where there is none."""
        near = self._near_names()  # before the other list: what is here by now was published before
        names = sorted(name for name, objects in self._there().items() if MANIFEST in objects)
        for gone in near.difference(names):
            shutil.rmtree(self._copies / gone, ignore_errors=True)
        return newest_whole(names, self._fetched)

    def facts(self, name: str) -> dict[str, Any]:
        """Return a checkpoint's plain data."""
        return read_manifest(self._fetched(name))["facts"]

    def tensors(self, name: str, part: str) -> Mapping[str, Tensor]:
        """Return one part's tensors, hash checked, each read when it is asked for."""
        return open_part(self._copies / name if name in self._known else self._fetched(name), part)

    def put(self, path: str, content: bytes) -> None:
        """Publish a file for people."""
        self._near.put(path, content)
        self.place.write(path, content)

    def put_tensors(self, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Publish a safetensors file for people."""
        self._near.put_tensors(path, tensors, metadata)
        self.place.upload(path, self.copy / path)

    @property
    def _copies(self) -> Path:
        return self.copy / _FOLDER

    def _fetched(self, name: str) -> Path:
        """Return the folder of a checkpoint's copy, whole; raise CorruptCheckpointError where it is not."""
        there = self.place.at(f"{_FOLDER}/{checked_name(name)}")
        self._known[name] = fetched(there, self._copies / name, self._known.get(name))
        return self._copies / name

    def _near_names(self) -> set[str]:
        if not self._copies.is_dir():
            return set()
        return {path.name for path in self._copies.iterdir() if not path.name.startswith(".")}

    def _there(self) -> dict[str, list[str]]:
        """Return the objects of every checkpoint, by their paths below it."""
        found: dict[str, list[str]] = defaultdict(list)
        for path in self.place.found(_FOLDER):
            name, _, below = path.removeprefix(f"{_FOLDER}/").partition("/")
            found[name].append(below)
        return found

    def _sweep(self, there: Mapping[str, Iterable[str]], dropped: Collection[str]) -> None:
        """Remove what is dropped, its manifest first, and parts that no manifest names."""
        place = self.place.at(_FOLDER)
        for name, objects in there.items():
            parts = [each for each in objects if each != MANIFEST]
            if name in dropped:
                place.remove([f"{name}/{MANIFEST}"])
                shutil.rmtree(self._copies / name, ignore_errors=True)
            elif MANIFEST in objects and len({each.partition("/")[0] for each in parts}) > 1:
                with suppress(CorruptCheckpointError):  # a damaged one is left to whoever looks into it
                    mine = parts_folder(place.read(f"{name}/{MANIFEST}"))
                    place.remove(f"{name}/{each}" for each in parts if not each.startswith(f"{mine}/"))
                continue
            elif MANIFEST in objects:
                continue
            place.remove(f"{name}/{each}" for each in parts)


def publish(place: Place, folder: Path) -> None:
    """Upload a folder that ``write_folder`` wrote; it is there once its manifest is."""
    content = (folder / MANIFEST).read_bytes()
    for name in read_manifest(folder)["files"]:
        place.upload(f"{parts_folder(content)}/{name}", folder / name)
    place.write(MANIFEST, content)


def fetched(place: Place, folder: Path, known: bytes | None = None) -> bytes:
    """Have a whole copy of what ``publish`` put there in ``folder``, and return its manifest.

    ``known``: the manifest of a copy that was checked before. Raises CorruptCheckpointError where a file is missing or
    not what was written.
    """
    try:
        content = place.read(MANIFEST)
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{folder.name}: {MANIFEST} is missing") from None
    if content == known or _is_copy(folder, content):
        return content
    with storing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".fetch.lock"):
        if _is_copy(folder, content):  # another process was faster
            return content
        clear(folder.parent, _FETCHED)
        with storing(folder.parent):
            draft = Path(tempfile.mkdtemp(prefix=_FETCHED, dir=folder.parent))
        try:
            half = draft / folder.name
            with storing(half):
                half.mkdir()
                (half / MANIFEST).write_bytes(content)
            for name in read_manifest(half)["files"]:
                with suppress(FileNotFoundError):  # the check below says so
                    place.download(f"{parts_folder(content)}/{name}", half / name)
            verify_folder(half)
            replace(half, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return content


def parts_folder(manifest: bytes) -> str:
    """Return the folder of the parts that a manifest names."""
    try:
        digest = json.loads(manifest)["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(digest, str) or not digest.isalnum():
        raise CorruptCheckpointError(f"{MANIFEST} has no hash of itself")
    return digest[:16]


def replace(source: Path, target: Path) -> None:
    """Put a folder in another's place."""
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)


def clear(folder: Path, prefix: str) -> None:
    """Remove what kills left half in a folder."""
    for draft in folder.glob(f"{prefix}*"):
        shutil.rmtree(draft, ignore_errors=True)


def _is_copy(folder: Path, manifest: bytes) -> bool:
    with suppress(OSError, CorruptCheckpointError):
        if (folder / MANIFEST).read_bytes() == manifest:
            verify_folder(folder)
            return True
    return False
