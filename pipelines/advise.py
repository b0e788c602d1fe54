"""`moeify advise`: recommend an expert tree, and say what speaks for it."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from jaxtyping import Float64
from rich.console import Console
from torch import Tensor

from attribution.measure import Moments
from attribution.table import AttributionTable
from moeify.attributing import table_of
from moeify.recipe import strict_yaml
from moeify.splitting.advice import Advice, Division, advise
from moeify.splitting.null_test import Relabel
from moeify.splitting.terms import site_terms
from moeify.task import tokens_read
from pipelines.advised import Advised
from pipelines.tables import console_for, in_columns, table_for
from pipelines.wording import percent, two_digits

PERMUTATIONS = 8
"""Of the null test, where the recipe does not say."""
LEVEL = 0.05
FORETELLS = (
    "Affinity foretells little of what separating costs (`moeify study worth_separating`: rank correlation .19 over "
    "pairs of kinds of text, none over digits): what is recommended is to be tried first, not known to be best."
)
UNTRAINED = (
    "This network is untrained: what is measured are the categories' data through random weights. Train the recipe "
    "for a few hundred steps and ask for the run's advice before much is spent on this."
)


def advice_of(
    advised: Advised,
    *,
    separation: float | None = None,
    rows: int | None = None,
    permutations: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Advice:
    """Measure the network and return what to divide; what is not given is as the recipe says it."""
    model, task, config = advised.model, advised.task, advised.config
    asked, test = config.attribution, config.partition.null_test
    measure = partial(_table, advised, rows or asked.rows)
    return advise(
        model.space.readers,
        model.output_weights,
        config,
        measure,
        separation=config.rounds[0].separation if separation is None else separation,
        permutations=(test.permutations if test else PERMUTATIONS) if permutations is None else permutations,
        level=test.level if test else LEVEL,
        terms=site_terms(config.partition, model.network, model.space, tokens_read(task)),
        said=say,
    )


def _table(advised: Advised, rows: int, relabel: Relabel) -> AttributionTable:
    asked, seed = advised.config.attribution, advised.config.seed
    known = advised.model, advised.task, rows, asked.rows_at_once, seed
    return table_of(*known, Moments(asked.columns), round_=1, relabel=relabel)


def snippet(advice: Advice) -> str | None:
    """Return what to put into the recipe; None where nothing is worth dividing."""
    if not advice.rounds:
        return None
    lines = []
    if advice.tree is not None:
        lines.append(f"tree: {strict_yaml.write_flow(_lists(advice.tree))}")
    if advice.together:
        kept = ", ".join("+".join(group) for group in advice.together)
        lines += [f"# stay whole for as long as nothing tells them apart: {kept}", "partition: {null_test: {}}"]
    return "\n".join(lines)


def _lists(tree: Any) -> Any:
    return tree if isinstance(tree, str) else [_lists(each) for each in tree]


def summary(advised: Advised, advice: Advice) -> dict[str, Any]:
    """Return the advice as plain data; J and costs in nats per ``unit``."""

    def of(matrix: Float64[Tensor, "categories categories"]) -> list[list[float]]:
        return matrix.tolist()

    return {
        "of": advised.name,
        "trained": advised.trained,
        "unit": advised.task.unit,
        "categories": list(advice.categories),
        "separation": advice.separation,
        "affinity": {"value": of(advice.affinity), "lower": of(advice.lower), "upper": of(advice.upper)},
        "apart": advice.apart,
        "merges": [
            {"joins": list(map(list, m.joined)), "groups": m.groups, "predicted": m.predicted, "cost": m.cost}
            for m in advice.merges
        ],
        "divisions": [_division(each) for each in advice.divisions],
        "tree": None if advice.tree is None else _lists(advice.tree),
        "rounds": advice.rounds,
        "together": list(map(list, advice.together)),
        "recipe": snippet(advice),
        "notes": [*([] if advised.trained else [UNTRAINED]), FORETELLS],
    }


def _division(each: Division) -> dict[str, Any]:
    return {
        "categories": list(each.categories),
        "groups": list(map(list, each.groups)),
        "round": each.round,
        "predicted": each.predicted,
        "null": None if each.verdict is None else list(each.verdict.null),
        "p": None if each.verdict is None else each.verdict.p,
        "worth": each.worth,
    }


# --- for people -----------------------------------------------------------------------------------------


def print_advice(advised: Advised, advice: Advice, stream: TextIO) -> None:
    """Print affinities, what merges and divisions cost, and the tree."""
    console, unit = console_for(stream), advised.task.unit
    console.print(
        f"{advised.name} · {len(advice.categories)} categories · {percent(advice.separation)} of the units off",
        style="bold",
    )
    _print_affinity(console, advice, advised.config.attribution.score)
    if advice.merges:
        _print_merges(console, advice, unit)
    _print_divisions(console, advice, unit)
    console.print("\nRecommended", style="bold")
    console.print(_recommended(advised, advice), soft_wrap=True)  # a line of a recipe must stay one
    for note in [*([] if advised.trained else [UNTRAINED]), FORETELLS]:
        console.print(f"\n{note}", style="dim")


def _print_affinity(console: Console, advice: Advice, score: str) -> None:
    console.print(f"\nAffinity of the categories' units ({score}; 1: the same, 0: chance)", style="bold")
    names, half = advice.categories, (advice.upper - advice.lower) / 2
    for chunk in in_columns(console, names, 14, 9):
        grid = table_for(console, "category", *chunk)
        for i, name in enumerate(names):
            cells = [(names.index(other), other) for other in chunk]
            grid.add_row(
                name,
                *(
                    "·" if j == i else f"{float(advice.affinity[i, j]):+.2f}" if j > i else f"±{float(half[i, j]):.2f}"
                    for j, _ in cells
                ),
            )
        console.print(grid)
    console.print("below the diagonal: half of the 95 % interval over rows", style="dim")


def _print_merges(console: Console, advice: Advice, unit: str) -> None:
    console.print("\nMerges that the tree makes, from every category alone", style="bold")
    grid = table_for(console, "joins", "groups", "J", "cost", text=(0,))
    grid.add_row("none", str(len(advice.categories)), two_digits(advice.apart), "")
    for merge in advice.merges:
        joined = " | ".join("+".join(group) for group in merge.joined)
        grid.add_row(joined, str(merge.groups), two_digits(merge.predicted), _signed(merge.cost))
    console.print(grid)
    console.print(
        f"J: what the units that stay on cannot make up for, nats per {unit}, as many units off whatever the "
        f"groups; cost: of the merge; below 0: together they lose less. J orders cuts; its size is off by a factor.",
        style="dim",
    )


def _print_divisions(console: Console, advice: Advice, unit: str) -> None:
    tested = any(each.verdict for each in advice.divisions)
    console.print("\nDivisions, level by level", style="bold")
    head = ["of", "into", "J", *(["permuted", "p"] if tested else []), "verdict"]
    grid = table_for(console, *head, text=(0, 1, len(head) - 1))
    for each in advice.divisions:
        verdict, cells = each.verdict, []
        if verdict:
            mean = sum(verdict.null) / len(verdict.null)
            cells = [f"{mean / max(verdict.predicted, sys.float_info.min):.2f}", two_digits(verdict.p)]
        grid.add_row(
            "+".join(each.categories),
            " | ".join("+".join(group) for group in each.groups),
            two_digits(each.predicted),
            *cells,
            "divide" if each.worth else "keep together",
        )
    console.print(grid)
    if tested:
        few = " Rows of one document are alike: where documents are few, they are told apart, too."
        console.print(
            f"permuted: J of splits by labels that mean nothing, over J of one by the true ones; p: of so low a J by "
            f"chance, divided up to {advice.divisions[0].level:g}.{few if unit == 'token' else ''}",
            style="dim",
        )


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + two_digits(abs(value))


def _recommended(advised: Advised, advice: Advice) -> str:
    """Return the snippet, or why there is none, and what it takes."""
    found = snippet(advice)
    if found is None:
        return (
            "Nothing here is worth separating: no division loses clearly less than one by labels that mean nothing.\n"
            "More rows, or a network that was trained for longer, may say otherwise."
        )
    lines = [found] if found else []
    if advice.tree is None:
        groups = len(advice.divisions[0].groups)
        lines.append(f"No tree is needed: rounds.0.branching {groups} gives every category its own expert.")
    have = len(advised.config.rounds)
    if advice.rounds > have:
        lines.append(f"It takes {advice.rounds} rounds, the recipe has {have}: groups that are left stay whole.")
    return "\n".join(lines)
