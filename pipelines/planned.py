"""What a recipe asks of a machine, for people and as JSON: operations and hours phase by phase, memory of a worker."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moeify.dry_run import Sizes, sizes
from moeify.forecast import Forecast, Memory, Work, forecast
from moeify.pace import Pace, pace
from moeify.recipe.config import RunConfig
from moeify.recipe.model import traits_of
from moeify.recipe.parallel import Fsdp
from pipelines.accelerators import Gpu
from pipelines.tables import console_for, table_for
from pipelines.wording import clock, counted, percent

Summary = dict[str, Any]
_ARMS = {"dense": "dense twin", "told": "told twin", "split": "split model", "random": "random split"}
_KINDS = {
    "train": "train",
    "attribute": "attribution",
    "null test": "null test",
    "evaluate": "validation",
    "test": "test and removals",
}
_SHORT = 0.01
"""Seconds of a step's operations up to which what a step takes besides is most of it (3 to 10 ms on a CPU core)."""
_SPARED = {
    "controls": "Fewer controls spare one each.",
    "cluster.parallel": "Where cluster.parallel is fsdp, workers share it out.",
    "cluster.workers": "Workers share it out: more of them hold less each.",
}
"""What makes less of what arms take."""
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    workers: int
    name: str | None = None
    """Of its GPUs, ``GPU`` where the recipe asks for some; None: this machine's CPU."""
    memory: float | None = None
    """Bytes of one worker's device; None where it is not asked for."""
    flops: float | None = None
    """Operations a second that one worker is expected to reach; None where it is not known."""


def on_gpus(number: int, name: str, gpu: Gpu, config: RunConfig, utilization: float) -> Machine:
    """Return GPUs, one worker each, at a share of their peak in the precision that the recipe trains in."""
    peak = gpu.half if config.training.autocast == "bfloat16" else gpu.single
    return Machine(number, name, gpu.memory, utilization * peak)


def planned(config: RunConfig, base: Path, categories: int, machine: Machine, *, here: bool = False) -> Summary:
    """Return the plan as JSON-ready data; ``here``: after measuring how fast this machine is."""
    known = sizes(config, base, machine.workers, categories)
    measured = pace(config, base, known, categories) if here else None
    flops = measured.flops if measured else machine.flops
    found = forecast(config, known, categories, machine.workers)
    rate = flops * machine.workers if flops else None
    memory = found.memory
    work = [_work(label, parts, found, rate, measured) for label, parts in _groups(found)]
    return {
        "recipe": config.name,
        "categories": categories,
        "steps": config.training.steps,
        "units_per_step": config.training.rows * found.units_per_row,
        "unit": "token" if found.units_per_row > 1 else "example",
        "parameters": known.parameters,
        "split_share": known.split,
        "workers": machine.workers,
        "device": machine.name,
        "flops": found.flops,
        "flops_per_second": rate,
        "seconds": sum(row["seconds"] for row in work) if rate else None,
        "step_seconds": _step_seconds(config, known, rate, measured) if rate else None,
        "work": work,
        "memory": {
            "parameters": memory.parameters,
            "optimizer": memory.optimizer,
            "gradients": memory.gradients,
            "training": memory.training,
            "attribution": memory.attribution,
            "peak": memory.peak,
            "device": machine.memory,
            "savers": list(_savers(config, memory, machine.workers)),
        },
        "arms": list(config.arms),
        "checkpoint": found.checkpoint,
        "checkpoints": config.checkpoints.keep + 1,  # and the one that an open round may go back to
    }


def _savers(config: RunConfig, memory: Memory, workers: int) -> Iterator[str]:
    """Yield the settings that would make the peak less and are not at their least yet."""
    training, traits = config.training, traits_of(config.model)
    if config.controls:
        yield "controls"
    if isinstance(config.cluster.parallel, Fsdp):
        yield "cluster.workers"
    elif workers > 1:
        yield "cluster.parallel"
    if memory.measuring:
        if config.attribution.rows_at_once > workers:
            yield "attribution.rows_at_once"
        if config.attribution.columns != 1:
            yield "attribution.columns"
    else:
        if training.accumulate < training.rows // workers and not traits.batch_norm:
            yield "training.accumulate"
        if traits.layers and not training.checkpoint_activations:
            yield "training.checkpoint_activations"
    if training.autocast == "none":
        yield "training.autocast"


def _groups(found: Forecast) -> Iterator[tuple[str, list[Work]]]:
    """Yield what the work is called and its parts: training arm by arm, everything else by kind."""
    grouped: dict[str, list[Work]] = {}
    for each in found.work:
        label = f"train the {_ARMS[each.arm]}" if each.kind == "train" and each.arm else _KINDS[each.kind]
        grouped.setdefault(label, []).append(each)
    yield from grouped.items()


