"""Every file of a checkpoint damaged in turn: it must be seen, told, and what lies before it used."""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.killable import Outcome, Runs, Tally, WrongError, alive, ended, judged
from moeify.store import FolderStore
from pipelines.journal import read_events
from pipelines.runs import RunFolder

_FIRST = 1000
"""Number of the first run that is damaged."""


def damage(runs: Runs, wanted: Outcome, draw: random.Random, tally: Tally, *, quick: bool) -> tuple[int, int]:
    """Damage every file of the newest checkpoint of a run that was stopped; return damages, and those that were missed.

    Some of them are resumed from, which counts as a run in ``tally``.
    """
    folder, before, newest = _stopped(runs, _FIRST)
    count = missed = 0
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for way, spoilt in _damages(content, draw, 8 if quick else 40):
            _write(path, spoilt)
            found = FolderStore(folder.path, keep=3).newest()
            count += 1
            if found is None or found.name != before or len(found.damaged) != 1 or path.name not in found.damaged[0]:
                missed += 1
                print(f"missed: {path.name}, {way}: {found}", file=sys.stderr)
        path.write_bytes(content)
    for place, (way, spoilt) in enumerate([("emptied", b""), ("removed", None)][: 1 if quick else 2]):
        number = _FIRST + place
        if place:
            folder, before, newest = _stopped(runs, number)
        _write(sorted(newest.glob("*.safetensors"))[-place], spoilt)
        with judged(runs, number, wanted, tally, "local"):
            runs.check(number)
            notes = [event.note for event in read_events(folder.journal, 0)[0] if event.kind == "phase"]
            if not any(newest.name in note and f"going on from checkpoint {before}" in note for note in notes):
                raise WrongError(f"a checkpoint that was {way} is not told of in the journal")
    return count, missed


def _stopped(runs: Runs, number: int) -> tuple[RunFolder, str, Path]:
    """Kill a run that has three checkpoints; return its folder, the name of the last but one and the newest's path."""
    process, folder = runs.attempt(number), runs.folder(number)
    while alive(process) and len(_checkpoints(folder)) < 3:
        time.sleep(0.002)
    process.kill()
    ended(process)
    *_, before, newest = _checkpoints(folder)
    return folder, before, folder.checkpoints / newest


def _checkpoints(folder: RunFolder) -> list[str]:
    if not folder.checkpoints.is_dir():
        return []
    return sorted(path.name for path in folder.checkpoints.iterdir() if not path.name.startswith("."))


def _damages(content: bytes, draw: random.Random, places: int) -> Iterator[tuple[str, bytes | None]]:
    yield "emptied", b""
    yield "removed", None
    yield "longer by a byte", content + b"\0"
    for place in sorted(draw.sample(range(len(content)), min(places, len(content)))):
        yield f"cut at {place}", content[:place]
        yield (
            f"flipped at {place}",
            content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
        )


def _write(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)
