"""Runs of a recipe's dense twin and split model that benchmarks of routers share: each is made once, and kept, until
recipe, data or code are others."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe
from moeify.store import FolderStore
from moeify.task import Task
from moeify.tasks.build import build_task
from moeify.twin_cache import fingerprint
from moeify.world import Solo
from pipelines.find_recipe import find_recipe
from pipelines.runs import cache

WORK = cache() / "kept-runs"


class KeptRun(NamedTuple):
    """A finished run."""

    config: RunConfig
    task: Task
    folder: Path


def kept_run(recipe: str, seed: int, work: Path = WORK, *, quick: bool = False) -> KeptRun:
    """Return a run of a recipe without controls, made here where ``work`` has none; ``quick``: a few steps."""
    text, where, _ = find_recipe(recipe)
    config = parse_recipe(text, where=where).model_copy(update={"seed": seed, "controls": ()})
    if quick:
        rounds = tuple(round_.model_copy(update={"train": 2, "recover": 1}) for round_ in config.rounds)
        few = config.evaluation.model_copy(update={"validation_rows": 8, "test_rows": 8})
        training = config.training.model_copy(update={"steps": 8})
        config = config.model_copy(update={"rounds": rounds, "training": training, "evaluation": few})
    task = build_task(config, cache=cache(), base=Path())
    content = f"{config.model_dump_json()} {fingerprint(config, task, Solo())}"
    folder = work / f"{config.name}-{seed}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    run(config, task, store=FolderStore(folder, 1))
    return KeptRun(config, task, folder)
