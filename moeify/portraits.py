"""What each expert does, by example: held-out rows it is most active on, and what the model predicts worse without it.

Activity of an expert at a position: sum over its units of |activation| times the size of the weights it writes
through, as a share of the same sum over all units, 0..1; over all sites together. What is missed is measured, not
estimated: the rise of each position's loss with the expert's own units zeroed and those of all others, above and below
it, left alone. Only rows that run an expert are run without it: each row once for every expert on its route.

Axes: R rows, P positions (1 where a row is one example), E experts (nodes of the tree), U units, T tokens.
"""

import base64
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attribution import sites as sites_of
from attribution.sites import Site
from attribution.subject import IGNORED
from moeify.data.pieces import pieces, tokenizer_in
from moeify.evaluation import position_nats
from moeify.examples import MissedToken, Picture, Portrait, Portraits, Text
from moeify.routed.split_model import SplitModel
from moeify.task import Batch, Task

EXCERPT = 28
"""Tokens of an excerpt."""
_ACTIVE, _MISSED, _PICTURES = 3, 2, 6
"""Excerpts of each sort, and pictures of each sort, that an expert is shown by."""
_TOKENS = 12
"""Kinds of token named for an expert."""
_RARE = 2.0
"""Occurrences without any rise that are added to each kind of token: a rare one must rise more to be named."""
_LEAST_SIDE = 8
"""Of an image in three colours that was given as one row of numbers."""
_MOST_NATS = 1e6
"""Larger rises (a loss that became infinite) are told as this."""


@dataclass(frozen=True)
class _Looked:
    """Rows, and what every expert does on them."""

    inputs: Tensor
    targets: Tensor
    categories_R: Int[Tensor, " rows"]
    activity_RPE: Float[Tensor, "rows positions experts"]
    rise_RPE: Float[Tensor, "rows positions experts"]
    """0 where a row does not run an expert."""


@torch.no_grad()
def portraits(model: SplitModel, task: Task, rows: int, rows_at_once: int) -> Portraits:
    """Look at up to ``rows`` validation rows of each category; the same rows and model give the same portraits."""
    model.eval()
    batches = task.held_out_batches("validation", rows, rows_at_once)
    parts = [_look(model, task, batch.take(model.order(batch.categories))) for batch in batches]
    looked = _Looked(
        *(torch.cat([getattr(part, name) for part in parts]) for name in [field.name for field in fields(_Looked)])
    )
    show = _Texts(looked, task) if task.unit == "token" else _Pictures(looked, task)
    owners = [node for node, units in enumerate(model.partition.owned) if units]
    return Portraits(rows=rows, experts=tuple(_portrait(model, node, looked, task, show) for node in owners))


def _look(model: SplitModel, task: Task, batch: Batch) -> _Looked:
    """Measure rows that lie in leaf order."""
    intact_RP, activity_RPE = _activity(model, task, batch)
    rise_RPE = torch.zeros_like(activity_RPE)
    for node, units in enumerate(model.partition.owned):
        mine = _runs(model, node, batch.categories).nonzero().squeeze(1)
        if units and len(mine):
            part = batch.take(mine)
            with model.routes.ablating([node]):
                nats_rP = position_nats(task, model(part.inputs, part.categories), part.targets)
            rise_RPE[mine, :, node] = (nats_rP - intact_RP[mine]).nan_to_num(0.0).clamp(-_MOST_NATS, _MOST_NATS)
    return _Looked(batch.inputs, batch.targets, batch.categories, activity_RPE, rise_RPE)


