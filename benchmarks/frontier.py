"""What separation costs, by method: the loop against one-shot, fixed-at-init and every other way to find owners.

The shipped recipes (``text``, and ``digits`` with ``--recipe digits``) at several separations, each method and seed a
run of equal tokens; a seed's runs share their twins. Tax is on test data, above the dense twin and above the told twin;
gaps are each rival's loss less the loop's, paired by seed; 95 % intervals (Student's t over seeds). Finished runs are
kept in ``--work`` and not run again. Text takes hours on two cores: a loop some ten minutes of one core, a rival three.
``--quick`` shortens the digits to two seeds and one separation.
"""

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path

from benchmarks.report import Cell, Figure, mean_interval, parser, report
from moeify.arms import Arm
from moeify.config import RunConfig
from moeify.recipe import parse_recipe
from moeify.result import Result
from moeify.variants import methods, scaled, variant
from pipelines.runs import cache

DEEP = 0.55
"""The separation of the headline figures: 45 % of the units active."""
SEPARATIONS = (0.4, DEEP, 0.65)
GAPS = {"oneshot": "gap_oneshot", "random": "gap_random", "init": "gap_init"}


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    separation: float
    seed: int


def main() -> None:
    """Run what is missing, then print the table."""
    asks = parser(__doc__)
    asks.add_argument("--recipe", choices=("text", "digits"), default="text")
    asks.add_argument("--methods", nargs="+", choices=methods(), default=list(methods()), metavar="METHOD")
    asks.add_argument("--separations", nargs="+", type=float, default=list(SEPARATIONS), metavar="FRACTION")
    asks.add_argument("--seeds", type=int, default=5)
    asks.add_argument("--work", type=Path, default=cache() / "frontier", help="finished runs and shared twins")
    asked = asks.parse_args()
    if asked.quick:
        with tempfile.TemporaryDirectory() as work:
            jobs = [Job(m, DEEP, seed) for m, seed in product(["loop", *GAPS], range(2))]
            found = run_all(quick(read("digits")), jobs, Path(work))
    else:
        chosen = ["loop", *(m for m in asked.methods if m != "loop")]
        jobs = [Job(m, s, seed) for s, m, seed in product(asked.separations, chosen, range(asked.seeds))]
        found = run_all(read(asked.recipe), jobs, asked.work)
    report("frontier", list(rows(found)), list(figures(found)), asked.json, quick=asked.quick)


def read(name: str) -> RunConfig:
    """Return a shipped recipe, one process a run."""
    text = files("pipelines.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    config = parse_recipe(text, where=f"recipe {name!r}")
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 1})})


def quick(config: RunConfig) -> RunConfig:
    """Return a recipe of a few seconds."""
    rounds = [r.model_copy(update={"train": r.train // 8, "recover": r.recover // 8}) for r in config.rounds]
    training = config.training.model_copy(update={"steps": config.training.steps // 8})
    return config.model_copy(update={"rounds": tuple(rounds), "training": training})


# --- running ----------------------------------------------------------------------------------------------


def run_all(config: RunConfig, jobs: Sequence[Job], work: Path) -> dict[Job, Result]:
    """Run the jobs, as many at a time as there are cores; each seed's loop first, since it trains both twins."""
    os.environ["OMP_NUM_THREADS"] = "1"
    first = {job.seed: job for job in reversed(jobs) if job.method == "loop"}
    later = [job for job in jobs if job not in first.values()]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found: dict[Job, Result] = {}
        for part in (list(first.values()), later):
            results = pool.map(run_job, *zip(*((recipe(config, job), work) for job in part), strict=True))
            found |= dict(zip(part, results, strict=True))
    return {job: found[job] for job in jobs}


def recipe(config: RunConfig, job: Job) -> RunConfig:
    """Return a job's recipe; the loop is the one that is held against the told twin."""
    seeded = scaled(config, job.separation).model_copy(update={"seed": job.seed, "controls": ()})
    names = config.category_names
    assert names is not None
    made = variant(seeded, job.method, len(names))
    return made.model_copy(update={"controls": ("told",)}) if job.method == "loop" else made


def run_job(config: RunConfig, work: Path) -> Result:
    """Run a recipe in this process, or return what it ended with before."""
    import torch

    from moeify.loop import run
    from moeify.tasks import build_task
    from moeify.twin_cache import fingerprint
    from moeify.world import Solo

    torch.set_num_threads(1)
    task = build_task(config, cache=cache(), base=Path.cwd())
    known = f"{config.model_dump_json()} {fingerprint(config, task, Solo())}"  # of code and data, too
    path = work / "results" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    result = run(config, task, twins=work / "twins")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(result.model_dump_json(indent=1), encoding="utf-8")
    draft.replace(path)
    return result


# --- the table --------------------------------------------------------------------------------------------


def rows(found: Mapping[Job, Result]) -> Iterator[dict[str, Cell]]:
    """Yield one row for each separation and method: means over seeds with their intervals."""
    for separation, method in dict.fromkeys((job.separation, job.method) for job in found):
        mine = {job.seed: found[job] for job in found if (job.separation, job.method) == (separation, method)}
        told = {seed: mean_loss(found[Job("loop", separation, seed)], "told") for seed in mine}
        active = mean_interval([r.active_fraction["mean"] for r in mine.values()])[0]
        gap = mean_interval(gaps(found, separation, method)) if method != "loop" else None
        yield {
            "active": f"{active:.1%}",
            "method": method,
            "seeds": len(mine),
            "loss": mean_interval([mean_loss(r, "split") for r in mine.values()])[0],
            "tax": signed(mean_interval([r.tax["mean"] for r in mine.values()])),
            "tax, told twin": signed(mean_interval([mean_loss(mine[seed], "split") - told[seed] for seed in mine])),
            "above the loop": signed(gap) if gap else None,
        }


def figures(found: Mapping[Job, Result]) -> Iterator[Figure]:
    """Yield the headlines, each with the ends of its interval; none where their separation was not run."""
    loops = [found[job] for job in found if (job.method, job.separation) == ("loop", DEEP)]
    if not loops:
        return
    told = [result.tax_told["mean"] for result in loops if result.tax_told]
    yield from ends("tax_at_45_percent", [result.tax["mean"] for result in loops], "<= 0")
    yield from ends("tax_told_at_45_percent", told, "<= 0")
    for method, name in GAPS.items():
        if rival := gaps(found, DEEP, method):
            yield from ends(name, rival, "> 0, its interval too")


def ends(name: str, values: Sequence[float], goal: str) -> Iterator[Figure]:
    """Yield a mean and the ends of its interval."""
    mean, half = mean_interval(values)
    yield Figure(name, mean, goal)
    yield Figure(f"{name}_low", mean - half, goal)
    yield Figure(f"{name}_high", mean + half, goal)


def gaps(found: Mapping[Job, Result], separation: float, method: str) -> list[float]:
    """Return a rival's test loss less the loop's, by seed; both have the same dense twin."""
    mine = [job for job in found if (job.separation, job.method) == (separation, method)]
    loops = [found[Job("loop", separation, job.seed)] for job in mine]
    return [mean_loss(found[job], "split") - mean_loss(loop, "split") for job, loop in zip(mine, loops, strict=True)]


def mean_loss(result: Result, arm: Arm) -> float:
    """Return an arm's mean test loss over categories."""
    losses = result.test_loss[arm].values()
    return sum(losses) / len(losses)


def signed(found: tuple[float, float]) -> str:
    """Return a mean and half of its interval."""
    return f"{found[0]:+.4f} ±{found[1]:.4f}"


if __name__ == "__main__":
    main()
