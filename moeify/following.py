"""Compensation that follows: behind each block, output weights make up for what the whole network has lost by then.

The closed form (``moeify.splitting.compensation``) takes each site as if all before it were whole. Here sites are gone
through in the network's order. What the network held behind a site before the cut, less what it holds there now, is
what is still missing, whichever site lost it; a change of the site's output weights that brings most of it back is a
ridge regression on the units that are left. Units are read as the cut network has them, as Frantar and Alistarh,
"SparseGPT", 2023 (arXiv 2301.00774) calibrate a layer on pruned ones before it; that the target is the residual stream,
which holds what those have lost, is what pays (benchmarks/LOG.md).

Axes: rows R, features F of a site (its units', side by side), stream D.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from attribution.measure import Uncounted
from attribution.reading import at_readers, wide
from attribution.subject import Probe, Subject
from attribution.table import AttributionTable
from moeify.divergence import AtHand, memory
from moeify.models.units import ConvUnits, FfnUnits, UnitSite, as_output, stream_of
from moeify.recipe.partition import Compensation
from moeify.routed.split_model import SplitModel
from moeify.shares import assign, like, whole
from moeify.splitting.partition import Partition
from moeify.splitting.propose import Proposal
from moeify.task import Task
from moeify.task_subject import subject_of
from moeify.world import World


def cut(
    model: SplitModel,
    proposal: Proposal,
    table: AttributionTable,
    compensation: Compensation | None,
    optimizer: Optimizer | None,
    task: Task,
    batches: Callable[[], Iterable[Probe | Uncounted]],
    world: World,
) -> None:
    """Cut a model in place (``SplitModel.cut``), and let its output weights follow where ``compensation`` says so.

    ``batches`` returns the rows to follow on anew at each call, as many batches as every worker has, in each of them
    this worker's.
    """
    uncut = Uncut.of(model, proposal) if compensation and compensation.follow else None
    model.cut(proposal, table, compensation, optimizer)
    if compensation and uncut:
        at = AtHand(task)
        with memory(lambda: f"compensation that follows, worker {world.rank}, {at}"):
            follow(model, uncut, task, lambda: at.of(batches()), compensation.ridge, world)


@dataclass(frozen=True)
class Uncut:
    """What a model was before a cut, with its units where they lie behind it."""

    partition: Partition
    """Its nodes own in one piece what theirs will own between them, so that it fits the new order too."""
    weights: Mapping[str, Tensor]
    """Output weights by name of the parameter, shared out as that is."""

    @classmethod
    def of(cls, model: SplitModel, proposal: Proposal) -> "Uncut":
        """Return what a model is that is about to be cut."""
        weights = {}
        for site in model.space.sites:
            parameter = model.network.get_parameter(site.output)
            part = next(part for part in site.slices if part.parameter == site.output)
            moved = part.entries(proposal.order[site.name]).to(parameter.device)
            weights[site.output] = like(parameter, whole(parameter.detach()).index_select(part.axis, moved))
        return cls(model.partition, weights)

    @contextmanager
    def again(self, model: SplitModel) -> Iterator[None]:
        """Let the model, which has been cut since, compute what it did before while the context lasts."""
        parameters = {name: model.network.get_parameter(name) for name in self.weights}
        cut, corrected = model.partition, {name: like(each, each.detach()) for name, each in parameters.items()}
        try:
            self._become(model, self.partition, self.weights)
            yield
        finally:
            self._become(model, cut, corrected)

    @staticmethod
    def _become(model: SplitModel, partition: Partition, weights: Mapping[str, Tensor]) -> None:
        model.repartition(partition)
        for name, weight in weights.items():
            assign(model.network.get_parameter(name), weight)


@dataclass
class _Sums:
    """What the regression of a site needs: A = sum a a^T, B = sum a e^T over places, e what the stream lacks there."""

    units_FF: Float64[Tensor, "features features"]
    missing_FD: Float64[Tensor, "features dim"]
    whole_2: Float64[Tensor, "2"]
    """Sum over places of the mean square of a feature before the cut, and their number."""

    @classmethod
    def zeros(cls, features: int, dim: int, device: torch.device) -> "_Sums":
        sizes = ((features, features), (features, dim), (2,))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, before: "_Seen", after: "_Seen") -> None:
        """Add the places of a batch: matrix products in their own precision, added up in float64."""
        self.units_FF += after.units.T @ after.units
        self.missing_FD += after.units.T @ (before.stream - after.stream)
        places = len(before.units)
        self.whole_2 += torch.tensor([float(before.units.double().square().mean()) * places, places]).to(self.whole_2)

    def change(self, ridge: float) -> Float64[Tensor, "features dim"]:
        """Return argmin over V of E||a V - e||^2 + l ||V||^2; l: ``ridge`` times a feature's mean square before."""
        pull, places = ridge * self.whole_2[0], self.whole_2[1]
        if not bool(pull > 0):
            return torch.zeros_like(self.missing_FD)
        left_FF = (self.units_FF + self.units_FF.T) / 2
        left_FF.diagonal().add_(pull)
        factor_FF, info = torch.linalg.cholesky_ex(left_FF)
        change_FD = torch.cholesky_solve(self.missing_FD, factor_FF)
        if int(info) or not bool(change_FD.isfinite().all()):
            raise ValueError(
                f"what {int(places):,} places of a site's units have in common is not positive definite with ridge "
                f"{ridge}; check that activations are finite, or raise ridge"
            )
        return change_FD