def _step_seconds(config: RunConfig, known: Sizes, rate: float, measured: Pace | None) -> Summary:
    """Return what a step takes: its operations, of a whole model, and all else; None: not measured."""
    operations = config.training.rows * (known.forward + known.backward + known.again) / rate
    besides = {"whole": measured.step, "routed": measured.routed} if measured else None
    return {"operations": operations, "besides": besides}


def _work(label: str, parts: list[Work], found: Forecast, rate: float | None, measured: Pace | None) -> Summary:
    flops = sum(each.flops for each in parts)
    rows = sum(each.rows for each in parts)
    besides = sum(each.steps * (measured.routed if each.routed else measured.step) for each in parts if measured)
    return {
        "what": label,
        "units": rows * found.units_per_row,
        "flops": flops,
        "share": flops / found.flops,
        "seconds": flops / rate + besides if rate else None,
    }


# --- for people -------------------------------------------------------------------------------------------


def print_plan(plan: Summary, stream: TextIO) -> None:
    """Print the plan; at most 80 columns wide on an 80-column terminal."""
    console = console_for(stream)
    facts = [
        plan["recipe"],
        f"{short(plan['parameters'])} parameters",
        f"{plan['categories']} categories",
        f"{plan['steps']:,} steps of {plan['units_per_step']:,} {plan['unit']}s",
    ]
    console.print(" · ".join(facts), style="bold")
    where = f"{plan['workers']} x {plan['device']}" if plan["device"] else f"{counted(plan['workers'], 'worker')}, CPU"
    if rate := plan["flops_per_second"]:
        where += f", {short(rate)}FLOP/s in all"
    console.print(where)
    console.print()
    timed = plan["seconds"] is not None
    table = table_for(console, "work", f"{plan['unit']}s", "FLOPs", "share", *["time"] * timed)
    for row in plan["work"]:
        times = [clock(row["seconds"])] if timed else []
        table.add_row(row["what"], short(row["units"]), short(row["flops"]), percent(row["share"]), *times)
    table.add_row("all", "", short(plan["flops"]), "", *([clock(plan["seconds"])] if timed else []), style="bold")
    console.print(table)
    console.print("Not foreseen: finding the partition, data preparation, rolled-back rounds.", style="dim")
    if said := doubts(plan):
        console.print(said)
    console.print()
    memory = plan["memory"]
    table = table_for(console, "memory of a worker", "bytes")
    table.add_row(f"parameters of {len(plan['arms'])} arms", short(memory["parameters"]))
    table.add_row("AdamW's moments", short(memory["optimizer"]))
    table.add_row("gradients of one arm, and a step's activations", short(memory["gradients"] + memory["training"]))
    table.add_row("or attribution: its table, and activations", short(memory["attribution"]))
    table.add_row("peak", short(memory["peak"]), style="bold")
    console.print(table)
    console.print(f"Checkpoints: {plan['checkpoints']} of {short(plan['checkpoint'])}B are kept.", style="dim")
    if memory["device"]:
        console.print(verdict(plan))


def doubts(plan: Summary) -> str:
    """Return what the time leaves out where steps are short: all that they take besides their operations."""
    step = plan["step_seconds"]
    if step is None or step["besides"] or step["operations"] > _SHORT:
        return ""
    return (
        f"A step's operations take {1000 * step['operations']:.2g} ms. Starting them, the optimizer and rows\n"
        f"take longer on any machine and are left out: it will take many times that."
    )


def verdict(plan: Summary) -> str:
    """Return whether a worker's part fits its device, and what takes room where it does not."""
    memory, room = plan["memory"], plan["memory"]["device"]
    if memory["peak"] <= room:
        return f"Fits: {short(memory['peak'])}B of {short(room)}B."
    arm = 1.5 * memory["optimizer"] / len(plan["arms"])  # its parameters beside two moments of each
    step = memory["gradients"] + memory["training"]
    what, most = ("Attribution", memory["attribution"]) if memory["attribution"] > step else ("A step", step)
    savers = [each for each in memory["savers"] if each not in _SPARED]
    lines = [
        f"Does not fit: {short(memory['peak'])}B wanted, one {plan['device']} has {short(room)}B.",
        f"An arm takes {short(arm)}B of a worker with its optimizer.",
        *(told for each, told in _SPARED.items() if each in memory["savers"]),
        f"{what} takes {short(most)}B; {'less with' if savers else 'no setting makes that less.'}",
        *[f"{', '.join(savers)}."] * bool(savers),
    ]
    if not memory["savers"]:
        lines.append("What is left is a smaller model, or a device with more memory.")
    return "\n".join(lines)


def short(number: float) -> str:
    """Return three digits and a prefix: ``1.23 T``."""
    place = 0
    while abs(number) >= 999.5 and place < len(_PREFIXES) - 1:
        number, place = number / 1000, place + 1
    digits = f"{number:.3g}" if place else f"{number:g}"
    return f"{digits} {_PREFIXES[place]}"
