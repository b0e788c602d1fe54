"""The page: every section's data put into the template, and the file written whole or not at all.

One file without anything to fetch: it opens from disk, and in the sandboxed frame that MLflow shows artifacts in. What
a run did not record, or has not come to yet, leaves its section out; so the page of a run that is under way, or from
before a figure was kept, is a shorter one.
"""

import hashlib
import os
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.result import MEAN
from pipelines.one_line import one_line, warn
from pipelines.report.affinity import affinities
from pipelines.report.boxes import looks, served
from pipelines.report.cost import costs, in_words
from pipelines.report.experts import expert_tree, removals
from pipelines.report.maps import FEW, maps_by_round, scale
from pipelines.report.ownership import ownership_by_round, ownership_by_site
from pipelines.report.portraits import portraits
from pipelines.report.recorded import Recorded
from pipelines.report.router import routing
from pipelines.report.verdict import headline
from pipelines.runs import RunFolder, Status
from pipelines.show import of_arm
from pipelines.versions import package_version
from pipelines.wording import STANDARD_ERRORS, clock, interval, nats, percent, two_digits

if TYPE_CHECKING:
    from jinja2 import Template

_MOST_AFFINITIES = 120
"""Categories up to which the affinities are a table."""
_MOST_NUMBERS = 24
"""Categories up to which the affinities' numbers stand in the table."""
_MOST_TIPS = 60
"""Categories up to which they are told where the pointer rests."""


def write(folder: RunFolder, out: Path | None = None, ended_as: Status | None = None) -> Path:
    """Write the run's report, to its folder unless told where, and return its path.

    Raises ValueError where the run's files are damaged, OSError where the report cannot be written.
    """
    path = out or folder.report
    page = build(folder, ended_as)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        draft.write_text(page, encoding="utf-8", errors="replace")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def write_or_warn(folder: RunFolder, ended_as: Status | None = None) -> None:
    """Write the report beside a run that goes on; whatever is wrong with it costs one line on stderr and no more."""
    try:
        write(folder, ended_as=ended_as)
    except Exception as error:  # a page is never worth a run
        what = one_line(error, kind=True)
        warn(f"the report of {folder.id} was not written ({what})")


def build(folder: RunFolder, ended_as: Status | None = None) -> str:
    """Return the report as HTML; see ``write``."""
    from pipelines.report import figures

    run = Recorded.read(folder, ended_as)
    look = looks(run.tree) if run.tree else {}
    categories = list(run.started.categories) if run.started else []
    serves = served(run.tree, categories) if run.tree else {}
    ownership = run.ownership()
    return _template().render(
        style=_asset("report.css"),
        script=_asset("report.js"),
        run=run,
        headline=headline(run),
        facts=_facts(run),
        categories=categories,
        chips=_chips(run, look, categories),
        tree=expert_tree(run, look, serves),
        portraits=portraits(run, look, serves),
        columns=ownership_by_round(run, look),
        strips=ownership_by_site(ownership, look) if ownership else [],
        maps=maps_by_round(run, look),
        few=FEW,
        scale=scale(),
        figures=figures.drawn(run),
        rounds=run.rounds,
        losses=_losses(run),
        arm_words=figures.ARM_WORDS,
        removals=removals(run, look, serves),
        affinity=_affinity(run),
        router=routing(run),
        costs=costs(run),
        speeds=run.speeds,
        provenance=_provenance(run),
    )


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"nats": nats, "signed": _signed, "percent": percent, "digits": two_digits}
    environment.filters |= {"clock": clock, "large": in_words, "interval": interval, "reach": _reach}
    return environment.from_string(_asset("report.html"))


@cache
def _asset(name: str) -> str:
    return (files("pipelines.report") / name).read_text(encoding="utf-8")


def _signed(value: float | None) -> str:
    return nats(value, signed=True)


def _reach(error: float) -> str:
    """Return half of a 95 % interval for the standard error of a share."""
    return percent(STANDARD_ERRORS * error)


