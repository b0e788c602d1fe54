"""What a second worker brings: tokens a second of two gloo workers over those of one, on the shipped text recipe.

Each worker is a process with one thread, pinned to a core of its own, and runs the loop's own training step: the rows
of a step are shared out, gradients summed. Worker 0 alone, both together, and both with gradients on the way during the
backward pass (``cluster.parallel: {kind: ddp}``) take turns in the same processes, on the same rows; the figures are
medians of the ratios of neighbouring turns. Both together without any exchange, which learns nothing of use, says how
much of what is missing is the machine's. It must be idle and have two cores: with other work on them the figures are
theirs.

The recipe's rows a step come first, and then more of them: what travels is the same however many rows there are, so
that the figure says more about how small a step is than about anything else. The full benchmark takes about ten minutes
on two cores, --quick a few steps.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from benchmarks.gloo import run_together
from benchmarks.report import Cell, Figure, arguments, report
from moeify.evaluation import row_losses
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe
from moeify.recipe.parallel import Ddp
from moeify.routed.split_model import SplitModel
from moeify.tasks.build import build_task
from moeify.training import Contestant, train
from moeify.world import Group, Solo, World
from pipelines.runs import cache

TURNS, STEPS = 9, 24
QUICK_TURNS, QUICK_STEPS = 3, 2
TIMES = (1, 2, 4)
"""The recipe's rows a step, and multiples of them."""
_TURNS = ("one", "two", "two, ddp", "two, without exchange")
_SECONDS = "seconds.json"
_NEVER = 10**9
"""Steps between two reports: none comes but the last of each turn."""


def main() -> None:
    """Let one worker and two take turns, and compare."""
    asked = arguments(__doc__)
    text = (files("pipelines.recipes") / "text.yaml").read_text(encoding="utf-8")
    config = parse_recipe(text, where="text")
    build_task(config, cache=cache(), base=Path())  # prepared once, before anybody waits for anybody
    turns, steps = (QUICK_TURNS, QUICK_STEPS) if asked.quick else (TURNS, STEPS)
    cells: list[Mapping[str, Cell]] = []
    figures: list[Figure] = []
    for times in (1,) if asked.quick else TIMES:
        training = config.training.model_copy(update={"rows": config.training.rows * times})
        found = _measured(config.model_copy(update={"training": training}), turns, max(2, steps // times))
        cells += found.cells
        figures += found.figures if times == 1 else []
        if times > 1:
            goal = ">= 1.8 on two idle cores"
            figures.append(Figure(f"two_workers_over_one_{training.rows}_rows", found.figures[0].value, goal))
    report("scaling", cells, figures, asked.json, quick=asked.quick)


class _Found(NamedTuple):
    """What was measured at one number of rows a step."""

    cells: list[Mapping[str, Cell]]
    figures: list[Figure]


def _measured(config: RunConfig, turns: int, steps: int) -> _Found:
    with tempfile.TemporaryDirectory() as folder:
        run_together(_worker, Path(folder), told=(config.model_dump_json(), turns, steps))
        seconds = json.loads((Path(folder) / _SECONDS).read_text(encoding="utf-8"))
    assert config.data.kind == "text"
    rows = config.training.rows
    tokens = steps * rows * config.data.length
    one, two, ddp, bound = (seconds[name] for name in _TURNS)
    ratios = [alone / both for alone, both in zip(one, two, strict=True)]
    cells: list[Mapping[str, Cell]] = []
    for name, each in seconds.items():
        over = [alone / own for alone, own in zip(one, each, strict=True)]
        rate = round(tokens / statistics.median(each))
        said = {"over_one": statistics.median(over), "least": min(over), "most": max(over), "turns": turns}
        cells.append({"rows_a_step": rows, "workers": name, "tokens_per_second": rate, **said})
    overlapped = statistics.median(both / during for both, during in zip(two, ddp, strict=True))
    figures = [
        Figure("two_workers_over_one", statistics.median(ratios), ">= 1.8 on two idle cores"),
        Figure(
            "without_exchange_over_one",
            statistics.median(alone / both for alone, both in zip(one, bound, strict=True)),
            "what the machine allows",
        ),
        Figure("ddp_over_replicate", overlapped, "the default is the faster one where this is below 1"),
    ]
    return _Found(cells, figures)


class _Silent(Group):
    """Two workers that share out rows and keep what they find to themselves."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors as they are."""


def _worker(rank: int, folder: Path, recipe: str, turns: int, steps: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    config = RunConfig.model_validate_json(recipe)
    task = build_task(config, cache=cache(), base=Path())
    worlds: tuple[World, ...] = (Solo(), Group(), Group(Ddp(kind="ddp")), _Silent())
    contestants = [Contestant(SplitModel(task.build(), task.categories), config.training) for _ in worlds]
    # A run has evaluated before it trains. What a process once held it need not ask the system for at every step.
    row_losses(contestants[0].model, task, Solo(), config.evaluation, "validation")

    def turn(contestant: Contestant, world: World) -> float:
        dist.barrier()
        contestant.step = 0  # the same rows each time
        began = time.perf_counter()
        train(contestant, task, world, config.training, steps, _NEVER, lambda *_: None)
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {name: [] for name in _TURNS}
    for number in range(turns + 1):
        for name, contestant, world in zip(_TURNS, contestants, worlds, strict=True):
            if rank < world.size:
                taken = turn(contestant, world)
                seconds[name] += [taken] if number else []  # the first turn warms up
            else:
                dist.barrier()
    if rank == 0:
        (folder / _SECONDS).write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
