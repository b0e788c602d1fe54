"""Whether this machine is fit for a run: each check tries what a run will need, and says what to do where it fails."""

import importlib.util
import os
import platform
import secrets
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from moeify.place import Place
from pipelines import homes, machine, runs
from pipelines.one_line import one_line, public
from pipelines.wording import counted

State = Literal["ok", "warning", "problem"]

_SECONDS = 5.0
"""How long a server may take to answer."""
_CLIENT_SECONDS = 20.0
"""The same of other stores of MLflow, whose client is imported and connects first."""
_MEMORY = (1.0, 4.0)
"""GB: with less than the first no run, with less than the second not every one."""
_DISK = (0.2, 2.0)
"""The same of a disk."""
_WRITTEN = 1 << 20
"""Bytes that are written to see whether that works."""
_EXTRAS = {
    "gguf": (("gguf", "xllamacpp"), "moeify export --gguf"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "moeify export --onnx"),
    "peft": (("peft",), "moeify study fine_tuning"),
    "streamed": (("datasets",), "data.source.kind streamed"),
    "s3": (("s3fs",), "s3:// in MOEIFY_HOME, MOEIFY_CACHE and exports"),
    "gs": (("gcsfs",), "gs:// in the same places"),
    "service": (("boto3", "psycopg2", "flask_wtf"), "the servers of docker/"),
}
"""Optional parts: the modules of each, and what needs them."""


@dataclass(frozen=True)
class Check:
    """What one look found."""

    name: str
    state: State
    said: str
    """What was found."""
    todo: str = ""
    """What to do; empty where nothing is to be done."""

    @property
    def line(self) -> str:
        """All of it, on one line."""
        return " ".join((self.said + (f"; {self.todo}" if self.todo else "")).split())


def examine() -> Iterator[Check]:
    """Yield every check, as each is done; one that breaks down is a problem, and the others go on."""
    looks: dict[str, Callable[[], Check]] = {
        "python": _python,
        "packages": _packages,
        "torch": _torch,
        "cores": _cores,
        "memory": _memory,
        "runs": lambda: _home("runs"),
        "cache": lambda: _folder("cache", runs.cache(), "MOEIFY_CACHE"),
        "ray": _ray,
        "cluster": _cluster,
        "mlflow": _mlflow,
        "texts": _texts,
        **{name: partial(_extra, name) for name in _EXTRAS},
    }
    for name, look in looks.items():
        try:
            yield look()
        except Exception as error:
            what = one_line(error, 200, kind=True)
            yield Check(name, "problem", what, f"see whether {name} is installed whole: pip install --force-reinstall")


# --- what is installed --------------------------------------------------------------------------------


def _python() -> Check:
    """Name the interpreter; an older one than moeify wants does not come as far as this."""
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Check:
    """Hold every package that moeify wants against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("moeify") or ()]
    except PackageNotFoundError:
        return Check("packages", "warning", "moeify runs from a checkout, not installed", "pip install -e .")
    wanted = [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in wanted:
        try:
            there = version(each.name)
        except PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(there, prereleases=True):
            wrong.append(f"{each.name} is {there}, wanted {each.specifier}")
    if wrong:
        return Check("packages", "problem", ", ".join(wrong), "pip install --upgrade moeify")
    return Check("packages", "ok", f"moeify {version('moeify')} and the {len(wanted)} packages it wants")


def _torch() -> Check:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    threads, cores = torch.get_num_threads(), machine.cores()
    one = torch.ones(8, 8)
    if not torch.equal(one @ one, torch.full((8, 8), 8.0)):
        return Check("torch", "problem", f"{torch.__version__} multiplies wrongly", "install torch anew")
    said = f"{torch.__version__}, {build}, {threads} threads"
    if names := [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]:
        said += f", {counted(len(names), 'GPU')} for cluster.gpus ({', '.join(sorted(set(names)))})"
    if threads > cores:
        todo = f"more threads than the {cores} cores of this process wait for each other; set OMP_NUM_THREADS={cores}"
        return Check("torch", "warning", said, todo)
    return Check("torch", "ok", said)


def _extra(name: str) -> Check:
    modules, user = _EXTRAS[name]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        return Check(name, "ok", f"not installed, optional, for {user}: pip install 'moeify[{name}]'")
    return Check(name, "ok", f"installed, for {user}")


def _texts() -> Check:
    """Read the installed text, as the recipe ``text`` does."""
    from moeify.data import corpora
    from moeify.data.sources import LEAST_MEGABYTES
    from moeify.recipe.data import InstalledText

    told, short = [], []
    for source in InstalledText(kind="installed").sources:
        megabytes = sum(each.size for each in corpora.documents(source, int(LEAST_MEGABYTES * 1e6))) / 1e6
        told.append(source)
        if megabytes < LEAST_MEGABYTES:
            short.append(f"{source} ({megabytes:.1f} MB of {LEAST_MEGABYTES:g})")
    if short:
        return Check("texts", "warning", f"too little: {', '.join(short)}", "the recipe 'text' cannot run as shipped")
    return Check("texts", "ok", f"{', '.join(told)}: {LEAST_MEGABYTES:g} MB or more each, for the recipe 'text'")


# --- the machine --------------------------------------------------------------------------------------


def _cores() -> Check:
    cores = machine.cores()
    if cores < 2:
        return Check("cores", "warning", "1 core", "runs are slow, and cluster.workers above 1 never starts")
    return Check("cores", "ok", f"{cores} cores for this process")


def _memory() -> Check:
    free = machine.free_memory()
    said, (least, enough) = f"{free:.1f} GB free", _MEMORY
    if free < least:
        return Check("memory", "problem", said, f"wanted {enough:g} GB; end other programs")
    if free < enough:
        return Check("memory", "warning", said, f"wanted {enough:g} GB; run with --local and cluster.workers: 1")
    return Check("memory", "ok", said)


def _home(name: str) -> Check:
    """Look at where runs are kept; behind a URL an object is written, read back, listed and removed."""
    try:
        known = homes.home_of(runs.home())
    except (ValueError, OSError) as error:
        return Check(name, "problem", one_line(error, None), "set MOEIFY_HOME to a folder, or to a URL of one")
    if known is None:
        return _folder(name, runs.home(), "MOEIFY_HOME")
    probe, content = f".moeify-doctor-{secrets.token_hex(4)}", secrets.token_bytes(64)
    try:
        place = Place(known.url)
        place.create(probe, content)
        whole = place.read(probe) == content and probe in place.names()
        place.remove([probe])
    except (ValueError, OSError) as error:
        return Check(name, "problem", one_line(error, None), "see docs/storage.md")
    if not whole:
        return Check(name, "problem", f"{known.url}: what was written reads differently", "use another store")
    return Check(name, "ok", f"{known.url}: can be listed, read and written")


def _folder(name: str, folder: Path, variable: str) -> Check:
    """Write where runs will write, and read it back; a folder that is not there yet is not made."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    where = str(folder) if there == folder else f"{folder} (to be made in {there})"
    way_out = f"set {variable} to a folder that can be written to"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".moeify-doctor-") as file:
            content = os.urandom(_WRITTEN)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            if file.read() != content:
                return Check(name, "problem", f"{where}: what was written reads differently", way_out)
        free = shutil.disk_usage(there).free / 1e9
    except OSError as error:
        return Check(name, "problem", f"{where}: {error.strerror or error}", way_out)
    said, (least, enough) = f"{where}: writable, {free:.1f} GB free", _DISK
    if free < least:
        return Check(name, "problem", said, f"free some, or {way_out}")
    return Check(name, "warning" if free < enough else "ok", said, "free some" if free < enough else "")