@dataclass(frozen=True)
class _Seen:
    """What a pass shows of a site, a line a place."""

    units: Float[Tensor, "places features"]
    stream: Float[Tensor, "places dim"]


class _SeenError(Exception):
    """All has been seen that a pass was for; what comes after it is not run."""


@torch.no_grad()
def follow(
    model: SplitModel,
    uncut: Uncut,
    task: Task,
    batches: Callable[[], Iterable[Probe | Uncounted]],
    ridge: float,
    world: World,
) -> None:
    """Correct the output weights of a model that has just been cut, in place, site after site.

    ``batches`` as in ``cut``; two passes of them a site, each as far as the site. ``ridge``: the pull towards the
    weights as they are, as ``compensate`` counts it. Convolutions keep theirs: what they read is patches.
    """
    subject = subject_of(task, model.network, model.space.readers, model)
    for site in model.space.sites:
        if isinstance(site, ConvUnits):
            continue
        parameter = model.network.get_parameter(site.output)
        weight = whole(parameter)
        weight_DF = as_output(weight, site)
        dim, features = weight_DF.shape
        sums = _Sums.zeros(features, dim, weight_DF.device)
        for batch in batches():
            rows = batch.rows if isinstance(batch, Uncounted) else batch
            if not len(rows.categories):
                continue
            with uncut.again(model):
                before = _see(model, subject, site, rows)
            after = _see(model, subject, site, rows)
            if not isinstance(batch, Uncounted):
                sums.add(before, after)
        world.sum([sums.units_FF, sums.missing_FD, sums.whole_2])
        weight_DF.add_(sums.change(ridge).T.to(weight_DF))
        if weight is not parameter:
            assign(parameter, weight)


def _see(model: SplitModel, subject: Subject, site: UnitSite, rows: Probe) -> _Seen:
    """Run rows in the model's own order and return what a site's reader read, and the stream behind, row after row."""
    order = model.order(rows.categories)
    seen: dict[str, Tensor] = {}

    def read(units: Tensor) -> Tensor:
        seen["units"] = units
        return units

    def streams(_: nn.Module, __: Any, output: Any) -> None:
        seen["stream"] = stream_of(output)
        if not isinstance(model.network, FSDPModule):  # whose workers go through all of a pass together
            raise _SeenError

    name = site.stream if isinstance(site, FfnUnits) else None
    behind = subject.network.get_submodule(name or site.site.reader)
    handle = behind.register_forward_hook(streams)
    try:
        reading = at_readers(subject, len(order), {site.name: read})
        with subject.still(), torch.no_grad(), model.masked(), reading, suppress(_SeenError):
            subject.forward(rows.inputs[order], rows.categories[order])
    finally:
        handle.remove()
    back, units = torch.argsort(order), seen["units"].detach()
    # OPT's way out hands on tokens without rows.
    stream = seen["stream"].detach().reshape(*units.shape[:-1], seen["stream"].shape[-1])
    lines = (wide(each[back.to(each.device)]).flatten(0, -2) for each in (units, stream))
    return _Seen(*lines)
