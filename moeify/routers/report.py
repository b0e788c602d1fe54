"""How well a router routes, in numbers: accuracy, confusion, calibration, and what it costs."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.evaluation import RowLosses, tax_error
from moeify.recipe.closed import Closed
from moeify.result import MEAN
from moeify.routers.readings import Readings
from moeify.routers.router import Kind, Router
from moeify.routers.served import ServedText
from moeify.task import Partial, Task

_BINS = 15
"""Of equal width, for the expected calibration error."""


class Choice(Closed):
    """One way to use the router, on validation data."""

    kind: Kind
    threshold: float
    """Probability below which a second opinion is asked; 0: never."""
    asked: float
    """Fraction of tokens (or examples) with a second opinion; each costs one more token's forward pass."""
    loss: float
    """Nats per token (or example), mean over categories, over what comes after the prefix, unseen by either kind."""
    router_tax: float
    """Rise of that loss above routing by label, as a fraction of it."""
    loss_all: float | None
    """Nats per token over whole rows; None for ``document``, which would know of tokens that come later."""
    router_tax_all: float | None
    """Rise of ``loss_all`` above routing by label, as a fraction."""


class Compared(Closed):
    """Losses over the same tokens (or examples): by category and their mean, in nats per token (or example)."""

    loss: dict[str, dict[str, float]]
    """``label``: the split model routed by label; ``router``: routed by itself; ``dense``, ``told``: the twins."""
    router_tax: dict[str, float]
    """Rise of ``router`` above ``label``, as a fraction of it."""
    router_tax_error: float | None
    """Standard error of the mean's, from paired rows."""
    over_dense: dict[str, float]
    """``router`` above the dense twin, nats: the comparison that counts without labels."""
    over_dense_error: float | None
    """Standard error of the mean's, nats, from paired rows."""
    over_told: dict[str, float] | None
    """``router`` above the told twin, which has the label, nats; None where the run has none."""


class RouterReport(Closed):
    """How well a router routes; all but ``choices`` on test data."""

    kind: Kind
    threshold: float
    """Probability below which a second opinion is asked; 0: never."""
    experts: tuple[str, ...]
    unit: Literal["token", "example"]
    prefix: int
    """Tokens (1 for an example; all, where some are hidden) that a ``document`` router reads before it decides, in
    these figures."""
    choices: tuple[Choice, ...]
    asked: float
    """Fraction of tokens (or examples) with a second opinion."""
    accuracy: float
    """Fraction of decisions (a token's, or a row's) for the label's expert."""
    accuracy_sure: float | None
    """Of decisions whose probability reaches the threshold; None where there are none."""
    accuracy_unsure: float | None
    """Of the others."""
    accuracy_after: dict[int, float]
    """Tokens read -> fraction of rows for which the likeliest expert is the label's."""
    confusion: dict[str, dict[str, float]]
    """Category -> expert -> fraction of the category's decisions."""
    calibration_error: float
    """Expected calibration error of the likeliest expert's probability: mean distance of accuracy from it."""
    whole: Compared | None
    """Over whole rows; None for ``document`` routers of text, which would know of tokens that come later."""
    later: Compared | None
    """Over tokens after the prefix; None where a row is one example."""
    texts: tuple[ServedText, ...] = ()
    """Of validation data; empty where rows hold no text, or in reports from before they were kept."""


def judge(readings: Readings, task: Task, kind: Kind, threshold: float) -> Choice:
    """Return what one way to use a router costs."""
    nats_RP, label_RP = readings.nats(kind, threshold), readings.label_RP
    loss, label = (_mean(readings, task, each[:, readings.causal]) for each in (nats_RP, label_RP))
    whole = kind == "token"
    loss_all, label_all = _mean(readings, task, nats_RP), _mean(readings, task, label_RP)
    return Choice(
        kind=kind,
        threshold=threshold,
        asked=readings.asked(kind, threshold).double().mean().item(),
        loss=loss,
        router_tax=loss / label - 1.0,
        loss_all=loss_all if whole else None,
        router_tax_all=loss_all / label_all - 1.0 if whole else None,
    )


