"""What routing by itself costs a stock mixture of experts, before and after the network learned with its routers.

A recipe is run on several seeds, the dense twin and the split model alone. Then the split model routes by routers
inside of its blocks (``moeify.routers.by_layer``, what ``moeify export --moe`` writes): by those that are distilled
from it as it is, and after so many steps in which both learn together (``moeify.routers.joint``, ``--joint``), to which
the dense twin is then trained as well. Test losses, nats per token, means over categories and seeds with 95 % intervals
(Student's t). router tax: of its own routers above labels, after the same training; over dense: above the dense twin,
which had as many tokens. All runs in one process, one after the other; those that have ended are kept in ``--work``.

About twenty minutes on one thread; ``--quick`` runs a few steps of one seed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.kept_runs import WORK, KeptRun, kept_run
from benchmarks.report import Cell, Figure, parser, report
from moeify.comparison import Interval, mean_interval
from moeify.result import MEAN
from moeify.routers.by_layer import Distil
from moeify.routers.joint import Joint
from moeify.split_folder import load_from_run
from pipelines.find_recipe import shipped

STEPS = (0, 64, 256)
"""Of the joint phase."""
Losses = Mapping[str, float]
"""``label`` (routed by label), ``router`` (by its own routers) and ``dense`` (the dense twin): mean test losses."""


def main() -> None:
    """Run, train routers, and compare."""
    asks = parser(__doc__)
    asks.add_argument("--recipe", choices=shipped(), default="text", help="of text in categories")
    asks.add_argument("--seeds", type=int, default=3)
    asks.add_argument("--steps", type=int, nargs="+", default=list(STEPS), metavar="N", help="of the joint phase")
    asks.add_argument("--work", type=Path, default=WORK, help="runs that have ended")
    asked = asks.parse_args()
    seeds, numbers = (1, [0, 4]) if asked.quick else (asked.seeds, asked.steps)
    found: dict[int, list[Losses]] = {number: [] for number in numbers}
    for seed in range(seeds):
        kept = kept_run(asked.recipe, seed, asked.work, quick=asked.quick)
        for number, each in found.items():
            each.append(_losses(kept, number))
    rows = [_row(number, each) for number, each in found.items()]
    last = found[max(found)]
    figures = [
        Figure("router_tax", mean_interval(_taxes(last)).mean, "<= .005, after the most joint steps"),
        Figure("over_dense", mean_interval(_over(last)).mean, "<= 0, nats per token"),
    ]
    report("mixture", rows, figures, asked.json, quick=asked.quick)


def _losses(kept: KeptRun, steps: int) -> Losses:
    """Return the losses of a run's models after so many joint steps."""
    split, dense = load_from_run(kept.folder), load_from_run(kept.folder, "dense")
    distil = Distil(kept.task, kept.config)
    joined = Joint(kept.task, kept.config, steps)(split, dense) if steps else None
    report = distil(split, joined.routers if joined else None).report
    return {"label": report.label[MEAN], "router": report.router[MEAN], "dense": distil.losses(dense, None)[MEAN]}


def _row(steps: int, each: Sequence[Losses]) -> dict[str, Cell]:
    found = {name: mean_interval([losses[name] for losses in each]) for name in each[0]}
    return {
        "joint steps": steps,
        **{name: f"{interval.mean:.4f} ±{interval.half:.4f}" for name, interval in found.items()},
        "router tax": _shown(mean_interval(_taxes(each)), ".2%"),
        "over dense": _shown(mean_interval(_over(each)), ".4f"),
    }


def _taxes(each: Sequence[Losses]) -> list[float]:
    return [losses["router"] / losses["label"] - 1.0 for losses in each]


def _over(each: Sequence[Losses]) -> list[float]:
    return [losses["router"] - losses["dense"] for losses in each]


def _shown(interval: Interval, form: str) -> str:
    return f"{interval.mean:+{form}} ±{interval.half:{form}}"


if __name__ == "__main__":
    main()
