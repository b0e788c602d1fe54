"""What is known about a run: as plain data with stable keys, and as tables for people."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, TextIO

from pydantic import ValidationError
from rich.console import Console

from moeify.events import Evaluated, Event, Phase, RoundEnded, Started, Step
from moeify.recipe.arms import Arm
from moeify.result import MEAN, Result
from pipelines.journal import read_events
from pipelines.removal_tables import module_block, removal_blocks
from pipelines.runs import RunFolder, status
from pipelines.tables import Block, console_for, table_for
from pipelines.wording import clock, interval, nats, percent, two_digits

Summary = dict[str, Any]

_TOLD_NOTE = "\nover told: the split model above the told twin, which is given the category too"
_ROUND_KEYS = (
    "round",
    "step",
    "separation",
    "asked",
    "tax",
    "tax_error",
    "tax_by_category",
    "tax_error_by_category",
    "tax_before",
    "tax_cut",
    "expected",
    "budget_used",
    "budget_error",
    "tax_random",
    "tax_told",
    "predicted",
    "predicted_random",
    "gap",
    "accepted",
)


def summary(folder: RunFolder) -> Summary:
    """Return the run as JSON-ready data; null for what is not known yet, and for numbers that are not finite."""
    known = _of_result(_read_result(folder)) if folder.result.is_file() else _of_journal(folder)
    return {"run": folder.id, "status": status(folder), **finite(known)}


def to_json(data: Any) -> str:
    """Return JSON for other programs."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)


