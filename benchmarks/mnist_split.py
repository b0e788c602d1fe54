"""The published arms of the split autoencoder (``moeify study mnist_split``), beside what was published of them.

Prints the test MSE of the certificate of 5-9. The published set-up, ``--published`` (6,000 steps of 2,048 rows,
784-2048-512-32), is for a GPU, which is used if there is one: a step is 130 GFLOP. Without it, 1,500 steps of 128 rows
of a 784-512-128-32 network, about a minute a run. Needs ``mnist`` in the folder that MOEIFY_DATA names; ``--quick``
does not: it takes a few steps on scikit-learn's digits. All arms, MAE, and intervals over seeds: the study.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from benchmarks.report import Cell, Figure, parser, report
from moeify.tasks.build import build_task
from pipelines.runs import cache
from pipelines.studies.mnist_split import PUBLISHED, arms
from pipelines.studies.study import Arm, Bench, Measures, Size, changed


def main() -> None:
    """Train every published arm with every seed and report what the certificate draws."""
    asked = arguments()
    size: Size = "quick" if asked.quick else "large" if asked.published else "full"
    rows: list[dict[str, Cell]] = []
    figures = []
    for arm in arms(size):
        if arm.name not in PUBLISHED:
            continue
        try:
            found = [_measured(arm, seed) for seed in range(asked.seeds)]
        except ValueError as error:
            raise SystemExit(f"mnist_split: skipped, {error}") from None
        mean = {name: statistics.mean(each[name] for each in found) for name in found[0]}
        rows.append({"arm": arm.name, **mean})
        name = arm.name.replace(", ", "_")
        for digits, measure, goal in zip(("0_4", "5_9"), ("mse_other", "mse_own"), PUBLISHED[arm.name], strict=True):
            figures.append(Figure(f"{name}_mse_{digits}", mean[measure], f"published {goal:.2f}"))
    report("mnist_split", rows, figures, asked.json, quick=asked.quick)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    made = parser(__doc__)
    made.add_argument("--seeds", type=int, default=1, help="runs of each arm (default: 1)")
    made.add_argument("--published", action="store_true", help="the published size")
    asked = made.parse_args()
    if asked.seeds < 1:
        made.error(f"--seeds: got {asked.seeds}, wanted 1 or more")
    return asked


def _measured(arm: Arm, seed: int) -> Measures:
    config, began = changed(arm.config, seed=seed), time.perf_counter()
    found = arm.work(Bench(config, build_task(config, cache=cache(), base=Path.cwd()), cache() / "twins"))
    print(f"seed {seed}, {arm.name}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