def _activity(
    model: SplitModel, task: Task, batch: Batch
) -> tuple[Float[Tensor, "rows positions"], Float[Tensor, "rows positions experts"]]:
    """Return the nats of every position, and every expert's activity there, from one pass of the masked model."""
    partition = model.partition
    sums: list[Tensor] = []

    def read(site: Site, _: nn.Module, given: tuple[Any, ...]) -> None:
        weight = sites_of.output_weight(model.network.get_submodule(site.reader), site)
        size_UW = weight.double().reshape(site.features, -1).norm(dim=1).view(site.units, site.width)
        loud_RPU = (site.arrange(given[0]).double().abs() * size_UW).sum(-1)
        if task.unit == "example":
            loud_RPU = loud_RPU.sum(1, keepdim=True)
        shape = (*loud_RPU.shape[:2], len(partition.tree.nodes))
        sums.append(loud_RPU.new_zeros(shape).index_add_(2, partition.owners(site.name), loud_RPU))

    with ExitStack() as stack:
        for site in model.space.readers:
            hook = model.network.get_submodule(site.reader).register_forward_pre_hook(partial(read, site))
            stack.callback(hook.remove)
        stack.enter_context(model.masked())
        nats_RP = position_nats(task, model(batch.inputs, batch.categories), batch.targets)
    loud_RPE = torch.stack(sums).sum(0)
    return nats_RP, loud_RPE / loud_RPE.sum(-1, keepdim=True).clamp_min(1e-300)


def _runs(model: SplitModel, node: int, categories_R: Int[Tensor, " rows"]) -> Tensor:
    """Say which rows run an expert."""
    first, last = model.partition.tree.span(node)
    place_R = model.positions(categories_R)
    return (place_R >= first) & (place_R < last)


# --- picking and showing --------------------------------------------------------------------------------


class _Texts:
    """Shows windows of rows of tokens."""

    def __init__(self, looked: _Looked, task: Task) -> None:
        self.looked, self.task = looked, task
        self.tokenizer = tokenizer_in(task.assets())
        self.width = min(EXCERPT, looked.inputs.shape[1])
        self.counts = (_ACTIVE, _MISSED)

    def best(self, signal_RP: Float[Tensor, "rows positions"]) -> Float[Tensor, " rows"]:
        """Return what a row is worth showing for: the mean over its best window."""
        return self._means(signal_RP).amax(1)

    def example(self, node: int, row: int, signal_RP: Float[Tensor, "rows positions"]) -> Text:
        """Return a row's best window."""
        start = int(self._means(signal_RP[[row]]).argmax())
        window = slice(start, start + self.width)
        texts = list(self._pieces(self.looked.inputs[row].tolist()))
        return Text(
            category=self.task.categories[int(self.looked.categories_R[row])],
            pieces=tuple(texts[window]),
            activity=_rounded(self.looked.activity_RPE[row, window, node]),
            rise=_rounded(_of_tokens(self.looked.rise_RPE[[row], :, node])[0, window]),
        )

    def tokens(self, node: int, rows_R: Int[Tensor, " some"]) -> Iterator[MissedToken]:
        """Yield the kinds of token whose loss rises most, rare ones held back."""
        targets_N, rise_N = self.looked.targets[rows_R].flatten(), self.looked.rise_RPE[rows_R, :, node].flatten()
        asked_N = targets_N != IGNORED
        targets_N, rise_N = targets_N[asked_N], rise_N[asked_N]
        kinds_T, place_N, count_T = targets_N.unique(return_inverse=True, return_counts=True)
        total_T = rise_N.new_zeros(len(kinds_T)).index_add_(0, place_N, rise_N)
        mean_T = total_T / count_T
        first = (total_T / (count_T + _RARE)).argsort(descending=True, stable=True)[:_TOKENS].tolist()
        for kind in sorted(first, key=lambda kind: -mean_T[kind].item()):
            if mean_T[kind] > 0.0:
                rise = round(mean_T[kind].item(), 3)
                yield MissedToken(text=self._alone(int(kinds_T[kind])), count=int(count_T[kind]), rise=rise)

    def _means(self, signal_RP: Tensor) -> Tensor:
        return signal_RP.unfold(1, self.width, 1).mean(-1)

    def _pieces(self, tokens: Sequence[int]) -> Iterator[str]:
        return pieces(self.tokenizer, tokens) if self.tokenizer else (f" {token}" for token in tokens)

    def _alone(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False) if self.tokenizer else f" {token}"


