"""Which score to trust: every method against exact ablation, and against the loss after a cut and a short retraining.

Two questions, two tables. Single units and sets of half a site's units, site by site, against exact ablation. And whole
partitions (every category keeps a core, a third of all units, and its own expert), as the partitioner cuts them by one
score or another, more or less blurred with chance, with equal, best or random widths over sites, and compensated: what
a method or J predicts from the network before the cut, against the held-out loss after some steps of retraining
(``benchmarks.partitions``).

Four networks (see ``benchmarks.studies``), three seeds each; intervals are Student's t over seeds, those of the sites
(in the JSON's ``details``) bootstrap over the first seed's items; the random control is in every table. What was found
of a network and seed is kept in ``--work`` and not asked again while code and arguments stay the same: a run that was
stopped goes on, and two may share the work. The full benchmark takes about an hour of one core; ``--quick`` one small
network and seed; ``--study`` one network of the four; ``--part`` one of the two questions.
"""

import hashlib
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy
import torch
import transformers
from pydantic import TypeAdapter

from attribution.ablation import Value
from attribution.agreement import ESTIMATES, EVERY, Comparison, Items, compare
from attribution.methods import Method
from attribution.sites import Site
from benchmarks.partitions import Cuts, Effort, compare_cuts, correlations
from benchmarks.report import Cell, Figure, parser, report
from benchmarks.studies import STUDIES, Study
from moeify.comparison import mean_interval
from moeify.data.root import NoDataError
from moeify.jobs import code
from moeify.kept_results import KeptResults
from pipelines.runs import cache

MEASURED = "(loss at once)"
"""Beside the methods: the held-out loss right after the cut, measured and not foreseen."""
Part = TypeVar("Part")
SLOW = ("conductance", "influence", "integrated")
PARTS = ("units", "partitions")


@dataclass(frozen=True)
class Size:
    """How much is tried."""

    rows: int
    """Of each category, for scores and ablation."""
    sets: int
    values: tuple[Value, ...]
    cuts: Effort


FULL = Size(4, 32, ("zero", "mean"), Effort(32, 60))
QUICK = Size(2, 8, ("zero",), Effort(6, 2))


@dataclass(frozen=True)
class Found:
    """What came of one network and seed."""

    units: dict[str, Comparison]
    """By kind of unit; none where they were not asked for."""
    cuts: Cuts | None
    """None for a network whose partitions are not tried, or not asked for."""


def main() -> None:
    """Run both comparisons on every network and seed that has no result yet, then print the tables."""
    asks = parser(__doc__)
    asks.add_argument("--study", choices=list(STUDIES), help="this network alone")
    asks.add_argument("--part", choices=PARTS, help="this half alone: single units and sets, or whole partitions")
    asks.add_argument("--work", type=Path, default=cache() / "agreement", help="what was found, by network and seed")
    asked = asks.parse_args()
    seeds, names = (range(1), ["text"]) if asked.quick else (range(3), list(STUDIES))
    names = [asked.study] if asked.study else names
    parts = (asked.part,) if asked.part else PARTS
    with tempfile.TemporaryDirectory() as nowhere:
        kept = KeptResults(Path(nowhere) if asked.quick else asked.work.absolute())
        found: dict[str, list[Found]] = {}
        for name, seed in product(names, seeds):
            try:
                each = known_or_found(kept, name, seed, QUICK if asked.quick else FULL, parts, quick=asked.quick)
            except NoDataError as error:
                _say(f"{name}: skipped, {error}")
                continue
            found.setdefault(name, []).append(each)
    rows = [*unit_rows(found), *cut_rows(found)]
    report("agreement", rows, figures(found), asked.json, quick=asked.quick, details=site_rows(found))


