"""What a router costs, as tables for people."""

from typing import TextIO

from rich.console import Console

from moeify.routers.report import Compared, RouterReport
from pipelines.tables import console_for, in_columns, table_for
from pipelines.wording import nats, percent


def print_router(run: str, report: RouterReport, stream: TextIO) -> None:
    """Print how the router is used and why, what it costs, and how far it can be believed."""
    console = console_for(stream)
    console.print(f"{run} · {_use(report)}", style="bold")
    if report.later:
        _print_choices(console, report)
    if report.whole:
        where = ", all tokens" if report.later else ""
        _print_losses(console, report.whole, f"Test loss (nats per {report.unit}{where})")
    if report.later:
        _print_losses(
            console, report.later, f"Test loss (nats per token, behind the first {report.prefix} tokens of a row)"
        )
    console.print("router tax: by router above by label, in % of it; over ...: by router above the twin", style="dim")
    _print_decisions(console, report)


def _use(report: RouterReport) -> str:
    each = {"token": "a decision a token", "document": "a decision a row"}[report.kind]
    return f"router: {each}, second opinion {_below(report.threshold)}" if report.later else f"router: {each}"


def _below(threshold: float) -> str:
    return f"below {threshold:.0%}" if threshold else "never"


def _signed(share: float | None) -> str:
    return "-" if share is None else f"{share:+.2%}"


def _print_choices(console: Console, report: RouterReport) -> None:
    console.print(f"\nWays to use it (validation; nats per token behind the first {report.prefix})", style="bold")
    head = ("kind", "2nd opinion", "asked", "loss", "router tax", "all tokens", "router tax", "")
    table = table_for(console, *head, text=(0, 1, 7))
    for choice in report.choices:
        taken = choice.kind == report.kind and choice.threshold == report.threshold
        table.add_row(
            choice.kind,
            _below(choice.threshold),
            percent(choice.asked),
            nats(choice.loss),
            _signed(choice.router_tax),
            nats(choice.loss_all),
            _signed(choice.router_tax_all),
            "taken" if taken else "",
        )
    console.print(table)
    console.print(
        "asked: of the tokens; each takes one more pass. all tokens: also those before a document is decided",
        style="dim",
    )


def _print_losses(console: Console, compared: Compared, title: str) -> None:
    console.print(f"\n{title}", style="bold")
    twins = [arm for arm in compared.loss if arm not in ("label", "router")]
    over = {"dense": compared.over_dense, "told": compared.over_told or {}}
    head = ["category", "by label", "by router", *twins, "router tax", *(f"over {twin}" for twin in twins)]
    table = table_for(console, *head)
    for category in compared.loss["label"]:
        table.add_row(
            category,
            *(nats(compared.loss[arm][category]) for arm in ("label", "router", *twins)),
            _signed(compared.router_tax[category]),
            *(nats(over[twin][category], signed=True) for twin in twins),
        )
    if compared.router_tax_error is not None:
        blank = ("",) * (2 + len(twins))
        table.add_row("±", *blank, f"{compared.router_tax_error:.2%}", nats(compared.over_dense_error))
    console.print(table)


def _print_decisions(console: Console, report: RouterReport) -> None:
    what = {"token": "tokens", "document": "rows"}[report.kind]
    widest = max(len(category) for category in report.confusion)
    for chunk in in_columns(console, report.experts, widest + 2, max(4, *map(len, report.experts)) + 2):
        console.print(f"\nWho serves whom (test; share of a category's {what})", style="bold")
        table = table_for(console, "category", *chunk)
        for category, shares in report.confusion.items():
            table.add_row(category, *(f"{shares[expert]:.0%}" if shares[expert] else "·" for expert in chunk))
        console.print(table)
    told = f"right: {percent(report.accuracy)} of decisions"
    if report.accuracy_sure is not None and report.accuracy_unsure is not None:
        told += f"; {percent(report.accuracy_sure)} where sure, {percent(report.accuracy_unsure)} of the others"
    console.print(f"{told}; calibration error {percent(report.calibration_error)}", style="dim")
    if report.unit == "token":
        lengths = report.accuracy_after
        console.print("\nRight after so many tokens (test; share of rows)", style="bold")
        table = table_for(console, *(str(length) for length in lengths), text=())
        table.add_row(*(percent(share) for share in lengths.values()))
        console.print(table)
