"""Sections of a model card about what was done and measured after an export was cut out: recovery, speed."""

from collections.abc import Iterator, Sequence
from typing import Literal

from moeify.export.recovery import Recovery
from moeify.export.speeds import Speed, Speeds
from moeify.export.stock import Stock
from moeify.result import MEAN, Result
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouterReport

FileForm = Literal["gguf", "onnx"]
"""What a model in one file may be."""


def recovered(recovery: Recovery | None, part: SplitModel) -> Iterator[str]:
    """Say what a recovery cost, and what it did to all categories."""
    if recovery is None:
        return
    yield from ("## Recovery", "")
    yield (
        f"After that all that is left was trained on, for {recovery.steps:,} steps on {recovery.rows:,} train rows "
        f"({recovery.read:,} {recovery.unit}s) of {', '.join(recovery.retained)}, and of no other category. "
        f"Validation loss (nats per {recovery.unit}):"
    )
    losses = (recovery.intact, recovery.before, recovery.after)
    rows = [
        [c, "kept" if c in recovery.retained else "taken out", *(f"{loss[c]:.4f}" for loss in losses)]
        for c in part.categories
    ]
    yield from ("", *table(["category", "expert", "whole split model", "expert taken out", "recovered"], rows))


def routed(report: LayerRouterReport | None, result: Result | None) -> Iterator[str]:
    """Say what routing without labels costs, against labels and against the dense twin."""
    if report is None:
        return
    losses = {"routed by label": report.label, "by its routers": report.router}
    if report.joint:
        losses = {"by label, before": report.joint.label, **losses}
    twin = "dense, trained on as long" if report.joint and report.joint.dense else "dense"
    if report.joint and report.joint.dense:
        losses[twin] = report.joint.dense
    elif result and "dense" in result.test_loss:
        dense = {c: result.test_loss["dense"][c] for c in report.label if c != MEAN}
        losses[twin] = dense | {MEAN: sum(dense.values()) / len(dense)}
    yield from ("## Its own routers (test loss, nats per token)", "")
    rows = [[category, *(f"{loss[category]:.4f}" for loss in losses.values())] for category in report.label]
    yield from table(["category", *losses], rows)
    yield ""
    if twin in losses:
        over, same = report.router[MEAN] - losses[twin][MEAN], ", trained on as long" if twin != "dense" else ""
        yield f"**On text without labels it is {over:+.4f} nats a token against the dense twin{same}.**"
    if report.joint:
        yield (
            f"Network and routers learned together for {report.joint.steps:,} steps, on {report.joint.tokens:,} tokens "
            f"beyond the run's own, so the losses of the run above are of the network before that."
        )
    right = ", ".join(f"{share:.0%}" for share in report.accuracy.values())
    yield (
        f"That is {report.router_tax:+.2%} above routing by label. A router is a linear map of what its layer's "
        f"experts read, trained to tell the label, all else frozen. By layer it sends so many of the tokens to their "
        f"label's expert: {right}."
    )


def timed(speed: Speeds | None, stock: Stock | None, file: FileForm | None) -> Iterator[str]:
    """Say how fast it is, and how near that is to what the saved work allows."""
    if speed is None:
        return
    yield from (f"## Speed ({speed.unit}s a second)", "")
    columns = ["work", "batch", "route", "dense", "this", "times as fast", "limit", "of the limit"]
    yield from table(columns, [_cells(row) for row in speed.rows])
    runtime = "this package" if stock is None else "transformers"
    runtime = {"gguf": "llama.cpp", "onnx": "onnxruntime"}[file] if file else runtime
    threads = f"{speed.threads} thread" + ("s" if speed.threads > 1 else "")
    yield ""
    yield f"In {runtime}, {speed.dtype}, on {threads} of a CPU; dense: a network as large as the dense twin, likewise."
    if speed.prompt is not None:
        decode = "; decode: adds tokens, one a row and step, behind as many" if file != "onnx" else ", with no cache"
        yield f"prefill: reads {speed.prompt} tokens a row{decode}."
    yield "limit: what the work saved on the route allows on that machine; in brackets, what most of the time goes to."


def _cells(row: Speed) -> list[str]:
    fast = [f"{rate:,.0f}" for rate in (row.dense, row.export)]
    return [
        row.work,
        f"{row.batch}",
        row.route,
        *fast,
        f"{row.over_dense:.2f}",
        f"{row.limit:.2f} ({row.bound})",
        f"{row.of_limit:.1%}",
    ]


def table(columns: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, all columns but the first to the right."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
