"""What self-routing gives on held-out rows, measured once for all ways to use a router.

Where the likeliest expert has less than a threshold, a second opinion is asked: the token runs along the second
expert's route, too, and the two next-token distributions are averaged, weighted by the experts' probabilities. What
later tokens attend to stays that of the first. Running every unit instead was tried as a way out of doubt and made
every loss worse, the more the higher the threshold: a split model has learned to work along routes
(benchmarks/LOG.md).

Where tokens are hidden from the network, so they are from the router: it reads all of a row, which is one position of
the mean nats of what is hidden.

Axes: R rows, P positions (1 where a row is one example), E experts, K opinions (first, second).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from moeify.evaluation import position_nats
from moeify.recipe.config import Evaluation
from moeify.routed.split_model import SplitModel
from moeify.routers.router import Kind, Router, category_of_leaf, early, leaf_of_category
from moeify.task import Batch, HeldOut, Partial, Task

Twin = Literal["dense", "told"]


@dataclass(frozen=True)
class Readings:
    """What was measured on a held-out split, before any policy: all nats are per position."""

    categories_R: Int[Tensor, " rows"]
    leaves_R: Int[Tensor, " rows"]
    """The leaf that serves each row's label."""
    prefix: int
    """Positions that a ``document`` router reads."""
    log_p_RPE: Float64[Tensor, "rows positions experts"]
    label_RP: Float64[Tensor, "rows positions"]
    """Nats along the label's route."""
    twins: Mapping[Twin, Float64[Tensor, "rows positions"]]
    routed: Mapping[Kind, Float64[Tensor, "rows positions opinions"]]
    """Nats of each opinion along the routes that this kind of router takes."""

    @property
    def causal(self) -> slice:
        """Positions of which a ``document`` decision knows nothing that comes later."""
        return slice(self.prefix - 1, None)

    def decided(self, kind: Kind) -> Float64[Tensor, "rows positions experts"]:
        """Return the log probabilities that decide at each position."""
        return decided(self.log_p_RPE, kind, self.prefix)

    def asked(self, kind: Kind, threshold: float) -> Bool[Tensor, "rows positions"]:
        """Say at which positions a second opinion is asked."""
        return self.decided(kind).amax(-1).exp() < threshold

    def nats(self, kind: Kind, threshold: float) -> Float64[Tensor, "rows positions"]:
        """Return the nats of a policy."""
        nats_RPK = self.routed[kind]
        if nats_RPK.shape[-1] == 1:
            return nats_RPK[..., 0]
        weight_RPK = self.decided(kind).topk(2).values.log_softmax(-1)
        mixed_RP = -torch.logsumexp(weight_RPK - nats_RPK, dim=-1)
        return torch.where(self.asked(kind, threshold), mixed_RP, nats_RPK[..., 0])


@torch.no_grad()
def read(
    model: SplitModel,
    twins: Mapping[Twin, SplitModel],
    task: Task,
    settings: Evaluation,
    split: HeldOut,
    router: Router,
    kinds: Sequence[Kind],
) -> Readings:
    """Return what every policy of these kinds costs on a held-out split."""
    number = settings.validation_rows if split == "validation" else settings.test_rows
    alone = one_route(model, task)
    prefix = 1 if isinstance(task, Partial) or task.unit == "example" else max(1, task.units_per_row // 4)
    parts: list[Readings] = []
    for batch in task.held_out_batches(split, number, settings.rows_at_once):
        log_p_RPE = router.read(early(model.network, batch.inputs))
        if isinstance(task, Partial):
            log_p_RPE = log_p_RPE[:, -1:]
        opinions = 1 if alone else 2
        routed: dict[Kind, Tensor] = {}
        for kind in kinds:
            choices_RPK = decided(log_p_RPE, kind, prefix).topk(opinions).indices
            parts_of_rows = torch.arange(len(choices_RPK)).chunk(opinions)  # K copies of a part need no more memory
            routed[kind] = torch.cat(
                [opinion_nats(model, task, batch.take(rows), choices_RPK[rows]) for rows in parts_of_rows]
            )
        parts.append(
            Readings(
                batch.categories,
                leaf_of_category(model)[batch.categories],
                prefix,
                log_p_RPE,
                _nats(task, model(batch.inputs, batch.categories), batch.targets),
                {
                    name: _nats(task, twin(batch.inputs, batch.categories), batch.targets)
                    for name, twin in twins.items()
                },
                routed,
            )
        )
    return _joined(parts)


def decided(
    log_p_RPE: Float64[Tensor, "rows positions experts"], kind: Kind, prefix: int
) -> Float64[Tensor, "rows positions experts"]:
    """Return the log probabilities that decide at each position: its own, or those that the first tokens gave."""
    return log_p_RPE if kind == "token" else log_p_RPE[:, [prefix - 1]].expand_as(log_p_RPE)


def opinion_nats(
    model: SplitModel, task: Task, batch: Batch, choices_RPK: Int[Tensor, "rows positions opinions"]
) -> Float64[Tensor, "rows positions opinions"]:
    """Return the nats of each position's target along the routes of its chosen experts.

    All come from one pass over K copies of each row. A token of the first copy attends to that copy as ever; one of
    another copy attends to itself and to the first copy's tokens before it, so it is an opinion and leaves no trace.
    Where a row has one route, there is one opinion: that of the first position's expert.
    """
    categories_RPK = category_of_leaf(model)[choices_RPK]
    rows, positions, opinions = choices_RPK.shape
    if one_route(model, task):
        return _nats(task, model(batch.inputs, categories_RPK[:, 0, 0]), batch.targets).unsqueeze(-1)
    place = torch.arange(positions).repeat(opinions)
    copy = torch.arange(opinions).repeat_interleave(positions)
    before = (copy == 0) & (place < place.unsqueeze(1))
    allowed = before | torch.eye(len(place), dtype=torch.bool)
    like = next(model.network.parameters())
    mask = torch.zeros(allowed.shape, dtype=like.dtype).masked_fill(~allowed, torch.finfo(like.dtype).min)
    outputs = model(
        batch.inputs.repeat(1, opinions),
        categories_RPK.transpose(1, 2).flatten(1),
        attention_mask=mask.expand(rows, 1, *mask.shape),
        position_ids=place.unsqueeze(0),
    )
    nats = position_nats(task, outputs, batch.targets.repeat(1, opinions))
    return nats.view(rows, opinions, positions).transpose(1, 2)


def one_route(model: SplitModel, task: Task) -> bool:
    """Say whether a row has one route: an example, one that heads look over, or one whose tokens see each other."""
    return task.unit == "example" or model.whole_rows or isinstance(task, Partial)


def _nats(task: Task, outputs: Tensor, targets: Tensor) -> Float64[Tensor, "rows positions"]:
    """Return the nats of every position; of a row with hidden tokens, as one position, the mean of these."""
    if isinstance(task, Partial):
        return task.nats(outputs, targets).double().unsqueeze(1) / task.units_per_row
    return position_nats(task, outputs, targets)


def _joined(parts: Sequence[Readings]) -> Readings:
    first = parts[0]
    return Readings(
        torch.cat([part.categories_R for part in parts]),
        torch.cat([part.leaves_R for part in parts]),
        first.prefix,
        torch.cat([part.log_p_RPE for part in parts]),
        torch.cat([part.label_RP for part in parts]),
        {name: torch.cat([part.twins[name] for part in parts]) for name in first.twins},
        {kind: torch.cat([part.routed[kind] for part in parts]) for kind in first.routed},
    )