def known_or_found(
    kept: KeptResults, name: str, seed: int, size: Size, parts: Sequence[str] = PARTS, *, quick: bool
) -> Found:
    """Return what was found of a network and seed before, or find it and keep it, each of the two parts by itself."""
    study = lru_cache(lambda: STUDIES[name](seed, size.rows, quick))
    methods = {k: v for k, v in ESTIMATES.items() if not (quick and k in SLOW)}
    mark = fingerprint(name, seed, size, quick=quick)
    file = f"{name}-{seed}-{{}}-{mark}.json"
    units: dict[str, Comparison] = {}
    if "units" in parts:
        units = kept_or_found(
            kept, file.format("units"), dict[str, Comparison], lambda: find_units(study(), methods, size, seed)
        )
    cuts = None
    if "partitions" in parts and name != "cifar-jpeg":
        cuts = kept_or_found(
            kept, file.format("cuts"), Cuts, lambda: compare_cuts(study(), methods, size.cuts, seed, said=_say)
        )
    return Found(units, cuts)


def kept_or_found(kept: KeptResults, file: str, kind: type[Part], find: Callable[[], Part]) -> Part:
    """Return what a file holds; where there is none, find it and write it."""
    form = TypeAdapter(kind)
    if (content := kept.read(file)) is not None:
        _say(f"found before: {file}")
        return form.validate_python(json.loads(content))
    found = find()
    kept.write(file, (json.dumps(form.dump_python(found)) + "\n").encode())
    return found


def find_units(study: Study, methods: Mapping[str, Method], size: Size, seed: int) -> dict[str, Comparison]:
    """Hold all methods against exact ablation, by kind of unit."""
    found = {}
    for kind, sites in kinds(study.subject.sites).items():
        _say(f"{study.name}, seed {seed}: {kind}, exact ablation")
        part = replace(study.subject, sites=sites)
        draws = 0 if seed else 200  # Only the first seed's intervals are told: see ``site_rows``.
        found[kind] = compare(
            part, study.probe, methods, values=size.values, sets=size.sets, removed=0.5, draws=draws, seed=seed
        )
    return found


