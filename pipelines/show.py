"""What is known about a run: as plain data with stable keys, and as tables for people."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, TextIO, get_args

from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from moeify.events import Arm, Evaluated, Event, Phase, RoundEnded, Started, Step
from moeify.result import MEAN, Result
from pipelines.display import clock
from pipelines.journal import read_events
from pipelines.runs import RunFolder, status

Summary = dict[str, Any]

_ROUND_KEYS = (
    "round",
    "step",
    "separation",
    "tax",
    "tax_by_category",
    "tax_random",
    "predicted",
    "predicted_random",
    "accepted",
)


def summary(folder: RunFolder) -> Summary:
    """Return the run as JSON-ready data; null for what is not known yet, and for numbers that are not finite."""
    known = _of_result(_read_result(folder)) if folder.result.is_file() else _of_journal(folder)
    return {"run": folder.id, "status": status(folder), **_finite(known)}


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
        "steps": result.steps,
        "seconds": result.seconds,
        "tree": result.tree,
        "active_fraction": result.active_fraction,
        "rounds": [_round(event) for event in result.rounds],
        "test_loss": result.test_loss,
        "bits_per_byte": result.bits_per_byte,
        "tax": result.tax,
        "tax_random": result.tax_random,
        "own_other": result.own_other,
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
        "steps": started.steps if started else None,
        "seconds": None,
        "tree": tree,
        "active_fraction": active_fraction(tree) if tree else None,
        "rounds": [_round(event) for event in rounds],
        "test_loss": {arm: tested.get(arm) for arm in get_args(Arm)} if tested else None,
        "bits_per_byte": None,
        "tax": _tax(tested, "split"),
        "tax_random": _tax(tested, "random"),
        "own_other": None,
    }


def _round(event: RoundEnded) -> Summary:
    return event.model_dump(include=set(_ROUND_KEYS))


def _tax(tested: Mapping[str, Mapping[str, float]], arm: str) -> dict[str, float] | None:
    if not {arm, "dense"} <= tested.keys():
        return None
    rises = {category: loss - tested["dense"][category] for category, loss in tested[arm].items()}
    return {**rises, MEAN: fmean(rises.values())}


def active_fraction(tree: Summary) -> dict[str, float]:
    """Return category -> units on its route over all units, and their mean, of a nested tree."""
    nodes = [node for node, _ in _walk(tree)]
    total = sum(node["units"] for node in nodes)
    active = {c: sum(n["units"] for n in nodes if c in n["categories"]) / total for c in tree["categories"]}
    return {**active, MEAN: fmean(active.values())}


def _walk(node: Summary, depth: int = 0) -> Iterator[tuple[Summary, int]]:
    yield node, depth
    for child in node["children"]:
        yield from _walk(child, depth + 1)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


# --- for people -----------------------------------------------------------------------------------------


def print_run(folder: RunFolder, stream: TextIO) -> None:
    """Print the tree, the rounds and the tables; at most 80 columns wide on an 80-column terminal."""
    known = summary(folder)
    console = _console(stream)
    facts = [known["run"], known["status"]]
    if known["steps"]:
        facts.append(f"{known['steps']:,} steps an arm")
    if known["seconds"] is not None:
        facts.append(clock(known["seconds"]))
    console.print(" · ".join(facts), style="bold")
    if known["status"] != "finished" and (reached := _reached(read_events(folder.journal, 0)[0])):
        console.print(reached)
    for table in _tables(known, console):
        console.print()
        console.print(table)
    if known["tree"] is None:
        console.print("Nothing was reported yet.")


def print_runs(folders: Sequence[RunFolder], stream: TextIO) -> None:
    """Print one line a run."""
    console = _console(stream)
    table = _table(console, "Runs", "run", "status", "rounds", "active", "tax")
    for row in listing(folders):
        table.add_row(row["run"], row["status"], str(row["rounds"]), _percent(row["active_fraction"]), _tax_text(row))
    console.print(table)


def listing(folders: Sequence[RunFolder]) -> list[Summary]:
    """Return a line's worth about each run; a run whose files are damaged is listed with nulls."""
    rows = []
    for folder in folders:
        row: Summary = {"run": folder.id, "status": status(folder), "path": str(folder.path)}
        try:
            known = summary(folder)
        except ValueError as error:
            row |= {"rounds": None, "active_fraction": None, "tax": None, "problem": str(error)}
        else:
            kept = [r for r in known["rounds"] if r["accepted"]]
            tax = known["tax"][MEAN] if known["tax"] else kept[-1]["tax"] if kept else None
            active = known["active_fraction"][MEAN] if known["active_fraction"] else None
            row |= {"rounds": len(kept), "active_fraction": active, "tax": tax, "problem": None}
        rows.append(row)
    return rows


def _tax_text(row: Summary) -> str:
    return "damaged" if row["problem"] else _nats(row["tax"], signed=True)