def _read_result(folder: RunFolder) -> Result:
    try:
        return Result.model_validate_json(folder.result.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{folder.result} is damaged ({where}: {first['msg']}); resume the run without it") from None


def _of_result(result: Result) -> Summary:
    return {
        "categories": list(result.categories),
        "unit": result.unit,
        "arms": list(result.test_loss),
        "steps": result.steps,
        "seconds": result.seconds,
        "tree": result.tree,
        "active_fraction": result.active_fraction,
        "active_flops": result.active_flops,
        "rounds": [_round(event) for event in result.rounds],
        "stopped": result.stopped,
        "test_loss": result.test_loss,
        "bits_per_byte": result.bits_per_byte,
        "accuracy": result.accuracy,
        "tax": result.tax,
        "tax_error": result.tax_error,
        "tax_error_by_category": dict(result.tax_error_by_category),
        "tax_random": result.tax_random,
        "tax_told": result.tax_told,
        "error_over": dict(result.error_over),
        "own_other": result.own_other,
        "own_other_error": result.own_other_error or None,
        "modules": [{**each.model_dump(), "p": each.p, "verdict": each.verdict} for each in result.modules] or None,
    }


def _of_journal(folder: RunFolder) -> Summary:
    events, _ = read_events(folder.journal, 0)
    started = next((event for event in events if isinstance(event, Started)), None)
    rounds = [event for event in events if isinstance(event, RoundEnded)]
    tree = next((event.tree for event in reversed(rounds) if event.accepted), None)
    if tree is None and started:
        names = list(started.categories)
        tree = {"name": "core", "categories": names, "units": sum(started.sites.values()), "children": []}
    tested: dict[str, dict[str, float]] = {
        event.arm: event.loss for event in events if isinstance(event, Evaluated) and event.moment == "test"
    }
    return {
        "categories": list(started.categories) if started else None,
        "unit": started.unit if started else None,
        "arms": list(started.arms) if started else None,
        "steps": started.steps if started else None,
        "seconds": None,
        "tree": tree,
        "active_fraction": active_fraction(tree) if tree else None,
        "active_flops": None,
        "rounds": [_round(event) for event in rounds],
        "stopped": None,
        "test_loss": {arm: tested.get(arm) for arm in started.arms} if started and tested else None,
        "bits_per_byte": None,
        "accuracy": None,
        "tax": _tax(tested, "split", "dense"),
        "tax_error": None,
        "tax_error_by_category": None,
        "tax_random": _tax(tested, "random", "dense"),
        "tax_told": _tax(tested, "split", "told"),
        "error_over": None,
        "own_other": None,
        "own_other_error": None,
        "modules": None,
    }


def _round(event: RoundEnded) -> Summary:
    return {**event.model_dump(include=set(_ROUND_KEYS)), "outcome": event.outcome}


def _tax(tested: Mapping[str, Mapping[str, float]], arm: Arm, twin: Arm) -> dict[str, float] | None:
    if not {arm, twin} <= tested.keys():
        return None
    rises = {category: loss - tested[twin][category] for category, loss in tested[arm].items()}
    return {**rises, MEAN: fmean(rises.values())}


def active_fraction(tree: Summary) -> dict[str, float]:
    """Return category -> units on its route over all units, and their mean, of a nested tree."""
    nodes = [node for node, _ in walk(tree)]
    total = sum(node["units"] for node in nodes)
    active = {c: sum(n["units"] for n in nodes if c in n["categories"]) / total for c in tree["categories"]}
    return {**active, MEAN: fmean(active.values())}


def walk(node: Summary, depth: int = 0) -> Iterator[tuple[Summary, int]]:
    """Yield the experts of a nested tree, depth first, with their depth; the root has 0."""
    yield node, depth
    for child in node["children"]:
        yield from walk(child, depth + 1)


def finite(value: Any) -> Any:
    """Return plain data with null for numbers that are not finite, which JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


# --- for people -----------------------------------------------------------------------------------------


def print_run(folder: RunFolder, stream: TextIO) -> None:
    """Print the tree, the rounds and the tables; at most 80 columns wide on an 80-column terminal."""
    known = summary(folder)
    console = console_for(stream)
    facts = [known["run"], known["status"]]
    if known["steps"]:
        facts.append(f"{known['steps']:,} steps an arm")
    if known["seconds"] is not None:
        facts.append(clock(known["seconds"]))
    if known["stopped"]:
        facts.append(known["stopped"])
    console.print(" · ".join(facts), style="bold")
    if known["status"] != "finished":
        if reached := _reached(read_events(folder.journal, 0)[0]):
            console.print(reached)
        if known["status"] != "running":
            console.print(f"go on with: moeify resume {folder.id}")
    for block in _blocks(known, console):
        console.print()
        if block.title:
            console.print(block.title, style="bold")
        console.print(block.table)
        if block.note:
            console.print(block.note, style="dim")
    if known["tree"] is None:
        console.print("Nothing was reported yet.")


def print_runs(folders: Sequence[RunFolder], stream: TextIO) -> None:
    """Print one line a run."""
    console = console_for(stream)
    table = table_for(console, "run", "status", "rounds kept", "active", "tax", text=(0, 1))
    for row in listing(folders):
        tax = "damaged" if row["problem"] else nats(row["tax"], signed=True)
        rounds = "-" if row["rounds"] is None else str(row["rounds"])
        table.add_row(row["run"], row["status"], rounds, percent(row["active_fraction"]), tax)
    console.print(table)
    console.print("active: mean share of the units that run; tax: mean nats above the dense twin", style="dim")


def listing(folders: Sequence[RunFolder]) -> list[Summary]:
    """Return a line's worth about each run; a run whose files are damaged is listed with nulls."""
    rows = []
    for folder in folders:
        row: Summary = {"run": folder.id, "status": status(folder), "path": folder.address}
        try:
            known = summary(folder)
        except ValueError as error:
            row |= {"rounds": None, "active_fraction": None, "tax": None, "problem": str(error)}
        else:
            kept = [r for r in known["rounds"] if r["outcome"] == "kept"]
            tax = known["tax"][MEAN] if known["tax"] else kept[-1]["tax"] if kept else None
            active = known["active_fraction"][MEAN] if known["active_fraction"] else None
            row |= {"rounds": len(kept), "active_fraction": active, "tax": tax, "problem": None}
        rows.append(row)
    return rows


def _reached(events: Sequence[Event]) -> str:
    phase = next((event for event in reversed(events) if isinstance(event, Phase)), None)
    step = next((event for event in reversed(events) if isinstance(event, Step)), None)
    if phase is None:
        return ""
    where = f"round {phase.round}, {phase.phase}" if phase.round else phase.phase
    return f"came to: {where}" + (f", {step.work:.0%} of the training" if step else "")


def _blocks(known: Summary, console: Console) -> Iterator[Block]:
    if known["tree"]:
        yield _tree_block(known["tree"], console)
    if known["rounds"]:
        yield _rounds_block(known, console)
    if known["test_loss"]:
        yield _loss_block(known, console)
    if known["bits_per_byte"]:
        yield _bits_block(known, console)
    if known["accuracy"]:
        yield _accuracy_block(known, console)
    if known["own_other"]:
        experts = [(node, depth) for node, depth in walk(known["tree"]) if depth]
        yield from removal_blocks(known["own_other"], known["tree"], experts, console)
    if known["modules"]:
        yield module_block(known["modules"], [node["name"] for node, _ in experts], console)


def _tree_block(tree: Summary, console: Console) -> Block:
    """Name what each expert serves in a column of its own, unless all names say it already."""
    total = sum(node["units"] for node, _ in walk(tree))
    active = active_fraction(tree)
    telling = all(_named_by_its_categories(node) for node, depth in walk(tree) if depth)
    columns = (
        ("expert", "own units", "share", "active") if telling else ("expert", "serves", "own units", "share", "active")
    )
    table = table_for(console, *columns, text=(0,) if telling else (0, 1))
    for node, depth in walk(tree):
        serves = ", ".join(node["categories"]) if depth else "all"
        table.add_row(
            "  " * depth + node["name"] + (" (all)" if telling and not depth else ""),
            *(() if telling else (serves,)),
            f"{node['units']:,}",
            percent(node["units"] / total),
            "" if node["children"] else percent(active[node["categories"][0]]),
        )
    return Block("Expert tree", table, "share, active: of all units; active: those on the way from core to the leaf")


def _named_by_its_categories(node: Summary) -> bool:
    return node["name"] in ("+".join(node["categories"]), "+".join(sorted(node["categories"])))


def _rounds_block(known: Summary, console: Console) -> Block:
    """Without a budget J stands beside the tax; with one, the tax that was foreseen at the cut and what it used."""
    random, told = ("random" in known["arms"], "told" in known["arms"])
    budget = any(row["budget_used"] is not None for row in known["rounds"])
    tax_heads = list(_tax_heads(known))
    columns = ["round", "separation", tax_heads[0], "±", *tax_heads[1:]]
    columns += ["expected", "budget\nused"] if budget else ["J", *(["random\nJ"] if random else [])]
    table = table_for(console, *columns, "outcome", text=(0, len(columns)))
    for row in known["rounds"]:
        taxes = (nats(row[key], signed=True) for key in _tax_keys(known))
        cells = [str(row["round"]), percent(row["separation"]), next(taxes), interval(row["tax_error"]), *taxes]
        if budget:
            cells += [nats(row["expected"], signed=True), percent(row["budget_used"])]
        else:
            cells += [two_digits(row["predicted"]), *([two_digits(row["predicted_random"])] if random else [])]
        table.add_row(*cells, row["outcome"])
    unit = known["unit"] or "unit"
    notes = ["tax: above the dense twin after recovery; ±: 95 % interval over the rows"]
    notes += ["expected: the tax foreseen at the cut"] if budget else ["J: predicted from the cut alone"]
    title = f"Rounds (validation; tax{'' if budget else ' and J'} in nats per {unit})"
    return Block(title, table, "\n".join(notes) + (_TOLD_NOTE if told else ""))


def _loss_block(known: Summary, console: Console) -> Block:
    loss, active = known["test_loss"], known["active_fraction"] or {}
    taxes = [known[key] or {} for key in _tax_keys(known)]
    table = table_for(console, "category", "active", *known["arms"], *_tax_heads(known))
    for category in (*known["categories"], MEAN):
        table.add_row(
            category,
            percent(active.get(category)),
            *(nats(of_arm(loss, arm, category)) for arm in known["arms"]),
            *(nats(tax.get(category), signed=True) for tax in taxes),
        )
    known_error = known["tax_error"] is not None
    notes = [f"mean tax ± {interval(known['tax_error'])}: 95 % interval over the rows, which both read"] * known_error
    note = "\n".join(notes) + (_TOLD_NOTE if "told" in known["arms"] else "")
    return Block(f"Test loss (nats per {known['unit']}; tax: above the dense twin)", table, note)


def _tax_keys(known: Summary) -> tuple[str, ...]:
    """Return the summary's taxes that this run's controls give."""
    return ("tax", *(key for arm, key in (("random", "tax_random"), ("told", "tax_told")) if arm in known["arms"]))


def _tax_heads(known: Summary) -> Iterator[str]:
    """Yield what stands above those taxes, a word a line, to fit 80 columns."""
    words = {"tax": "tax", "tax_random": "random tax", "tax_told": "over told"}
    for key in _tax_keys(known):
        yield words[key].replace(" ", "\n")


def _bits_block(known: Summary, console: Console) -> Block:
    table = table_for(console, "category", *known["arms"])
    for category in (*known["categories"], MEAN):
        table.add_row(category, *(nats(of_arm(known["bits_per_byte"], arm, category)) for arm in known["arms"]))
    return Block("Test bits per byte", table)


def _accuracy_block(known: Summary, console: Console) -> Block:
    table = table_for(console, "category", *known["arms"])
    for category in (*known["categories"], MEAN):
        table.add_row(category, *(percent(of_arm(known["accuracy"], arm, category)) for arm in known["arms"]))
    return Block("Test accuracy", table)


def of_arm(figures: Mapping[str, Mapping[str, float | None] | None], arm: str, category: str) -> float | None:
    """Return an arm's figure of a category, or of ``mean``; None where it is not known."""
    of_arm = figures.get(arm) or {}
    if category != MEAN or MEAN in of_arm:
        return of_arm.get(category)
    values = [value for value in of_arm.values() if value is not None]
    return fmean(values) if values and len(values) == len(of_arm) else None
