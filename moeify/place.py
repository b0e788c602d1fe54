"""A folder behind a URL (``s3://bucket/prefix``, ``gs://bucket/prefix``): objects by relative path.

An object is there whole or not at all: one request writes it, or the last request of several does. Nothing is ever
appended to or renamed. Credentials and the store's address come from the environment of the process alone, never from
the URL. Clients retry what passes (throttling, a connection that broke) with growing pauses, for about half a minute.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from moeify.storing import endpoint_of, reaching, storing

KINDS = {"s3": "s3", "gs": "gs"}
"""Scheme of a URL -> the extra of this package that reads it."""
_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs"}
_ATTEMPTS = 8
"""Tries of one request: seven pauses of up to 1, 2, 4 ... 20 seconds, half of that on average."""
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"connect_timeout": 10, "read_timeout": 60}},
    "gs": {"use_listings_cache": False},
    "file": {"auto_mkdir": True},
}
LOADED = ("manifest.json", "config.json", "model.gguf", "model.onnx")
"""Files without which nothing loads what was exported: they come last, so that half an export is none."""


@dataclass(frozen=True)
class Item:
    """What a listing says of an object."""

    bytes: int
    mark: str
    """Differs where the object was written anew."""
    modified: float
    """Seconds since the epoch, by the store's clock."""


def is_url(text: str | Path) -> bool:
    """Whether that names a folder behind a URL rather than one of this machine."""
    return isinstance(text, str) and "://" in text and not text.startswith("file://")


def checked_url(text: str) -> str:
    """Return the URL without a slash at its end; ValueError where it is none that a run can live at."""
    parts = urlsplit(text)
    if parts.scheme not in KINDS and parts.scheme != "memory":
        raise ValueError(
            f"{parts.scheme}:// is no storage that moeify knows; wanted a path, s3://BUCKET/... or gs://..."
        )
    if "@" in parts.netloc:
        raise ValueError(
            f"a {parts.scheme}:// URL with a password was given; credentials go into the environment alone"
        )
    if parts.query or parts.fragment or ".." in PurePosixPath(parts.path).parts:
        raise ValueError(f"{text!r}: wanted {parts.scheme}://BUCKET/PREFIX without '?', '#' or '..'")
    if not parts.netloc and parts.scheme != "memory":
        raise ValueError(f"{text!r} names no bucket; wanted {parts.scheme}://BUCKET/PREFIX")
    return text.rstrip("/")


class Place:
    """One such folder. Opening it reaches nothing; every method may raise StorageError."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs = _client(urlsplit(url).scheme)
        self._root = str(self._fs._strip_protocol(self.url)).rstrip("/")

    def at(self, path: str) -> "Place":
        """Return the folder below."""
        return Place(f"{self.url}/{path}")

    def read(self, path: str) -> bytes:
        """Return an object; FileNotFoundError where there is none."""
        with reaching(self.url):
            return self._fs.cat_file(self._of(path))

    def write(self, path: str, content: bytes) -> None:
        """Write an object, in place of one that is there."""
        with reaching(self.url):
            self._fs.pipe_file(self._of(path), content)

    def create(self, path: str, content: bytes) -> None:
        """Write an object where none is; FileExistsError where one is. Of several that try, one succeeds."""
        with reaching(self.url):
            try:
                self._fs.pipe_file(self._of(path), content, mode="create")
            except FileExistsError:
                if self._fs.cat_file(self._of(path)) != content:  # else: an answer was lost, and the request repeated
                    raise

    def upload(self, path: str, source: Path) -> None:
        """Write a file of this machine as an object, in parts where it is large."""
        with reaching(self.url):
            self._fs.put_file(str(source), self._of(path))

    def download(self, path: str, target: Path) -> None:
        """Write an object to a file of this machine; FileNotFoundError where there is none."""
        with reaching(self.url), storing(target):
            self._fs.get_file(self._of(path), str(target))

    def found(self, below: str = "") -> dict[str, Item]:
        """Return every object below, by its path here."""
        with reaching(self.url):
            try:
                listed = self._fs.find(self._of(below), detail=True)
            except FileNotFoundError as error:
                if "bucket" in str(error).lower():
                    raise
                return {}
        start = len(self._root) + 1
        return {name[start:]: _item(info) for name, info in listed.items() if _is_inside(name[start:])}

    def names(self, below: str = "") -> list[str]:
        """Return the names directly below, of objects and of folders, in order."""
        with reaching(self.url):
            try:
                listed = self._fs.ls(self._of(below), detail=False)
            except FileNotFoundError as error:
                if "bucket" in str(error).lower():
                    raise
                return []
        return sorted({name.rstrip("/").rpartition("/")[2] for name in listed})

    def item(self, path: str) -> Item:
        """Return what a listing says of one object; FileNotFoundError where there is none."""
        with reaching(self.url):
            return _item(self._fs.info(self._of(path)))

    def remove(self, paths: Iterable[str]) -> None:
        """Remove objects, in this order; those that are not there are no error."""
        for path in paths:
            with reaching(self.url):
                try:
                    self._fs.rm_file(self._of(path))
                except FileNotFoundError as error:
                    if "bucket" in str(error).lower():
                        raise

    def _of(self, path: str) -> str:
        if not path:
            return self._root
        if not _is_inside(path):
            raise ValueError(f"{path!r} would leave {self.url}; wanted a relative path without '..'")
        return f"{self._root}/{path}"


def send(folder: Path, place: Place) -> None:
    """Upload what was exported to a folder, what is ``LOADED`` last."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name in LOADED, str(path))):
        place.upload(path.relative_to(folder).as_posix(), path)


def fetch(place: Place, folder: Path) -> None:
    """Download all that is there into a folder; FileNotFoundError where nothing is."""
    there = place.found()
    if not there:
        raise FileNotFoundError(f"{place.url}: nothing is there")
    for path in there:
        target = folder.joinpath(*PurePosixPath(path).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        place.download(path, target)


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path and "\\" not in path


def _client(kind: str) -> Any:
    import fsspec

    settings = dict(_SETTINGS.get(kind, {}))
    if endpoint := endpoint_of(kind):
        settings["endpoint_url"] = endpoint
    if kind == "s3" and not (os.environ.get("AWS_MAX_ATTEMPTS") or os.environ.get("AWS_RETRY_MODE")):
        retries = {"mode": "standard", "total_max_attempts": _ATTEMPTS}
        settings["config_kwargs"] = {**settings["config_kwargs"], "retries": retries}
    try:
        return fsspec.filesystem(kind, **settings)
    except ImportError as error:
        library, extra = _LIBRARIES.get(kind, kind), KINDS.get(kind, kind)
        raise ValueError(f"{kind}:// needs {library}, which is not here: pip install 'moeify[{extra}]'") from error


def _item(info: Mapping[str, Any]) -> Item:
    when = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created") or 0.0
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    if isinstance(when, datetime):
        when = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    size = int(info.get("size") or 0)
    mark = info.get("ETag") or info.get("etag") or info.get("generation") or when
    return Item(size, f"{mark}/{size}", float(when))
