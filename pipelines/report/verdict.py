"""The headline: what was split, how far, what it cost against whom, and why the run ended. Words alone."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moeify.events import Phase, Step
from moeify.result import MEAN
from pipelines.report.recorded import Recorded
from pipelines.show import walk
from pipelines.wording import STANDARD_ERRORS, counted, interval, nats, percent

Outcome = Literal["better", "worse", "level", "unknown"]


@dataclass(frozen=True)
class Gap:
    """The split model's mean loss above a rival's."""

    rival: str
    nats: float
    """Per unit; below 0: the split model is better."""
    error: float | None
    """Standard error over held-out rows, nats; None where the run did not record it."""

    @property
    def outcome(self) -> Outcome:
        """How the split model stands, as far as the held-out rows can tell."""
        if self.error is None:
            return "unknown"
        if abs(self.nats) <= self.reach:
            return "level"
        return "better" if self.nats < 0 else "worse"

    @property
    def reach(self) -> float:
        """Nats from the gap to the ends of its 95 % interval."""
        return STANDARD_ERRORS * (self.error or 0.0)

    @property
    def figures(self) -> str:
        """The gap and half of its interval."""
        return nats(self.nats, signed=True) + (f" ± {interval(self.error)}" if self.error is not None else "")

    @property
    def words(self) -> str:
        """The outcome for people."""
        match self.outcome:
            case "better":
                return "the split model is better"
            case "worse":
                return "the split model is worse"
            case "level":
                return "no difference that these rows can show"
        return "lower" if self.nats < 0 else "higher"


@dataclass(frozen=True)
class Headline:
    """What a person reads first."""

    verdict: str
    against: str
    """How the split model stands beside the controls; empty where it was not split."""
    scope: str
    """What was split into what."""
    gaps: tuple[Gap, ...]
    measured: str
    """What the gaps were measured on; empty without any."""
    ending: tuple[str, ...]
    """Why the run ended or where it stands, a sentence each."""


def headline(run: Recorded) -> Headline:
    """Put the run in a few words."""
    found = tuple(gaps(run))
    measured = ""
    if found and run.known["tax"]:
        measured = "test data, at the end of the run"
    elif found:
        measured = f"validation data, after round {run.kept[-1].round}"
    return Headline(_verdict(run, found), _against(run, found), _scope(run), found, measured, tuple(_ending(run)))


def gaps(run: Recorded) -> Iterator[Gap]:
    """Yield the split model's loss above the dense twin's and each control's: at the end, or of the last round kept."""
    known = run.known
    taxes: list[tuple[str, float | None, float | None]] = []
    if known["tax"]:
        mean, over = known["tax"][MEAN], known["error_over"] or {}
        taxes.append(("dense twin", mean, known["tax_error"]))
        if known["tax_told"]:
            taxes.append(("told twin", known["tax_told"][MEAN], over.get("told")))
        if known["tax_random"]:
            random = known["tax_random"][MEAN]
            taxes.append(("random split", _less(mean, random), over.get("random")))
    elif run.kept:
        last = run.kept[-1]
        taxes = [("dense twin", last.tax, last.tax_error), ("told twin", last.tax_told, None)]
        taxes.append(("random split", _less(last.tax, last.tax_random), None))
    for rival, value, error in taxes:
        if value is not None and math.isfinite(value):
            yield Gap(rival, value, error)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _verdict(run: Recorded, found: tuple[Gap, ...]) -> str:
    if run.started is None:
        return "Nothing was reported yet"
    if not run.kept:
        return "Not split: no round was kept" if run.status == "finished" else "Not split yet"
    said = f"{percent(1.0 - run.known['active_fraction'][MEAN])} separated"
    if not found or found[0].rival != "dense twin":
        return said
    dense = found[0]
    match dense.outcome:
        case "worse":
            return f"{said} at a tax of {nats(dense.nats)} nats per {run.unit}"
        case "better":
            return f"{said}, {nats(-dense.nats)} nats per {run.unit} better than the dense twin"
        case "level":
            return f"{said} at no tax that the held-out rows can show"
        case "unknown":
            return f"{said} at a tax of {nats(dense.nats, signed=True)} nats per {run.unit}"


def _against(run: Recorded, found: tuple[Gap, ...]) -> str:
    if not run.kept:
        return ""
    by_rival = {gap.rival: gap for gap in found}
    said = []
    if (random := by_rival.get("random split")) is not None:
        said.append(_beside(random, "a random split of the same sizes"))
    else:
        said.append("Without a random split to hold it against")
    if (told := by_rival.get("told twin")) is not None:
        said.append(_beside(told, "a dense twin that is told the category, as routing tells the split model"))
    return "; ".join(each if not place else each[0].lower() + each[1:] for place, each in enumerate(said))


def _beside(gap: Gap, rival: str) -> str:
    match gap.outcome:
        case "level":
            return f"No different, as far as these rows can show, from {rival}"
        case "unknown":
            return f"{'Below' if gap.nats < 0 else 'Above' if gap.nats > 0 else 'Level with'} {rival}"
    return f"{gap.outcome.capitalize()} than {rival}"


def _scope(run: Recorded) -> str:
    if run.started is None or run.tree is None:
        return ""
    experts = sum(1 for _, depth in walk(run.tree) if depth)
    sites = run.started.sites
    what = f"{counted(len(run.started.categories), 'category', 'categories')}, {counted(sum(sites.values()), 'unit')}"
    where = f"in {counted(len(sites), 'site')}"
    return f"{what} {where}, " + (
        f"split into a core and {counted(experts, 'expert')}" if experts else "one dense model"
    )


def _ending(run: Recorded) -> Iterator[str]:
    """Yield why the run ended, or where it stands."""
    planned = run.started.rounds if run.started else 0
    match run.status:
        case "running":
            yield f"Still running: {_reached(run)}."
        case "failed":
            yield f"An error ended it: {run.failure or 'no reason was noted'}."
        case "interrupted":
            yield f"Interrupted: {_reached(run)}. Go on with: moeify resume {run.folder.id}"
        case "finished":
            outcomes = Counter(event.outcome for event in run.rounds)
            counts = ", ".join(
                f"{outcomes[each]} {each}" for each in ("kept", "rolled back", "not cut") if outcomes[each]
            )
            why = f": {run.known['stopped']}" if run.known["stopped"] else ""
            yield f"Finished{why}. Of {counted(planned, 'planned round')}: {counts or 'none judged'}."
    limit = f"the budget of {run.budget}" if run.budget else "the budget"
    for event in run.rounds:
        if event.outcome == "rolled back":
            yield f"Round {event.round} was rolled back: tax {nats(event.tax, signed=True)} is beyond {limit}."
    cut = {event.round for event in run.rounds if not event.uncut}
    for note in run.notes:
        if note.phase == "partition" and note.round not in cut:
            yield f"Round {note.round} cut nothing: {note.note}."


def _reached(run: Recorded) -> str:
    phase = next((event for event in reversed(run.events) if isinstance(event, Phase)), None)
    step = next((event for event in reversed(run.events) if isinstance(event, Step)), None)
    if phase is None:
        return "nothing was reported"
    where = f"round {phase.round}, {phase.phase}" if phase.round else phase.phase
    return where + (f", {step.work:.0%} of the training" if step else "")