def fingerprint(name: str, seed: int, size: Size, *, quick: bool) -> str:
    """Return a hash of the code and the arguments that a finding depends on. Data and public weights are not in it."""
    versions = [sys.version, torch.__version__, np.__version__, scipy.__version__, transformers.__version__]
    content = json.dumps([_code(), *versions, torch.get_num_threads(), name, seed, quick, asdict(size)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@lru_cache
def _code() -> str:
    """Return a hash of the code as it is when first asked for: an update beneath a run is not what runs."""
    mine = [Path(__file__).with_name(f"{module}.py") for module in ("agreement", "partitions", "studies")]
    return code() + hashlib.sha256(b"".join(path.read_bytes() for path in mine)).hexdigest()


def kinds(sites: Sequence[Site]) -> dict[str, tuple[Site, ...]]:
    """Group sites by what their units are."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        kind = "heads" if site.name.endswith("heads") else "ffn" if site.name.endswith("ffn") else "channels"
        found.setdefault("hidden" if site.name == "hidden" else kind, []).append(site)
    return {kind: tuple(mine) for kind, mine in found.items()}


# --- what is said -------------------------------------------------------------------------------------------


def unit_rows(found: Mapping[str, Sequence[Found]]) -> list[dict[str, Cell]]:
    """Return a line for each network, kind of unit and method."""
    rows: list[dict[str, Cell]] = []
    for (name, kind), comparisons in by_kind(found).items():
        methods = list(dict.fromkeys(row.method for each in comparisons for row in each.rows))
        for method in methods:
            row: dict[str, Cell] = {"network": name, "what": kind, "method": method}
            asked: tuple[tuple[Items, Value], ...] = (
                ("units", "zero"),
                ("units", "mean"),
                ("sets", "zero"),
                ("sets", "mean"),
            )
            for of, value in asked:
                each = [comparison.mean(method, of, value) for comparison in comparisons]
                row[f"{of} {value} spearman"] = interval([e.spearman for e in each])
                if of == "units" and value == "zero":
                    row["top tenth"] = interval([e.overlap for e in each])
                if of == "sets" and value == "zero":
                    row["sets zero pearson"] = interval([e.pearson for e in each])
            pooled = [p for comparison in comparisons if (p := comparison.pooled(method, "zero"))]
            row["pooled spearman"] = interval([p.spearman.value for p in pooled])
            row["true / predicted"] = interval([p.slope.value for p in pooled if p.slope])
            row["cost"] = statistics.median(comparison.costs[method] for comparison in comparisons)
            rows.append(row)
    return rows


def by_kind(found: Mapping[str, Sequence[Found]]) -> dict[tuple[str, str], list[Comparison]]:
    """Return the comparisons of all seeds by network and kind of unit."""
    result: dict[tuple[str, str], list[Comparison]] = {}
    for name, seeds in found.items():
        for each in seeds:
            for kind, comparison in each.units.items():
                result.setdefault((name, kind), []).append(comparison)
    return result


def site_rows(found: Mapping[str, Sequence[Found]]) -> list[dict[str, Cell]]:
    """Return a line for each site: of every method the rank correlation (of sets: Pearson's) with zeroing.

    With 95 % bootstrap intervals over the units or sets of the first seed.
    """
    rows: dict[tuple[str, str, Items], dict[str, Cell]] = {}
    for (name, _), (first, *_) in by_kind(found).items():
        for row in first.rows:
            if row.value == "zero" and row.site != EVERY:
                start: dict[str, Cell] = {"network": name, "site": row.site, "of": row.of, "items": row.items}
                told = row.spearman if row.of == "units" else row.pearson
                rows.setdefault((name, row.site, row.of), start)[row.method] = str(told)
    return list(rows.values())


def cut_rows(found: Mapping[str, Sequence[Found]]) -> list[dict[str, Cell]]:
    """Return a line for each network and method: whole partitions."""
    rows: list[dict[str, Cell]] = []
    for name, seeds in found.items():
        cuts = [each.cuts for each in seeds if each.cuts]
        for method in (*cuts[0].predicted, MEASURED) if cuts else ():
            rows.append({"network": name, "what": "partitions", "method": method})
            foreseen = [c.immediate if method == MEASURED else c.predicted[method] for c in cuts]
            for label, third in (("", False), (" best third", True)):
                each = [correlations(p, c.retrained, third) for p, c in zip(foreseen, cuts, strict=True)]
                rows[-1][f"retrained pearson{label}"] = interval([p for p, _ in each])
                rows[-1][f"retrained spearman{label}"] = interval([s for _, s in each])
            at_once = [correlations(p, c.immediate, False)[0] for p, c in zip(foreseen, cuts, strict=True)]
            rows[-1]["at once pearson"] = interval(at_once)
    return rows


def interval(values: Sequence[float]) -> str | None:
    """Return a mean over seeds with half of its 95 % interval."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    mean, half = mean_interval(known)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ±{half:.3f}"


def figures(found: Mapping[str, Sequence[Found]]) -> list[Figure]:
    """Return the headlines: the means over networks and seeds.

    ``spearman_unit`` is that of what ``moeify attribute`` shows: the loss at linear outputs where a network has few,
    otherwise eight draws of signed Taylor + 1/2 Fisher, which ``parabola`` has everywhere; ``labels``: the same from
    labels drawn from the model.
    """
    result = []
    comparisons = [comparison for each in by_kind(found).values() for comparison in each]
    for name, methods in (
        ("spearman_unit", ("linear", "report8")),
        ("spearman_unit_parabola", ("report8",)),
        ("spearman_unit_one_draw", ("report",)),
        ("spearman_unit_labels", ("report8 sampled",)),
        ("spearman_unit_labels_one_draw", ("report sampled",)),
        ("spearman_unit_random", ("random",)),
    ):
        told = [[p for method in methods if (p := each.pooled(method, "zero"))] for each in comparisons]
        if all(told) and told:
            mean = statistics.mean(first.spearman.value for first, *_ in told)
            result.append(Figure(name, mean, ">= .95" if name == "spearman_unit" else "for comparison"))
    cuts = [each.cuts for seeds in found.values() for each in seeds if each.cuts]
    for name, third in (("pearson_sets", False), ("pearson_sets_best_third", True)):
        each = [correlations(c.predicted["J"], c.retrained, third)[0] for c in cuts]
        if each:
            result.append(Figure(name, statistics.mean(each), ">= .95" if not third else "> 0"))
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