def report(
    router: Router, readings: Readings, task: Task, choices: Sequence[Choice], texts: Sequence[ServedText] = ()
) -> RouterReport:
    """Return a router's figures; ``choices`` and ``texts`` are kept beside them."""
    text, kind = task.unit == "token" and not isinstance(task, Partial), router.kind
    log_p_RPE = readings.log_p_RPE if kind == "token" else readings.log_p_RPE[:, [readings.prefix - 1]]
    confidence_RP, chosen_RP = log_p_RPE.exp().max(-1)
    right_RP = (chosen_RP == readings.leaves_R.unsqueeze(1)).double()
    unsure_RP = confidence_RP < router.threshold
    likeliest_RP = readings.log_p_RPE.argmax(-1) == readings.leaves_R.unsqueeze(1)
    positions = likeliest_RP.shape[1]
    lengths = [*(2**i for i in range(positions.bit_length()) if 2**i < positions), positions]
    confusion = {
        category: {
            expert: (chosen_RP[readings.categories_R == c] == e).double().mean().item()
            for e, expert in enumerate(router.experts)
        }
        for c, category in enumerate(task.categories)
    }
    return RouterReport(
        kind=kind,
        threshold=router.threshold,
        experts=router.experts,
        unit=task.unit,
        prefix=read_first(task, readings),
        choices=tuple(choices),
        asked=readings.asked(kind, router.threshold).double().mean().item(),
        accuracy=right_RP.mean().item(),
        accuracy_sure=_mean_or_none(right_RP[~unsure_RP]),
        accuracy_unsure=_mean_or_none(right_RP[unsure_RP]),
        accuracy_after=(
            {read_first(task, readings): right_RP.mean().item()}
            if isinstance(task, Partial)
            else {length: likeliest_RP[:, length - 1].double().mean().item() for length in lengths}
        ),
        confusion=confusion,
        calibration_error=calibration_error(confidence_RP.flatten(), right_RP.flatten()),
        whole=_compared(router, readings, task, slice(None)) if kind == "token" or not text else None,
        later=_compared(router, readings, task, readings.causal) if text else None,
        texts=tuple(texts),
    )


def read_first(task: Task, readings: Readings) -> int:
    """Return how many tokens of a row a ``document`` router reads before it decides."""
    return task.length if isinstance(task, Partial) else readings.prefix


def calibration_error(confidence_N: Float[Tensor, " n"], right_N: Float[Tensor, " n"]) -> float:
    """Return the expected calibration error: |accuracy - confidence| of each bin, weighted by its decisions."""
    bins_N = (confidence_N * _BINS).long().clamp_max(_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins_N, (right_N - confidence_N).double())
    return (gaps.abs().sum() / len(confidence_N)).item()


def _compared(router: Router, readings: Readings, task: Task, where: slice) -> Compared:
    routed_RP = readings.nats(router.kind, router.threshold)
    arms = [("label", readings.label_RP), ("router", routed_RP), *readings.twins.items()]
    rows = {arm: _rows(readings, task, nats_RP[:, where]) for arm, nats_RP in arms}
    loss = {arm: _with_mean(each.by_category(task)) for arm, each in rows.items()}
    error = tax_error(rows["router"], rows["label"], task)
    return Compared(
        loss=loss,
        router_tax={c: loss["router"][c] / label - 1.0 for c, label in loss["label"].items()},
        router_tax_error=None if error is None else error / loss["label"][MEAN],
        over_dense={c: loss["router"][c] - dense for c, dense in loss["dense"].items()},
        over_dense_error=tax_error(rows["router"], rows["dense"], task),
        over_told={c: loss["router"][c] - told for c, told in loss["told"].items()} if "told" in loss else None,
    )


def _rows(readings: Readings, task: Task, nats_RP: Tensor) -> RowLosses:
    """Return rows whose nats per unit are the mean over these positions."""
    return RowLosses(nats_RP.mean(1) * task.units_per_row, readings.categories_R)


def _mean(readings: Readings, task: Task, nats_RP: Tensor) -> float:
    return _with_mean(_rows(readings, task, nats_RP).by_category(task))[MEAN]


def _with_mean(loss: Mapping[str, float]) -> dict[str, float]:
    return {**loss, MEAN: sum(loss.values()) / len(loss)}


def _mean_or_none(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
