"""Run folders: where a run keeps everything, how it is found again, who drives it.

A run is a folder and nothing else: no database knows more about it than its files do. Where ``MOEIFY_HOME`` is a URL, a
run's folder is a copy of what is there, fetched when the run is looked up.
"""

import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from moeify.place import checked_url, is_url
from moeify.recipe.config import RunConfig
from moeify.recipe.load import to_yaml
from moeify.storing import storing
from pipelines import copies, homes, lease
from pipelines.lease import RunBusyError as RunBusyError
from pipelines.remote_run import RemoteRun
from pipelines.versions import package_version, versions

Status = Literal["running", "finished", "failed", "interrupted"]

_PATIENCE = 5.0
"""Seconds that outlast the probe in ``status``, and what a driver that was killed had just forked."""
_ID = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)-(?P<when>\d{8}-\d{6})-[0-9a-f]{4}$")
_LONGEST_ID = 90
"""Characters: a name, which has 64 at most, and what follows it."""
_TAIL = 1 << 16
"""Bytes of the journal's end that are read to tell how an attempt ended."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def id(self) -> str:
        """``<name>-<YYYYMMDD>-<HHMMSS>-<4 hex>``, in UTC."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The recipe as it was given."""
        return self.path / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe with every default filled in: what the run goes by."""
        return self.path / "resolved.yaml"

    @property
    def origin(self) -> Path:
        """JSON: ``base``, the folder that relative paths of the recipe start at; ``moeify``, the version; ``versions``,
        those of Python and of the packages that have a say in a run's figures."""
        return self.path / "origin.json"

    @property
    def remote(self) -> RemoteRun | None:
        """What the folder is a copy of; None where it is the truth itself."""
        home = homes.home_of(self.path.parent)
        return RemoteRun(home.place(self.id), self.path) if home else None

    @property
    def address(self) -> str:
        """Where the run is, for people: a path, or a URL."""
        return self.remote.place.url if self.remote else str(self.path)

    @property
    def base(self) -> Path:
        """The folder that relative paths of the recipe start at."""
        if self.inputs.is_dir():
            return self.inputs
        try:
            return Path(json.loads(self.origin.read_text(encoding="utf-8"))["base"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.origin} is not what moeify wrote there ({type(error).__name__}), so nobody knows where the "
                f"recipe's paths start; put it back"
            ) from None

    @property
    def inputs(self) -> Path:
        """Data files that came with the recipe, where a cluster runs it for someone elsewhere."""
        return self.path / "inputs"

    @property
    def journal(self) -> Path:
        """One event a line; see ``pipelines.journal``."""
        return self.path / "journal.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def rounds(self) -> Path:
        """Folder with one folder a round: attribution and partition."""
        return self.path / "rounds"

    @property
    def plots(self) -> Path:
        """Folder of pictures."""
        return self.path / "plots"

    @property
    def result(self) -> Path:
        """JSON of ``moeify.result.Result``; only a finished run has it."""
        return self.path / "result.json"

    @property
    def portraits(self) -> Path:
        """JSON of ``moeify.portraits.Portraits``: what each expert does, by example."""
        return self.path / "portraits.json"

    @property
    def router(self) -> Path:
        """JSON of ``moeify.routers.report.RouterReport``; only a run that ``moeify route`` has been on has it."""
        return self.path / "router" / "report.json"

    @property
    def report(self) -> Path:
        """The run as one HTML page; see ``pipelines.report.page``."""
        return self.path / "report.html"

    @property
    def tracking(self) -> Path:
        """JSON: how far the journal was delivered to MLflow."""
        return self.path / "tracking.json"

    @property
    def lock(self) -> Path:
        """Held by the process that drives the run, for as long as it does."""
        return self.path / "lock"

    @property
    def driver(self) -> Path:
        """JSON: ``host`` and ``pid`` of the process that drives the run, or did last."""
        return self.path / "driver.json"


def home() -> Path:
    """Return the folder of all runs: ``MOEIFY_HOME``, or ``runs`` in the working directory.

    Where ``MOEIFY_HOME`` is a URL, it is the folder of the copies of its runs.
    """
    return homes.folder_of(os.environ.get("MOEIFY_HOME") or "runs", cache())


