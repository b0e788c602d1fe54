"""What every worker of a run executes: its world, its task, the loop, and how an error leaves the worker.

A group of workers is started again when one of them died. That would be wrong when the recipe or the code is at fault,
which would fail the same way again. So an error of that sort is laid down in the run's folder as a ``Failure``; the
process that drives the run finds it there, starts nothing again, and raises it.
"""

import os
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from moeify.device import take_device
from moeify.divergence import OutOfMemoryError
from moeify.events import Artifact, Event, Finished, Phase
from moeify.place import Place
from moeify.recipe.config import RunConfig
from moeify.stopping import StoppedError
from moeify.store import FolderStore, Store
from moeify.world import Group, Solo, World, shares_models
from pipelines import homes
from pipelines.copies import fetch_checkpoint, publish
from pipelines.runs import RunFolder
from pipelines.stopping import Watch
from pipelines.url_journal import Journal, UrlJournal, journal_of


class Order(BaseModel):
    """One run as a worker is told of it; travels as JSON, paths absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path
    """The run's folder, the same on every node; where the run has a URL, each node's copy."""
    base: Path
    """Where relative paths of the recipe start."""
    cache: Path
    """Of prepared data; a node fills its own."""
    shelf: str | None = None
    """URL where nodes share prepared text; None: they do not."""
    config: RunConfig
    url: str | None = None
    """Of the run, where its folder is a copy. What opens it is in each node's environment."""
    attempt: str = ""
    """Tells this group of workers from those of other attempts at a run with a URL."""


class Failure(BaseModel):
    """An error that would come again on every attempt."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    family: Literal["value", "os", "program"]
    """``value``, ``os``: recipe, data or files are at fault, and the message alone says what to do."""
    kind: str
    """Name of the exception's class."""
    message: str
    trace: str
    """The traceback, for whoever debugs."""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Return what there is to say of an error."""
        return cls(
            family="value" if isinstance(error, ValueError) else "os" if isinstance(error, OSError) else "program",
            kind=type(error).__name__,
            message=str(error),
            trace="".join(traceback.format_exception(error)),
        )

    def told(self) -> str:
        """Return one line for people."""
        return " ".join((self.message if self.family != "program" else f"{self.kind}: {self.message}").split())


class _Silent:
    """Takes no notice: rank 0 speaks for all."""

    def emit(self, event: Event) -> None:
        """Drop the event."""


def failure_path(folder: Path) -> Path:
    """Return where a worker leaves its ``Failure``."""
    return folder / "failure.json"


def failure_of(payload: Mapping[str, Any]) -> Failure | None:
    """Return the ``Failure`` that a worker of this order left, if one did."""
    with suppress(FileNotFoundError):
        if url := payload.get("url"):
            content = Place(url).read(_failure_name(payload))
        else:
            content = failure_path(Path(payload["folder"])).read_bytes()
        return Failure.model_validate_json(content)
    return None


def work(payload: dict[str, Any]) -> None:
    """Run one worker's part of an ``Order``, alone or in torch.distributed's group; write the result on rank 0."""
    order = Order.model_validate(payload)
    torch.set_num_threads(order.config.cluster.threads)
    device = take_device(order.config.cluster.gpus)
    world = Group(order.config.cluster.parallel, device) if dist.is_initialized() else Solo(device)
    if order.url:
        homes.note(order.folder.parent, order.url.rpartition("/")[0])
    folder = RunFolder(order.folder)
    if folder.remote:
        folder.remote.pull()
    if world.rank:
        _loop(order, folder, world, _Silent())
    else:
        with journal_of(folder) as journal:
            _loop(order, folder, world, journal)


def guarded(worker: Callable[[dict[str, Any]], None], payload: dict[str, Any]) -> None:
    """Call ``worker(payload)``, and leave an error that would come again as a ``Failure`` before it is raised.

    It is left in ``payload["folder"]``, or behind the run's URL; not where that takes nothing more, nor of a peer that
    is gone or of memory, which another attempt may mend. Raising, not returning, is what ends the others: they wait for
    this rank in a collective until Ray takes the group down. Closing the group here would not free them all: a model's
    mesh keeps it open, and so does ``torch.distributed.nn.functional``, by its default arguments.
    """
    try:
        worker(payload)
    except StoppedError:  # the process that drives the run has asked for it
        return
    except Exception as error:
        if not isinstance(error, OutOfMemoryError) and not _peer_is_gone(error):
            with suppress(OSError):
                leave(payload, error)
        raise


def leave(payload: Mapping[str, Any], error: Exception) -> None:
    """Lay the error down where the run is kept; the first worker to do so is the one that is heard."""
    content = Failure.of(error).model_dump_json(indent=2)
    if url := payload.get("url"):
        with suppress(FileExistsError):
            Place(url).create(_failure_name(payload), content.encode())
        return
    path = failure_path(Path(payload["folder"]))
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text(content, encoding="utf-8")
        if not path.exists():
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _failure_name(payload: Mapping[str, Any]) -> str:
    return f"failures/{payload.get('attempt') or 'alone'}.json"


def _loop(order: Order, folder: RunFolder, world: World, tracker: Journal | _Silent) -> None:
    from moeify.loop import run  # here, since the driver reads this module too and needs none of this
    from moeify.tasks.build import build_task
    from pipelines.examples import keep_or_warn

    tracker.emit(Phase(id="phase/prepare", time=time.time(), phase="prepare", round=0))
    task = build_task(order.config, cache=order.cache, base=order.base, world=world, shelf=order.shelf)
    store = _store(folder, order.config.checkpoints.keep, tracker)
    result = run(order.config, task, world=world, store=store, tracker=tracker, stop=Watch(folder))
    if world.rank == 0:
        if shares_models(world):  # this worker has written its share alone
            fetch_checkpoint(folder)
        store.put(folder.result.name, (result.model_dump_json(indent=2) + "\n").encode())
        if keep_or_warn(folder, order.config, task):
            path = folder.portraits.name
            publish(folder, folder.portraits)
            tracker.emit(Artifact(id=f"artifact/{path}", time=time.time(), path=path))
        tracker.emit(Finished(id="finished", time=time.time(), seconds=result.seconds))


def _store(folder: RunFolder, keep: int, tracker: Journal | _Silent) -> Store:
    """Return where checkpoints go; behind a URL they wait for the journal, and for its word that the run is ours."""
    if (remote := folder.remote) is None:
        return FolderStore(folder.path, keep)
    from moeify.url_store import UrlStore

    return UrlStore(remote.place, folder.path, keep, tracker.flush if isinstance(tracker, UrlJournal) else _refused)


def _refused() -> None:
    raise AssertionError("only rank 0 publishes checkpoints")


def _peer_is_gone(error: Exception) -> bool:
    """Whether a collective failed because another process of the group did."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl"))
