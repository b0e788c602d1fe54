"""What it costs a split model in this package's runtime that nobody labels its text: routers of ``moeify route``.

A recipe is run on several seeds, the dense twin and the split model alone; then a router of each kind is trained, its
threshold chosen on validation data, and measured on test data. ``token``: over whole rows, first tokens too, of which
nobody can know much, and over what comes after the first quarter of each row; ``document``: over the latter, since the
first quarter is what it decides by. Means over seeds with 95 % intervals (Student's t). router tax: above routing by
label; over dense: above the dense twin, nats per token, the comparison that counts without labels. Runs that have ended
are kept in ``--work``.

About a quarter of an hour on one thread; ``--quick`` runs a few steps of one seed.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.kept_runs import WORK, KeptRun, kept_run
from benchmarks.report import Cell, Figure, parser, report
from moeify.comparison import Interval, mean_interval
from moeify.result import MEAN
from moeify.routers.report import Compared, RouterReport
from moeify.routers.router import Kind
from moeify.routers.training import route
from moeify.split_folder import load_from_run
from pipelines.find_recipe import shipped

KINDS: tuple[Kind, ...] = ("token", "document")


def main() -> None:
    """Run, train routers, and compare."""
    asks = parser(__doc__)
    asks.add_argument("--recipe", choices=shipped(), default="text", help="of text in categories")
    asks.add_argument("--seeds", type=int, default=3)
    asks.add_argument("--work", type=Path, default=WORK, help="runs that have ended")
    asked = asks.parse_args()
    runs = [
        kept_run(asked.recipe, seed, asked.work, quick=asked.quick) for seed in range(1 if asked.quick else asked.seeds)
    ]
    found = {kind: [_report(kept, kind) for kept in runs] for kind in KINDS}
    whole = [_of(each.whole) for each in found["token"]]
    later = {kind: [_of(each.later) for each in found[kind]] for kind in KINDS}
    rows = [
        _row("token", "whole rows", found["token"], whole),
        *(_row(kind, "after a quarter", found[kind], later[kind]) for kind in KINDS),
    ]
    figures = [
        *(Figure(f"{kind}_router_tax", _tax(later[kind]), "<= .005, after a quarter") for kind in KINDS),
        Figure("token_router_tax_whole", _tax(whole), "<= .005, first tokens too"),
        Figure(
            "over_dense",
            mean_interval([each.over_dense[MEAN] for each in whole]).mean,
            "<= 0, nats per token, by token, whole rows",
        ),
    ]
    report("routing", rows, figures, asked.json, quick=asked.quick)


def _report(kept: KeptRun, kind: Kind) -> RouterReport:
    dense = load_from_run(kept.folder, "dense")
    return route(load_from_run(kept.folder), {"dense": dense}, kept.task, kept.config, kind)[1]


def _of(compared: Compared | None) -> Compared:
    assert compared is not None
    return compared


def _tax(each: Sequence[Compared]) -> float:
    return mean_interval([compared.router_tax[MEAN] for compared in each]).mean


def _row(kind: Kind, tokens: str, reports: Sequence[RouterReport], compared: Sequence[Compared]) -> dict[str, Cell]:
    def shown(values: Sequence[float], form: str) -> str:
        interval: Interval = mean_interval(values)
        return f"{interval.mean:{form}} ±{interval.half:{form.lstrip('+')}}"

    return {
        "router": kind,
        "tokens": tokens,
        "right": shown([each.accuracy for each in reports], ".1%"),
        "calibration error": shown([each.calibration_error for each in reports], ".1%"),
        "two experts": shown([each.asked for each in reports], ".1%"),
        "router tax": shown([each.router_tax[MEAN] for each in compared], "+.2%"),
        "over dense": shown([each.over_dense[MEAN] for each in compared], "+.4f"),
    }


if __name__ == "__main__":
    main()
