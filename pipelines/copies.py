"""Folders of runs that are copies of what is behind a URL: fetched before they are read, sent after they are changed.

Of runs whose folder is the truth itself, nothing is done.
"""

import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.place import Place
from pipelines.homes import Home
from pipelines.remote_run import RemoteRun, files_in

if TYPE_CHECKING:
    from pipelines.runs import RunFolder

_AT_ONCE = 8
"""Runs that are fetched at a time."""


def look_at(known: Home, home: Path, id_: re.Pattern[str]) -> None:
    """Have a copy of every run that is new there, and of none that is gone there."""
    there = {name for name in Place(known.url).names() if id_.match(name)}
    here = {path.name for path in home.iterdir() if id_.match(path.name)} if home.is_dir() else set()
    for gone in here - there:
        shutil.rmtree(home / gone, ignore_errors=True)
    new = [name for name in there if not (home / name / "resolved.yaml").is_file()]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda name: RemoteRun(known.place(name), home / name).pull(), new))


def refresh(folders: "Sequence[RunFolder]") -> None:
    """Fetch what changed."""
    remotes = [remote for folder in folders if (remote := folder.remote)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda remote: remote.pull(), remotes))


def publish(folder: "RunFolder", *paths: Path) -> None:
    """Send files of the run's folder, and folders of it."""
    if folder.remote:
        folder.remote.push(*(path for path in paths if path.exists()))


def fetch_checkpoint(folder: "RunFolder") -> None:
    """Have the newest good checkpoint in the run's folder, for those who read models from there."""
    if remote := folder.remote:
        from moeify.url_store import UrlStore

        UrlStore(remote.place, folder.path, keep=1).newest()


def made_by_driver(folder: "RunFolder") -> list[Path]:
    """Return the files that the driver makes, as against its workers, and that a run's URL should have too."""
    places = (folder.plots, folder.path / "ray-logs", folder.report)
    return [path for place in places if place.exists() for path in files_in(place)]
