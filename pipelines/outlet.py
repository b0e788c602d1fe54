"""Where an export goes: a folder, or a URL whose objects are sent once the folder they come from is whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from moeify.place import Place, checked_url, is_url, send
from pipelines.homes import folder_of
from pipelines.stopping import stoppable


@contextmanager
def outlet(target: str) -> Iterator[Path]:
    """Give a folder to write to; where ``target`` is a URL, it is sent there when the body is through.

    SIGTERM ends the body like Ctrl-C, so that nothing half done stays behind. Raises ValueError where something is
    there already.
    """
    if not is_url(target):
        out = folder_of(target, Path()) if target.startswith("file://") else Path(target)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is there already; give a folder that is new or empty")
        with stoppable():
            yield out
        return
    place = Place(checked_url(target))
    if place.found():
        raise ValueError(f"{place.url} is there already; give a URL below which nothing is")
    with stoppable(), TemporaryDirectory(prefix="moeify-export-") as folder:
        out = Path(folder) / (PurePosixPath(place.url).name or "export")
        yield out
        send(out, place)