def told_home(home: Path) -> str:
    """Return where all runs are, for people: a path, or a URL."""
    known = homes.home_of(home)
    return known.url if known else str(home)


def cache() -> Path:
    """Return the folder of what can be made again: ``MOEIFY_CACHE``, or ``~/.cache/moeify``.

    Where ``MOEIFY_CACHE`` is a URL, that is a ``shelf`` for what machines can share.
    """
    asked = os.environ.get("MOEIFY_CACHE") or ""
    return Path("~/.cache/moeify" if not asked or is_url(asked) else asked).expanduser().absolute()


def shelf(kind: Literal["text", "twins"]) -> str | None:
    """Return the URL where machines find what others of them prepared, where ``MOEIFY_CACHE`` is one."""
    asked = os.environ.get("MOEIFY_CACHE") or ""
    return f"{checked_url(asked)}/{kind}" if is_url(asked) else None


def new_id(name: str) -> str:
    """Return an id for a run of that recipe that begins now."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def check_id(run: str) -> str:
    """Return the id; raise ``ValueError`` where it is none, so that none is a path or anything else."""
    if not _ID.fullmatch(run) or len(run) > _LONGEST_ID:
        raise ValueError(f"{run[:100]!r} is no id of a run, wanted NAME-YYYYMMDD-HHMMSS-HHHH, with 4 hex digits last")
    return run


def create(
    config: RunConfig,
    recipe_text: str,
    home: Path,
    base: Path | None = None,
    *,
    run: str | None = None,
    fill: Callable[[Path], object] | None = None,
) -> RunFolder:
    """Make the folder of a new run; it appears whole or not at all.

    ``base`` is the folder that relative paths of the recipe start at; None: the working directory.
    ``run``: its id; None: a new one. ``fill``: writes the data that goes with the recipe into a folder of the run,
    which takes the place of ``base``.

    Raises:
        FileExistsError: ``run`` is there.
        StorageError: there is no room, or no right to write.
    """
    with storing(home):
        home.mkdir(parents=True, exist_ok=True)
        draft = home / f".new-{os.getpid()}-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            folder = RunFolder(draft)
            folder.recipe.write_text(recipe_text, encoding="utf-8")
            folder.resolved.write_text(to_yaml(config), encoding="utf-8")
            for part in (folder.checkpoints, folder.rounds, folder.plots):
                part.mkdir()
            if fill:
                folder.inputs.mkdir()
                fill(folder.inputs)
            while True:
                path = home / (check_id(run) if run else new_id(config.name))
                if not path.exists():
                    start = RunFolder(path).inputs if fill else (base or Path()).absolute()
                    origin = {"base": str(start), "moeify": package_version(), "versions": versions()}
                    folder.origin.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
                    _send_new(draft, RunFolder(path))
                    return RunFolder(draft.rename(path))
                if run:
                    raise FileExistsError(f"run {run} is there already")
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _send_new(draft: Path, folder: RunFolder) -> None:
    """Send the files of a new run to where it will be; it is there once its last file, the resolved recipe, is."""
    if (remote := folder.remote) is None:
        return
    last = folder.resolved.name
    RemoteRun(remote.place, draft).push(*(path for path in draft.iterdir() if path.name != last))
    try:
        remote.place.create(last, (draft / last).read_bytes())
    except FileExistsError:
        raise FileExistsError(f"run {folder.id} is there already") from None


def every(home: Path) -> list[RunFolder]:
    """Return all runs, oldest first."""
    if known := homes.home_of(home):
        copies.look_at(known, home, _ID)
    if not home.is_dir():
        return []
    found = [
        (match["when"], (path / "resolved.yaml").stat().st_mtime_ns, path.name)
        for path in home.iterdir()
        if (match := _ID.match(path.name)) and (path / "resolved.yaml").is_file()
    ]
    return [RunFolder(home / name) for *_, name in sorted(found)]


def there(run: str, home: Path) -> RunFolder | None:
    """Return the run with that id, its files fetched; None where there is none."""
    folder = RunFolder(home / check_id(run))
    if (remote := folder.remote) and folder.resolved.name not in remote.place.names():
        shutil.rmtree(folder.path, ignore_errors=True)  # a copy of what is gone
        return None
    copies.refresh([folder])
    return folder if folder.resolved.exists() else None


def find(reference: str, home: Path) -> RunFolder:
    """Return the run with that id, the only one whose id starts so, or the newest one for ``last``."""
    if not reference or "/" in reference or "\\" in reference or ".." in reference:
        raise ValueError(f"{reference!r} is not a run; give its id, a unique start of it, or 'last', not a path")
    runs = every(home)
    if not runs:
        raise ValueError(
            f"no runs in {told_home(home)}; start one with 'moeify run RECIPE', or set MOEIFY_HOME to their folder"
        )
    if reference == "last":
        return _fetched(runs[-1])
    matches = [run for run in runs if run.id == reference] or [run for run in runs if run.id.startswith(reference)]
    if len(matches) == 1:
        return _fetched(matches[0])
    if matches:
        raise ValueError(f"{reference!r} fits {len(matches)} runs: {_listed(matches)}; give more of the id")
    raise ValueError(f"no run {reference!r} in {told_home(home)}; there are {_listed(runs)}")


def _fetched(folder: RunFolder) -> RunFolder:
    copies.refresh([folder])
    return folder


def find_finished(reference: str, home: Path) -> RunFolder:
    """Return the run that ``find`` finds; ValueError where it has not ended well."""
    folder = find(reference, home)
    if (stands := status(folder)) != "finished":
        raise ValueError(f"run {folder.id} is {stands}, wanted a finished one; see 'moeify resume'")
    return folder


def _listed(runs: list[RunFolder], most: int = 5) -> str:
    newest = ", ".join(run.id for run in reversed(runs[-most:]))
    return newest if len(runs) <= most else f"{newest} and {len(runs) - most} older ones"


@contextmanager
def hold(folder: RunFolder) -> Iterator[None]:
    """Drive the run: hold its lock; raise ``RunBusyError`` when another process does."""
    what = f"run {folder.id}"
    with hold_lock(folder.lock, what), ExitStack() as stack:
        if (remote := folder.remote) and (home := homes.home_of(folder.path.parent)):
            stack.enter_context(lease.held(remote, home.copy, what, lambda: copies.made_by_driver(folder)))
        driver = {"host": socket.gethostname(), "pid": os.getpid()}
        with storing(folder.driver):
            folder.driver.write_text(json.dumps(driver) + "\n", encoding="utf-8")
        yield


@contextmanager
def hold_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of what is driven; raise ``RunBusyError`` when another process does.

    The operating system lets the lock go when the process ends, however it ends.
    """
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        with storing(path):
            lock.acquire()
    except Timeout:
        raise RunBusyError(f"{what} is driven by another process; wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()


def status(folder: RunFolder) -> Status:
    """Say how the run stands, from its files alone."""
    if _held(folder):
        return "running"
    kinds = _last_kinds(folder.journal)
    if folder.result.is_file() and "finished" in kinds:
        return "finished"
    return "failed" if kinds[-1:] == ["failed"] else "interrupted"


def _held(folder: RunFolder) -> bool:
    if _locked(folder):
        return True
    remote, home = folder.remote, homes.home_of(folder.path.parent)
    return bool(remote and home and lease.holder(remote.place, home.copy))


def _locked(folder: RunFolder) -> bool:
    if not folder.lock.exists():
        return False
    try:
        with FileLock(folder.lock, timeout=0):
            return False
    except Timeout:
        return True
    except PermissionError:  # someone else's run that we may only read
        return False


def _last_kinds(journal: Path) -> list[str]:
    """Return the kinds of the last whole events."""
    try:
        with journal.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    kinds = []
    for line in lines:
        try:
            kinds.append(str(json.loads(line)["kind"]))
        except (ValueError, KeyError, TypeError):  # the first line may start in the middle
            continue
    return kinds