# --- servers ------------------------------------------------------------------------------------------


def _ray() -> Check:
    import ray

    return Check("ray", "ok", f"{ray.__version__}, imports")


def _cluster() -> Check:
    from pipelines.ray_jobs import address_of, connect

    way_out = "start it, or unset the variable to run on this machine"
    own = os.environ.get("RAY_ADDRESS", "")
    try:
        api = address_of(None)
        if api is not None:
            jobs = len(connect(api).attempts())
            return Check("cluster", "ok", f"the job API at {api} answers, {jobs} jobs of runs")
    except (OSError, ValueError) as error:
        return Check("cluster", "problem", str(error), way_out)
    if not own or own in ("auto", "local"):
        return Check("cluster", "ok", "no address is set: a run starts a Ray of its own")
    host, _, port = own.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return Check("cluster", "problem", f"RAY_ADDRESS is {own!r}, wanted HOST:PORT", way_out)
    try:
        socket.create_connection((host, int(port)), _SECONDS).close()
    except OSError as error:
        return Check("cluster", "problem", f"RAY_ADDRESS {own} does not answer ({error.strerror or error})", way_out)
    return Check("cluster", "ok", f"RAY_ADDRESS {own} answers")


def _mlflow() -> Check:
    from pipelines.mlflow_store import tracking_uri

    uri = tracking_uri(runs.home())
    where, way_out = public(uri), "runs go on without it, and 'moeify sync' delivers later; set MLFLOW_TRACKING_URI"
    try:
        if uri.startswith("sqlite:///"):
            said = _sqlite(Path(uri.removeprefix("sqlite:///")))
        elif uri.startswith(("http://", "https://")):
            said = _served(where)
        else:
            said = _stored(uri)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "reason", None) or error
        return Check("mlflow", "problem", f"{where}: {one_line(reason, 200)}", way_out)
    except ValueError as error:
        return Check("mlflow", "problem", one_line(error, None))
    return Check("mlflow", "ok", f"{where}: {said}")


def _sqlite(path: Path) -> str:
    from moeify.recipe.config import Tracking
    from pipelines.mlflow_store import check_reach

    if not path.exists():
        return "the first run makes it"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_SECONDS)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("PRAGMA schema_version").fetchone()
        database.rollback()
        laid_out = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'experiments'").fetchone()[0]
        name = Tracking().experiment
        query = "SELECT experiment_id, artifact_location FROM experiments WHERE name = ? AND lifecycle_stage = 'active'"
        for experiment, location in database.execute(query, (name,)).fetchall() if laid_out else ():
            check_reach(name, str(experiment), location, f"sqlite:///{path}")
    return "opens to be written to"


def _served(address: str) -> str:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=_SECONDS) as answer:
            return f"answers ({answer.status})"
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            return f"answers, and asks who you are ({error.code})"
        raise OSError(f"it answers {error.code} to /health; is it an MLflow server?") from None


def _stored(uri: str) -> str:
    """Ask a store that MLflow alone knows how to reach, in a thread that may be left behind."""
    found: list[Any] = []

    def ask() -> None:
        from pipelines.mlflow_store import open_mlflow

        try:
            found.append(open_mlflow().MlflowClient(tracking_uri=uri).search_experiments(max_results=1))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_CLIENT_SECONDS)
    if not found:
        raise OSError(f"no answer within {_CLIENT_SECONDS:.0f} s")
    if isinstance(found[0], Exception):
        raise OSError(one_line(found[0], None))
    return "answers"
