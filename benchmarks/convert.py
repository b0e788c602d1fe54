"""An existing checkpoint made into a split model: quality kept against the share of the FFN that is active, by method.

``own`` (the default, needs no data): a dense Llama that this benchmark trains on installed text first, saves as
``transformers`` does, and splits by the same four categories. ``stories260K``: a public Llama of 260,032 parameters
below MOEIFY_DATA, on clusters of its own stories. Every method cuts the same checkpoint and recovers on the same rows
and from the same teacher, the checkpoint as loaded, its residual stream too; so does the dense twin, the checkpoint
equally retrained. ``kept`` is the dense twin's test loss over the split model's, ``perplexity kept`` the ratio of
perplexities, ``gap`` the difference in nats (of what is taught in another way: to the dense twin that is, too), means
over seeds with 95 % intervals (Student's t). Runs are Ray tasks, as many at a time as there are cores; those that have
ended are kept in ``--work``. An hour on two cores; ``--quick`` makes a tiny checkpoint and one cut.
"""

import argparse
import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.frontier import run, signed
from benchmarks.report import Cell, Figure, parser, report
from moeify.comparison import DENSE, LOOP, Job, Row, jobs
from moeify.data.root import data_file, data_root
from moeify.evaluation import row_losses
from moeify.recipe.config import RunConfig
from moeify.recipe.training import Distillation
from moeify.routed.split_model import SplitModel
from moeify.tasks.build import build_task
from moeify.training import Contestant, train
from moeify.world import Solo
from pipelines.runs import cache

LIGHT, DEEP = 0.25, 0.66
"""Separations of the headline figures: 75 % and 34 % of the FFN units active."""
METHODS = ("random", "moefication", "cmoe", "coactivation", "magnitude", "learned")
ABLATIONS = ("uncompensated", "following", "refined", "equal_widths")
EVERY = (*METHODS, *ABLATIONS)
TAUGHT: dict[str, Distillation | None] = {", logits only": Distillation(), ", not distilled": None}
"""Other ways to teach the loop, and the dense twin that its gap is to."""
PLAIN = "random, plain"
"""Random owners at equal widths in every layer, without compensation: ``random`` has the recipe's of both."""
TEXT: dict[str, Any] = {
    "kind": "text",
    "source": {"kind": "installed", "sources": ["python", "prose", "c", "web"]},
    "length": 128,
}
CHECKPOINTS = ("own", "stories260K")


def main() -> None:
    """Make what is missing of the checkpoint and the runs, then print the table."""
    asks = parser(__doc__)
    asks.add_argument("--checkpoint", choices=CHECKPOINTS, default="own")
    asks.add_argument("--methods", nargs="+", choices=EVERY, default=list(EVERY), metavar="METHOD")
    asks.add_argument("--separations", nargs="+", type=float, default=[LIGHT, DEEP], metavar="FRACTION")
    asks.add_argument("--seeds", type=int, default=2, help="of the rows' order and of owners that are drawn")
    asks.add_argument("--work", type=Path, default=cache() / "convert", help="checkpoint, finished runs, shared twins")
    asked = asks.parse_args()
    if asked.quick:
        with tempfile.TemporaryDirectory() as work:
            measured(asked, own(Path(work), quick=True), ["random"], [LIGHT], 1, Path(work))
    else:
        config = own(asked.work, quick=False) if asked.checkpoint == "own" else stories()
        measured(asked, config, asked.methods, asked.separations, asked.seeds, asked.work)


def measured(
    asked: argparse.Namespace,
    config: RunConfig,
    methods: Sequence[str],
    separations: Sequence[float],
    seeds: int,
    work: Path,
) -> None:
    """Run every method and report."""
    found = run(config, jobs(methods, separations, range(seeds)), work)
    if not asked.quick:
        each = [(separation, seed) for separation in separations for seed in range(seeds)]
        partition = config.partition.model_copy(update={"budget": "equal", "compensation": None})
        plain = config.model_copy(update={"partition": partition})
        found += [
            replace(row, method=PLAIN)
            for row in run(plain, [Job("random", *at) for at in each], work)
            if row.method == "random"
        ]
        for way, teacher in TAUGHT.items():
            taught = config.model_copy(update={"distillation": teacher})
            found += [
                replace(row, method=row.method + way)
                for row in run(taught, [Job(LOOP, *at) for at in each], work)
                if row.method in (LOOP, DENSE)
            ]
    rows = [cells(asked.checkpoint, row) for row in sorted(found, key=lambda row: row.separation)]
    rows = [as_loaded(asked.checkpoint, config), *rows]
    report("convert", rows, list(figures(found, asked.checkpoint)), asked.json, quick=asked.quick)


# --- checkpoints ------------------------------------------------------------------------------------------


def own(work: Path, *, quick: bool) -> RunConfig:
    """Return the recipe that splits a dense Llama of our own, which is trained first where it is not there yet."""
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "ffn": 64} if quick else {"hidden": 64, "layers": 4, "ffn": 384}
    dense = recipe({"kind": "llama", **sizes}, TEXT, steps=20 if quick else 800, learning_rate=3e-3, distillation=None)
    learned = dense.model_dump_json(include={"seed", "data", "model", "training"})
    known = hashlib.sha256(learned.encode()).hexdigest()[:12]
    folder = work.absolute() / f"dense-{known}"
    if not folder.is_dir():
        save_dense(dense, folder)
    return recipe({"kind": "pretrained", "path": str(folder)}, TEXT, steps=12 if quick else 100)


