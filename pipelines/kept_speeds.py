"""How fast a run's exports were, kept beside the run: written by ``moeify export --speed``, read by the report."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from moeify.storing import storing
from pipelines.runs import RunFolder

if TYPE_CHECKING:
    from moeify.export.speed import Speeds


class TimedWork(BaseModel):
    """One kind of work, done by an export and by the dense network; see ``moeify.export.speed.Speed``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    work: str
    batch: int
    route: str
    """The category that rows are of; ``mixed``: of all categories in turn."""
    dense: float
    """Tokens (or rows) a second; so is ``export``."""
    export: float
    over_dense: float
    """How many times as fast as the dense network."""
    limit: float
    """What that can be, by the work that the route needs."""
    bound: str
    """Of what work."""

    @property
    def of_limit(self) -> float:
        """Fraction of the limit."""
        return self.over_dense / self.limit


class KeptSpeed(BaseModel):
    """What one export was timed at."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    export: str
    """What it is: ``python-only``, ``split``, ``without-web``, as its alias in MLflow."""
    form: str
    """How it is written, and so what runs it: ``dense``, ``split``, ``glm4_moe``, ``gguf``, ``onnx``."""
    time: float
    """Seconds since the epoch."""
    unit: str
    """That rates count: ``token`` or ``row``."""
    dtype: str
    threads: int
    prompt: int | None
    """Tokens of a prompt; None where the model writes no text."""
    rows: tuple[TimedWork, ...]


_KEPT: TypeAdapter[tuple[KeptSpeed, ...]] = TypeAdapter(tuple[KeptSpeed, ...])


def path_of(folder: RunFolder) -> Path:
    """Return where a run keeps it."""
    return folder.path / "speeds.json"


def keep_speed(folder: RunFolder, export: str, form: str, speeds: "Speeds") -> None:
    """Keep what an export was timed at, in place of what the same export was timed at before.

    Raises ValueError where the file that is there is damaged, StorageError where it cannot be written.
    """
    from moeify.store import write_atomically  # here, since readers need no torch

    known: dict[str, Any] = {**asdict(speeds), "export": export, "form": form, "time": time.time()}
    new = KeptSpeed.model_validate(known)
    path = path_of(folder)
    with storing(path), FileLock(path.with_name(f".{path.name}.lock")):
        others = [each for each in read_speeds(folder) if _same(each) != _same(new)]
        content = json.dumps([each.model_dump(mode="json") for each in (*others, new)], indent=1)
        write_atomically(path, content.encode() + b"\n")


def read_speeds(folder: RunFolder) -> tuple[KeptSpeed, ...]:
    """Return what was kept, the newest last; empty where nothing was timed, ValueError where it is damaged."""
    path = path_of(folder)
    try:
        return _KEPT.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ValueError(
            f"{path.name} of {folder.id} is damaged ({what}); remove it, and time exports anew: moeify export --speed"
        ) from None


def _same(kept: KeptSpeed) -> tuple[str, ...]:
    return kept.export, kept.form, kept.dtype, str(kept.threads)
