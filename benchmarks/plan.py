"""Whether ``moeify plan`` is right: what it foresees of whole runs, over what those runs take.

Each recipe runs twice in this process, one worker of one thread: once with every operation counted, once against the
clock. Operations are foreseen for rounds that are all kept; time from a few training steps right before: what their
operations take, and what they take besides. What is not foreseen (finding the partition, calls of attribution and
evaluation, checkpoints) is in what is taken. Both are the processor's time of this thread. A checkpoint's size is that
of its files. The text recipe is cut to a fifth of its steps; the whole takes about five minutes on an idle core.
"""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.report import Cell, Figure, arguments, report
from moeify.dry_run import FlopCounter, sizes
from moeify.forecast import forecast
from moeify.loop import run
from moeify.pace import pace
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe
from moeify.store import FolderStore
from moeify.tasks.build import build_task
from pipelines.find_recipe import find_recipe
from pipelines.runs import cache

SHARES = {"digits": 1, "text": 5}
"""Recipe -> what its steps are divided by."""
QUICK = {"digits": 50}


def main() -> None:
    """Foresee, run and compare."""
    asked = arguments(__doc__)
    torch.set_num_threads(1)
    rows = [compared(name, shortened(name, share)) for name, share in (QUICK if asked.quick else SHARES).items()]
    goals = {"operations": "1", "seconds": "1, less by what is not foreseen", "checkpoint": "1"}
    figures = [
        Figure(f"{figure}_{row['recipe']}", float(str(row[figure])), goal)
        for row in rows
        for figure, goal in goals.items()
    ]
    report("plan", rows, figures, asked.json, quick=asked.quick)


def shortened(name: str, share: int) -> RunConfig:
    """Return a shipped recipe of fewer steps, for one worker."""
    text, where, _ = find_recipe(name)
    config = parse_recipe(text, where=where)
    rounds = tuple(
        r.model_copy(update={"train": r.train // share, "recover": r.recover // share}) for r in config.rounds
    )
    training = config.training.model_copy(update={"steps": config.training.steps // share})
    cluster = config.cluster.model_copy(update={"workers": 1, "threads": 1})
    return config.model_copy(update={"rounds": rounds, "training": training, "cluster": cluster})


def compared(name: str, config: RunConfig) -> Mapping[str, Cell]:
    """Return what was foreseen of a run over what it took."""
    task = build_task(config, cache=cache(), base=Path())
    known = sizes(config, Path(), 1, len(task.categories))
    found = forecast(config, known, len(task.categories))
    with FlopCounter() as counter:
        run(config, task)
    measured = pace(config, Path(), known, len(task.categories), steps=20)
    foreseen = found.flops / measured.flops
    foreseen += sum(each.steps * (measured.routed if each.routed else measured.step) for each in found.work)
    with tempfile.TemporaryDirectory() as folder:
        began = time.thread_time()
        run(config, task, store=FolderStore(Path(folder), config.checkpoints.keep))
        taken = time.thread_time() - began
        last = max((Path(folder) / "checkpoints").iterdir())
        stored = sum(path.stat().st_size for path in last.iterdir())
    return {
        "recipe": name,
        "parameters": known.parameters,
        "TFLOPs foreseen": found.flops / 1e12,
        "operations": found.flops / counter.flops,
        "seconds foreseen": foreseen,
        "seconds": foreseen / taken,
        "checkpoint": found.checkpoint / stored,
    }


if __name__ == "__main__":
    main()