def _facts(run: Recorded) -> list[tuple[str, str, str]]:
    """Return the figures at the page's head: name, figure, and what it means."""
    facts = []
    if run.kept and run.known["active_fraction"]:
        active = run.known["active_fraction"][MEAN]
        facts.append(("separation", percent(1.0 - active), "of the units a category does not run"))
        rows = costs(run)
        if rows[-1].parameters_share is not None:
            facts.append(("parameters needed", percent(rows[-1].parameters_share), "of the dense model's, mean"))
    dense, tax = of_arm(run.known["test_loss"] or {}, "dense", MEAN), (run.known["tax"] or {}).get(MEAN)
    if run.kept and tax is not None and dense:
        facts.append(("tax", f"{tax / dense:+.2%}", "of the dense twin's test loss"))
    if accuracy := run.known["accuracy"]:
        others = ", ".join(f"{arm} {percent(accuracy[arm][MEAN])}" for arm in accuracy if arm != "split")
        facts.append(("accuracy", percent(accuracy["split"][MEAN]), f"of test rows; {others}"))
    if run.started:
        facts.append(("steps", f"{run.started.steps:,}", f"of each of {len(run.started.arms)} arms"))
    seconds = run.known["seconds"]
    if seconds is None and len(run.events) > 1:
        seconds = run.events[-1].time - run.events[0].time
    if seconds is not None:
        facts.append(("wall time", clock(seconds), "all attempts" if run.known["seconds"] else "so far"))
    return facts


# --- sections -----------------------------------------------------------------------------------------


def _chips(run: Recorded, look: dict[str, str], categories: list[str]) -> list[tuple[str, int, str]]:
    """Return every category that can be followed in leaf order: its name, number and colour."""
    found = []
    for child in run.tree["children"] if run.tree else ():
        found += [(category, categories.index(category), look[child["name"]]) for category in child["categories"]]
    return found


def _losses(run: Recorded) -> list[tuple[str, float | None, dict[str, float | None]]]:
    """Return category, active fraction and arm -> test loss, for every category and their mean."""
    tested = run.known["test_loss"]
    if not tested:
        return []
    active = run.known["active_fraction"] or {}
    return [
        (category, active.get(category), {arm: of_arm(tested, arm, category) for arm in tested})
        for category in (*run.known["categories"], MEAN)
    ]


def _affinity(run: Recorded) -> dict[str, Any] | None:
    """Return the affinities of the first round, before any cut: every category still ran every unit."""
    if not run.rounds or len(run.known["categories"] or ()) > _MOST_AFFINITIES:
        return None
    found = run.map_of(run.rounds[0].round)
    if found is None or (known := affinities(found)) is None:
        return None
    number = len(known.categories)
    return {"known": known, "numbers": number <= _MOST_NUMBERS, "tips": _MOST_NUMBERS < number <= _MOST_TIPS}


def _provenance(run: Recorded) -> dict[str, Any]:
    folder, started = run.folder, run.started
    recipe, resolved = folder.recipe.read_text(encoding="utf-8"), folder.resolved.read_text(encoding="utf-8")
    seed = next((line.partition(":")[2].strip() for line in resolved.splitlines() if line.startswith("seed:")), "")
    versions: dict[str, str] = run.origin.get("versions", {})
    made_with = [f"moeify {run.origin.get('moeify', '?')}", *(f"{name} {each}" for name, each in versions.items())]
    facts = [
        ("run", folder.id),
        ("began", _when(run.events[0].time) if run.events else ""),
        ("last word", _when(run.events[-1].time) if run.events else ""),
        ("seed", seed or "0"),
        ("arms", ", ".join(started.arms) if started else ""),
        ("parameters", f"{started.parameters:,}" if started else ""),
        ("data, SHA-256", started.data_hash if started else ""),
        ("resolved recipe, SHA-256", hashlib.sha256(resolved.encode()).hexdigest()),
        ("made with", ", ".join(made_with)),
        ("page written", f"{_when(datetime.now(UTC).timestamp())}, moeify {package_version()}"),
    ]
    notes = [(f"round {note.round}" if note.round else "", note.phase, note.note) for note in run.notes]
    return {"facts": [fact for fact in facts if fact[1]], "recipe": recipe, "resolved": resolved, "notes": notes}


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
