"""What the machinery costs: the whole pipeline's wall time over a bare loop's, and the memory of all its processes.

The pipeline is ``moeify run`` in a process of its own: Ray, MLflow, checkpoints, attribution, cuts, evaluation, report.
The bare loop trains the same arms for the same steps on the same rows with the same partitions (read from the
pipeline's run), in as many processes with as many threads, and does nothing else; its time starts when the data is
ready and the networks are built. Memory is the proportional set size of the driver and everything below it, sampled
every half second.

The full benchmark scales the shipped text recipe's steps so that the pipeline takes more than five minutes, and takes
about a quarter of an hour; --quick runs the digits recipe.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from benchmarks.gloo import run_together
from benchmarks.report import Figure, arguments, report
from moeify.recipe.config import RunConfig
from moeify.recipe.load import parse_recipe, to_yaml
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.tasks.build import build_task
from moeify.training import Contestant, learning_rate
from pipelines.runs import cache, every

_SECONDS = "seconds"
STRETCH = 1.6
"""How much longer than the shipped recipe the full benchmark's run is."""


@dataclass(frozen=True)
class Measured:
    """One run of the pipeline."""

    seconds: float
    peak_gb: float
    """10^9 bytes, proportional set size of all processes together."""
    folder: Path


def main() -> None:
    """Run the pipeline, then the bare loop, and compare."""
    asked = arguments(__doc__)
    name = "digits" if asked.quick else "text"
    text = (files("pipelines.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    config = parse_recipe(text, where=name)
    rows = []
    with tempfile.TemporaryDirectory() as home:
        if not asked.quick:
            shipped = _pipeline(config, Path(home) / "shipped")
            rows.append(_row("pipeline, as shipped", shipped.seconds, shipped.peak_gb))
            config = _stretched(config)
        piped = _pipeline(config, Path(home) / "measured")
        bare = _bare(config, piped.folder)
        result = json.loads((piped.folder / "result.json").read_text(encoding="utf-8"))
        rows += [_row("pipeline", piped.seconds, piped.peak_gb), _row("bare loop", bare, None)]
        rows.append(_row("of the pipeline: inside the loop", result["seconds"], None))
    figures = [
        Figure("pipeline_over_bare", piped.seconds / bare, "<= 1.15 on a run of five minutes or more"),
        Figure("peak_gb", max(row["peak_gb"] for row in rows if isinstance(row["peak_gb"], float)), "<= 4"),
    ]
    report("overhead", rows, figures, asked.json, quick=asked.quick)


def _row(what: str, seconds: float, peak_gb: float | None) -> dict[str, str | float | None]:
    return {"what": what, "seconds": seconds, "peak_gb": peak_gb}


def _stretched(config: RunConfig) -> RunConfig:
    data = config.model_dump(mode="json")
    data["training"]["steps"] = round(data["training"]["steps"] * STRETCH)
    for round_ in data["rounds"]:
        round_["train"], round_["recover"] = (round(round_[part] * STRETCH) for part in ("train", "recover"))
    return RunConfig.model_validate(data)


def _pipeline(config: RunConfig, home: Path) -> Measured:
    home.mkdir()
    recipe = home / "recipe.yaml"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    environment = {**os.environ, "MOEIFY_HOME": str(home / "runs")}
    began, peak = time.perf_counter(), 0
    process = psutil.Popen(
        [sys.executable, "-m", "pipelines", "run", str(recipe), "--quiet"], env=environment, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, _memory(process))
        time.sleep(0.5)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"the pipeline ended with exit code {process.returncode}")
    return Measured(seconds, peak / 1e9, every(home / "runs")[0].path)


def _memory(process: psutil.Process) -> int:
    total = 0
    try:
        everyone = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in everyone:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _bare(config: RunConfig, run: Path) -> float:
    """Return the seconds of the bare loop."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = config.cluster
        told = config.model_dump_json(), run
        run_together(_bare_worker, Path(folder), cluster.workers, told=told, threads=cluster.threads)
        return float((Path(folder) / _SECONDS).read_text(encoding="utf-8"))


def _bare_worker(rank: int, folder: Path, recipe: str, run: Path) -> None:
    config = RunConfig.model_validate_json(recipe)
    size = config.cluster.workers
    task = build_task(config, cache=cache(), base=run)
    models = {
        arm: SplitModel(task.build(), task.categories, told=arm == "told", kinds=config.partition.units)
        for arm in config.arms
    }
    contestants = {arm: Contestant(model, config.training) for arm, model in models.items()}
    dist.barrier()
    began = time.perf_counter()
    for arm, contestant in contestants.items():
        cuts = _cuts(config, run) if arm in config.cut_arms else {}
        for step in range(min(cuts, default=0), config.training.steps):
            if step in cuts:
                contestant.model.repartition(cuts[step])
            rows = task.train_batch(step)
            batch = rows.take(contestant.model.order(rows.categories)).shard(rank, size)
            nats = task.nats(contestant.model(batch.inputs, batch.categories), batch.targets)
            (nats.sum() / (len(rows.categories) * task.units_per_row)).backward()
            parameters = [p for p in contestant.model.parameters() if p.grad is not None]
            if size > 1:
                flat = torch.cat([p.grad.view(-1) for p in parameters if p.grad is not None])
                dist.all_reduce(flat)
                for p, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    p.grad = total.view_as(p)
            torch.nn.utils.clip_grad_norm_(parameters, config.training.clip)
            for group in contestant.optimizer.param_groups:
                group["lr"] = learning_rate(config.training, step)
            contestant.optimizer.step()
            contestant.optimizer.zero_grad(set_to_none=True)
    dist.barrier()
    if rank == 0:
        (folder / _SECONDS).write_text(str(time.perf_counter() - began), encoding="utf-8")


def _cuts(config: RunConfig, run: Path) -> dict[int, Partition]:
    """Return step -> the partition that the pipeline's run cut at that step."""
    cuts, step = {}, 0
    for number, round_ in enumerate(config.rounds, start=1):
        step += round_.train
        content = (run / "rounds" / str(number) / "partition.json").read_text(encoding="utf-8")
        cuts[step] = Partition.from_json(json.loads(content))
        step += round_.recover
    return cuts


if __name__ == "__main__":
    main()