def _reached(events: Sequence[Event]) -> str:
    phase = next((event for event in reversed(events) if isinstance(event, Phase)), None)
    step = next((event for event in reversed(events) if isinstance(event, Step)), None)
    if phase is None:
        return ""
    done = f", {step.work:.0%} of the work" if step else ""
    return f"came to: round {phase.round}, {phase.phase}{done}"


def _console(stream: TextIO) -> Console:
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _table(console: Console, title: str, *columns: str, text: Sequence[int] = (0, 1)) -> Table:
    """Return an empty table; columns whose position is not in ``text`` hold numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        padding=(0, 1),
    )
    for position, column in enumerate(columns):
        if position in text:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _tables(known: Summary, console: Console) -> Iterator[Table]:
    if known["tree"]:
        yield _tree_table(known["tree"], console)
    if known["rounds"]:
        yield _rounds_table(known["rounds"], console)
    if known["test_loss"]:
        yield _loss_table(known, console)
    if known["bits_per_byte"]:
        yield _bits_table(known, console)
    if known["own_other"]:
        yield from _own_other_tables(known, console)


def _tree_table(tree: Summary, console: Console) -> Table:
    total = sum(node["units"] for node, _ in _walk(tree))
    active = active_fraction(tree)
    table = _table(console, "Expert tree", "expert", "serves", "own units", "share", "active")
    for node, depth in _walk(tree):
        leaf = not node["children"]
        on_route = active[node["categories"][0]] if leaf else None
        table.add_row(
            "  " * depth + node["name"],
            "" if node["name"] == "+".join(node["categories"]) else ", ".join(node["categories"]),
            f"{node['units']:,}",
            _percent(node["units"] / total),
            _percent(on_route) if leaf else "",
        )
    return table


def _rounds_table(rounds: Sequence[Summary], console: Console) -> Table:
    columns = ("round", "step", "separation", "tax", "random", "J", "J random", "")
    table = _table(console, "Rounds (validation; tax and J in nats)", *columns, text=(0, 7))
    for row in rounds:
        table.add_row(
            str(row["round"]),
            f"{row['step']:,}",
            _percent(row["separation"]),
            _nats(row["tax"], signed=True),
            _nats(row["tax_random"], signed=True),
            _nats(row["predicted"]),
            _nats(row["predicted_random"]),
            "kept" if row["accepted"] else "rolled back",
        )
    return table


def _loss_table(known: Summary, console: Console) -> Table:
    loss, active = known["test_loss"], known["active_fraction"] or {}
    taxes = [known["tax"] or {}, known["tax_random"] or {}]
    title = f"Test loss (nats per {known['unit']}; tax: above the dense twin)"
    table = _table(console, title, "category", "active", "dense", "split", "random", "tax", "random tax", text=(0,))
    for category in (*known["categories"], MEAN):
        table.add_row(
            category,
            _percent(active.get(category)),
            *(_nats(_of_arm(loss, arm, category)) for arm in ("dense", "split", "random")),
            *(_nats(tax.get(category), signed=True) for tax in taxes),
        )
    return table


def _bits_table(known: Summary, console: Console) -> Table:
    table = _table(console, "Test bits per byte", "category", "dense", "split", "random", text=(0,))
    for category in (*known["categories"], MEAN):
        bits = (_of_arm(known["bits_per_byte"], arm, category) for arm in ("dense", "split", "random"))
        table.add_row(category, *(_nats(value) for value in bits))
    return table


def _of_arm(figures: Mapping[str, Mapping[str, float | None] | None], arm: str, category: str) -> float | None:
    of_arm = figures.get(arm) or {}
    if category != MEAN or MEAN in of_arm:
        return of_arm.get(category)
    values = [value for value in of_arm.values() if value is not None]
    return fmean(values) if values and len(values) == len(of_arm) else None


def _own_other_tables(known: Summary, console: Console) -> Iterator[Table]:
    """Yield the matrix, cut between experts into as many tables as the width asks for."""
    matrix = known["own_other"]
    experts = list(dict.fromkeys(expert for row in matrix.values() for expert in row))
    room = console.width - max(map(len, [*matrix, "category"])) - 2
    title = "Rise of test loss (nats) when an expert is ablated"
    for part in _chunks(experts, room):
        table = _table(console, title, "category", *part, text=(0,))
        for category, row in matrix.items():
            table.add_row(category, *(_nats(row.get(expert), signed=True) for expert in part))
        title = ""
        yield table


def _chunks(experts: Sequence[str], room: int) -> Iterator[list[str]]:
    part: list[str] = []
    used = 0
    for expert in experts:
        width = max(len(expert), len("+0.0000")) + 2
        if part and used + width > room:
            yield part
            part, used = [], 0
        part.append(expert)
        used += width
    if part:
        yield part


def _nats(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