class _Pictures:
    """Shows rows of numbers."""

    def __init__(self, looked: _Looked, task: Task) -> None:
        self.looked, self.task = looked, task
        self.least, self.largest = float(looked.inputs.min()), float(looked.inputs.max())
        self.counts = (_PICTURES, _PICTURES)

    def best(self, signal_RP: Float[Tensor, "rows positions"]) -> Float[Tensor, " rows"]:
        """Return what a row is worth showing for."""
        return signal_RP[:, 0]

    def example(self, node: int, row: int, _: Tensor) -> Picture:
        """Return the whole row."""
        size, values = _as_picture(self.looked.inputs[row].double())
        scaled = (values - self.least) / ((self.largest - self.least) or 1.0) * 255
        return Picture(
            category=self.task.categories[int(self.looked.categories_R[row])],
            size=size,
            pixels=base64.b64encode(scaled.round().to(torch.uint8).flatten().numpy().tobytes()).decode("ascii"),
            activity=round(self.looked.activity_RPE[row, 0, node].item(), 4),
            rise=round(self.looked.rise_RPE[row, 0, node].item(), 4),
        )

    def tokens(self, node: int, rows_R: Tensor) -> Iterator[MissedToken]:
        """Yield nothing."""
        yield from ()


def _portrait(model: SplitModel, node: int, looked: _Looked, task: Task, show: _Texts | _Pictures) -> Portrait:
    rows_R = _runs(model, node, looked.categories_R).nonzero().squeeze(1)
    activity_RP, rise_RP = looked.activity_RPE[..., node], looked.rise_RPE[..., node]
    missed_RP = _of_tokens(rise_RP) if task.unit == "token" else rise_RP
    examples = []
    for signal_RP, count in zip((activity_RP, missed_RP), show.counts, strict=True):
        best_R = show.best(signal_RP)
        picked = _picks([(best_R[row].item(), int(looked.categories_R[row]), row) for row in rows_R.tolist()], count)
        examples.append(tuple(show.example(node, row, signal_RP) for row in picked))
    return Portrait(
        expert=model.partition.tree.nodes[node].name,
        activity=round(activity_RP[rows_R].mean().item(), 4),
        rise=round(rise_RP[rows_R].mean().item(), 4),
        active=examples[0],
        missed=examples[1],
        tokens=tuple(show.tokens(node, rows_R)),
    )


def _picks(ranked: Sequence[tuple[float, int, int]], count: int) -> list[int]:
    """Return rows of (value, category, row) with the largest values, every category's best before any's second."""
    seen: dict[int, int] = {}
    turns = []
    for value, category, row in sorted(ranked, key=lambda each: (-each[0], each[2])):
        if value > 0.0:
            turns.append((seen.get(category, 0), -value, row))
            seen[category] = seen.get(category, 0) + 1
    return [row for *_, row in sorted(turns)[:count]]


def _of_tokens(rise_RP: Float[Tensor, "rows positions"]) -> Float[Tensor, "rows positions"]:
    """Return the rise of each token as it was predicted, which is said at the position before it; 0 for the first."""
    return torch.cat([torch.zeros_like(rise_RP[:, :1]), rise_RP[:, :-1]], dim=1)


def _as_picture(row: Tensor) -> tuple[tuple[int, int, int], Float[Tensor, "height width channels"]]:
    """Return a row of numbers, a plane of them or colour planes as a picture."""
    if row.ndim == 3:
        planes = row if row.shape[0] in (1, 3) else row.mean(0, keepdim=True)
    elif row.ndim == 2:
        planes = row.unsqueeze(0)
    else:
        length, third = row.numel(), row.numel() // 3
        if length == (side := math.isqrt(length)) ** 2:
            planes = row.view(1, side, side)
        elif length == 3 * (side := math.isqrt(third)) ** 2 and side >= _LEAST_SIDE:
            planes = row.view(3, side, side)
        else:
            planes = row.view(1, 1, -1)
    picture = planes.permute(1, 2, 0)
    height, width, channels = picture.shape
    return (height, width, channels), picture.contiguous()


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values.tolist())
