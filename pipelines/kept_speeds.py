"""How fast a run's exports were, kept beside the run: written by ``moeify export --speed``, read by the report."""

import json
import time
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from moeify.export.speeds import Speeds
from moeify.storing import storing
from pipelines.runs import RunFolder


class KeptSpeed(BaseModel):
    """What one export was timed at."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    export: str
    """What it is: ``python-only``, ``split``, ``without-web``, as its alias in MLflow."""
    form: str
    """How it is written, and so what runs it: ``dense``, ``split``, ``glm4_moe``, ``gguf``, ``onnx``."""
    time: float
    """Seconds since the epoch."""
    speeds: Speeds


_KEPT: TypeAdapter[tuple[KeptSpeed, ...]] = TypeAdapter(tuple[KeptSpeed, ...])


def path_of(folder: RunFolder) -> Path:
    """Return where a run keeps it."""
    return folder.path / "speeds.json"


def keep_speed(folder: RunFolder, export: str, form: str, speeds: Speeds) -> None:
    """Keep what an export was timed at, in place of what the same export was timed at before.

    Raises ValueError where the file that is there is damaged, StorageError where it cannot be written.
    """
    from moeify.store import write_atomically  # here, since readers need no torch

    new = KeptSpeed(export=export, form=form, time=time.time(), speeds=speeds)
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
    return kept.export, kept.form, kept.speeds.dtype, str(kept.speeds.threads)