def save_dense(config: RunConfig, folder: Path) -> None:
    """Train the recipe's dense network, never cut, and save it with its tokenizer as ``transformers`` does."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"training a dense Llama for {config.training.steps:,} steps ...", flush=True)
    task = build_task(config, cache=cache(), base=Path.cwd())
    contestant = Contestant(SplitModel(task.build(), task.categories), config.training)
    steps = config.training.steps
    train(contestant, task, Solo(), config.training, steps, steps, lambda *_: None)
    network: Any = task.build()
    network.load_state_dict(contestant.model.network.state_dict())
    draft = folder.with_suffix(".draft")
    network.save_pretrained(draft)
    for name, content in task.assets().items():
        (draft / name).write_bytes(content)
    draft.rename(folder)


def stories() -> RunConfig:
    """Return the recipe that splits stories260K by clusters of stories: no labels there part what it reads apart."""
    root = data_root(None, Path.cwd())
    data_file(root, "stories260K-hf/config.json", what="stories260K as transformers saves it")
    texts = data_file(root, "text-tinystories/tinystories-mini.jsonl.xz", what="TinyStories")
    source = {"kind": "jsonl", "path": str(texts.absolute()), "category": None}
    data = {"kind": "text", "source": source, "discover": {"number": 4}, "length": 128, "test": 0.2}
    return recipe({"kind": "pretrained", "path": str((root / "stories260K-hf").absolute())}, data, steps=100)


def recipe(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    steps: int,
    learning_rate: float = 4e-3,
    distillation: Mapping[str, Any] | None = {"stream": 3.0},
) -> RunConfig:
    """Return the recipe, as ``moeify split`` writes it but for its sizes: one cut, before the first step."""
    return RunConfig.model_validate_json(
        json.dumps(
            {
                "name": "convert",
                "data": data,
                "model": model,
                "training": {"steps": steps, "rows": 16, "learning_rate": learning_rate},
                "attribution": {"rows": 64, "rows_at_once": 16},
                "partition": {"multiple": 4, "min_units": 4, "min_core": 0.0},
                "rounds": [{"train": 0, "recover": steps, "branching": 4, "separation": 0.5}],
                "distillation": distillation,
                "evaluation": {"validation_rows": 32, "test_rows": 128},
            }
        )
    )


# --- the table --------------------------------------------------------------------------------------------


def as_loaded(checkpoint: str, config: RunConfig) -> Mapping[str, Cell]:
    """Return the row of the checkpoint before any retraining."""
    task = build_task(config, cache=cache(), base=Path.cwd())
    model = SplitModel(task.build(), task.categories)
    loss = row_losses(model, task, Solo(), config.evaluation, "test").by_category(task)
    nothing = dict.fromkeys(("kept", "perplexity kept", "gap", "gap, told twin", "above the loop"))
    mean = statistics.fmean(loss.values())
    return {
        "checkpoint": checkpoint,
        "FFN active": "100.0%",
        "method": "as loaded",
        "seeds": 1,
        "loss": mean,
        **nothing,
    }


def cells(checkpoint: str, row: Row) -> Mapping[str, Cell]:
    """Return a row of the printed table: means over seeds, gaps with their intervals."""
    return {
        "checkpoint": checkpoint,
        "FFN active": f"{row.active.mean:.1%}",
        "method": row.method,
        "seeds": row.seeds,
        "loss": row.loss.mean,
        "kept": f"{kept(row):.2%}" if row.tax else None,
        "perplexity kept": f"{math.exp(-row.tax.mean):.2%}" if row.tax else None,
        "gap": signed(row.tax),
        "gap, told twin": signed(row.tax_told),
        "above the loop": signed(row.above_loop),
    }


def kept(row: Row) -> float:
    """Return the dense twin's loss over the row's, both the means of the same seeds."""
    assert row.tax, "every seed has its dense twin"
    return (row.loss.mean - row.tax.mean) / row.loss.mean


def figures(found: Sequence[Row], checkpoint: str) -> Iterator[Figure]:
    """Yield the headlines of a checkpoint; none where their separation was not run."""
    at = {(row.method, row.separation): row for row in found}
    mark = "" if checkpoint == CHECKPOINTS[0] else f"{checkpoint}_"
    if light := at.get((LOOP, LIGHT)):
        yield Figure(f"{mark}kept_at_75_percent", kept(light), ">= 0.92, of the dense loss")
    if deep := at.get((LOOP, DEEP)):
        assert deep.tax, "every seed has its dense twin"
        yield Figure(f"{mark}gap_at_34_percent", deep.tax.mean, "nats, <= a quarter of random's")
        for method in ("random", PLAIN):
            random = at.get((method, DEEP))
            if random and random.tax and random.tax.mean > 0:
                name = method.replace(", ", "_")
                yield Figure(f"{mark}gap_over_{name}_at_34_percent", deep.tax.mean / random.tax.mean, "<= 0.25")


if __name__ == "__main__":
    main()
