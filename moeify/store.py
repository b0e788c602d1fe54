"""Where a run keeps what it must not lose: whole checkpoints, and files for people.

A checkpoint is a folder of safetensors files and a manifest with their hashes, published by one rename: it is there
whole or not at all. Loading checks every hash; a damaged checkpoint is never used. What workers share out is in a file
of each (``split.0-of-2.safetensors``); readers join it, a tensor at a time, and need not know.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from attribution.tensor_files import save_file
from moeify.parts import CorruptCheckpointError as CorruptCheckpointError
from moeify.parts import Part, Tensors, flush, known, part_names, sha256, write_parts
from moeify.storing import storing
from moeify.world import Solo, World

FORMAT = 1
"""Version of the checkpoint format."""

_DRAFT = ".draft-"


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, and what was passed over on the way to it."""

    name: str
    damaged: tuple[str, ...]
    """One line for each newer checkpoint that is damaged."""


@runtime_checkable
class Store(Protocol):
    """Keeps checkpoints by name (names sort in order of time) and files by relative path."""

    def save(
        self,
        name: str,
        facts: Mapping[str, Any],
        tensors: Tensors,
        pinned: Collection[str] = (),
        world: World | None = None,
    ) -> None:
        """Publish a checkpoint, then drop all but the newest few and the ``pinned``.

        ``world``: whose workers share tensors out; then every rank calls this, and otherwise rank 0 alone.
        """
        ...

    def newest(self) -> Found | None:
        """Return the newest good checkpoint; None where there is none."""
        ...

    def facts(self, name: str) -> dict[str, Any]:
        """Return a checkpoint's plain data."""
        ...

    def tensors(self, name: str, part: str) -> Mapping[str, Tensor]:
        """Return one part's tensors, each read when it is asked for where that can be."""
        ...

    def put(self, path: str, content: bytes) -> None:
        """Publish a file for people."""
        ...

    def put_tensors(self, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Publish a safetensors file for people."""
        ...


class MemoryStore:
    """Keeps the newest checkpoint and the pinned ones in memory, and no files: for notebooks and tests."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, dict[str, dict[str, Tensor]]]] = {}

    def save(
        self,
        name: str,
        facts: Mapping[str, Any],
        tensors: Tensors,
        pinned: Collection[str] = (),
        world: World | None = None,
    ) -> None:
        """Keep a copy (of shares, each worker its own), drop all others but the ``pinned``."""
        copies = {part: {key: tensor.clone() for key, tensor in held.items()} for part, held in tensors.items()}
        self._kept = {key: value for key, value in self._kept.items() if key in pinned}
        self._kept[name] = (json.dumps(facts), copies)

    def newest(self) -> Found | None:
        """Return the newest checkpoint; None where there is none."""
        return Found(max(self._kept), ()) if self._kept else None

    def facts(self, name: str) -> dict[str, Any]:
        """Return a checkpoint's plain data."""
        return json.loads(self._kept[name][0])

    def tensors(self, name: str, part: str) -> Mapping[str, Tensor]:
        """Return one part's tensors."""
        return self._kept[name][1][part]

    def put(self, path: str, content: bytes) -> None:
        """Forget the file."""

    def put_tensors(self, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Forget the file."""


class FolderStore:
    """Keeps checkpoints in ``folder/checkpoints`` and other files anywhere below ``folder``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        """Newest checkpoints that are kept."""

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(
        self,
        name: str,
        facts: Mapping[str, Any],
        tensors: Tensors,
        pinned: Collection[str] = (),
        world: World | None = None,
    ) -> None:
        """Publish a checkpoint, then drop all but the newest ``keep`` and the ``pinned``, and what kills left half.

        ``world``: whose workers share tensors out and see the same folder; every rank calls this then.
        """
        write_folder(self._checkpoints / name, facts, tensors, world=world)
        if world and world.rank:
            return
        for draft in self._checkpoints.glob(f"{_DRAFT}*"):  # there is one writer, and it has none open now
            shutil.rmtree(draft)
        names = self._names()
        for old in names[: -self.keep]:
            if old not in pinned:
                shutil.rmtree(self._checkpoints / old)

    def newest(self) -> Found | None:
        """Return the newest checkpoint whose every hash holds; None where there is none."""
        return newest_whole(self._names(), lambda name: verify_folder(self._checkpoints / name))

    def facts(self, name: str) -> dict[str, Any]:
        """Return a checkpoint's plain data."""
        return read_manifest(self._named(name))["facts"]

    def tensors(self, name: str, part: str) -> Mapping[str, Tensor]:
        """Return one part's tensors, hash checked, each read when it is asked for."""
        return open_part(self._named(name), part)

    def put(self, path: str, content: bytes) -> None:
        """Publish a file for people."""
        target = self._below(path)
        with storing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content)

    def put_tensors(self, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Publish a safetensors file for people."""
        target = self._below(path)
        draft = target.with_name(f".{target.name}.draft")
        with storing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, draft, dict(metadata))
            draft.replace(target)

    def _named(self, name: str) -> Path:
        return self._checkpoints / checked_name(name)

    def _names(self) -> list[str]:
        if not self._checkpoints.is_dir():
            return []
        return sorted(path.name for path in self._checkpoints.iterdir() if not path.name.startswith("."))

    def _below(self, path: str) -> Path:
        parts = PurePosixPath(path).parts
        if not parts or PurePosixPath(path).is_absolute() or ".." in parts:
            raise ValueError(f"{path!r} would leave the run's folder; wanted a relative path without '..'")
        return self.folder.joinpath(*parts)


def write_folder(
    target: Path,
    facts: Mapping[str, Any],
    tensors: Tensors,
    others: Mapping[str, bytes] | None = None,
    world: World | None = None,
) -> None:
    """Write safetensors parts, ``others`` as they are and the manifest, then publish them all by one rename.

    ``world``: whose workers share tensors out and see the same folder; every rank calls this, and each writes its own
    files. Raises StorageError where there is no room, or no right to write; nothing is left of it then.
    """
    world = world or Solo()
    with storing(target):
        draft = None
        try:
            if world.rank == 0:
                target.parent.mkdir(parents=True, exist_ok=True)
                draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=target.parent))
            files = write_parts(world.share(draft), tensors, world)
            if draft is None:
                return
            for name, other in (others or {}).items():
                (draft / name).write_bytes(other)
                files[name] = known(draft / name)
            write_manifest(draft, facts, files)
            draft.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            draft.rename(target)
            flush(target.parent)
        except BaseException:
            if draft is not None:
                shutil.rmtree(draft, ignore_errors=True)
            raise


def write_manifest(draft: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what a folder holds; it is whole from then on."""
    body = {"format": FORMAT, "facts": facts, "files": dict(sorted(files.items()))}
    content = json.dumps({"sha256": _digest(body), "body": body}, indent=1)
    (draft / "manifest.json").write_text(content, encoding="utf-8")
    flush(draft / "manifest.json")


def verify_folder(folder: Path) -> None:
    """Raise CorruptCheckpointError unless the manifest and every file it names are as they were written."""
    for name in read_manifest(folder)["files"]:
        _verify_file(folder, name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the body of a manifest, its own hash checked."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        body, digest = manifest["body"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{folder.name}: manifest.json cannot be read ({error})") from error
    if _digest(body) != digest:
        raise CorruptCheckpointError(f"{folder.name}: manifest.json is not what was written (hash differs)")
    if not (isinstance(body, dict) and isinstance(body.get("facts"), dict) and _lists_files(body.get("files"))):
        raise CorruptCheckpointError(f"{folder.name}: manifest.json does not list facts and files")
    if (got := body.get("format")) != FORMAT:
        raise ValueError(f"{folder} has format {got!r:.60}; this version of moeify reads format {FORMAT}")
    return body


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Raise CorruptCheckpointError where the body cannot make sense of what a checkpoint says.

    Hashes show that a checkpoint is what was written, not that whoever wrote it meant well: what it says may lack a
    key, or describe a network that cannot be built. ``ValueError`` and ``OSError`` say so by themselves.
    """
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:  # from wherever it went astray; transformers has exceptions of its own
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CorruptCheckpointError(f"{what} does not describe what it should ({why})") from error


def open_part(folder: Path, part: str) -> Part:
    """Return the tensors of one part, hash checked, each read when it is asked for."""
    files = part_files(folder, part)
    for path in files:
        _verify_file(folder, path.name)
    return Part(files)


def read_part(folder: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors of one part, hash checked."""
    return dict(open_part(folder, part))


def part_files(folder: Path, part: str) -> list[Path]:
    """Return the file that holds a part of a folder, or those of all workers that it is shared out over."""
    return [folder / name for name in part_names(read_manifest(folder)["files"], part)]


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file beside its target and publish it by one rename."""
    draft = target.with_name(f".{target.name}.draft")
    try:
        draft.write_bytes(content)
        flush(draft)
        draft.replace(target)
    except OSError:
        draft.unlink(missing_ok=True)  # half a file takes room that the rest may need
        raise


def _lists_files(files: Any) -> bool:
    """Whether a manifest's list of files is one: plain names, each with a hash and a size."""
    return isinstance(files, dict) and all(
        _is_plain(name) and isinstance(known, dict) and {"sha256", "bytes"} <= known.keys()
        for name, known in files.items()
    )


def newest_whole(names: Sequence[str], check: Callable[[str], object]) -> Found | None:
    """Return the last of these checkpoints that ``check`` finds whole; None where there are none.

    ``check`` raises CorruptCheckpointError for one that is damaged, and so does this where all are.
    """
    damaged: list[str] = []
    for name in reversed(names):
        try:
            check(name)
        except CorruptCheckpointError as error:
            damaged.append(str(error))
        else:
            return Found(name, tuple(damaged))
    if damaged:
        raise CorruptCheckpointError(f"no good checkpoint is left: {'; '.join(damaged)}")
    return None


def checked_name(name: str) -> str:
    """Return a checkpoint's name, which another checkpoint may have given; CorruptCheckpointError where it is none."""
    if not isinstance(name, str) or not _is_plain(name):
        raise CorruptCheckpointError(f"{name!r:.60} is no name of a checkpoint")
    return name


def _is_plain(name: str) -> bool:
    """Whether a name is one component of a path, and of a file that is not hidden."""
    return bool(name) and PurePosixPath(name).name == name and not name.startswith(".") and not set(name) & {"\0", "\\"}


def _verify_file(folder: Path, name: str) -> None:
    known = read_manifest(folder)["files"].get(name)
    path = folder / name
    if known is None or not path.is_file():
        raise CorruptCheckpointError(f"{folder.name}: {name} is missing")
    if path.stat().st_size != known["bytes"] or sha256(path) != known["sha256"]:
        raise CorruptCheckpointError(f"{folder.name}: {name} is not what was written (size or hash differs)")


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
