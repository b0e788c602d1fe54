"""One pass over data that measures every unit of every site against every category.

A batch costs one forward and one backward pass with true labels, and one more backward for the Fisher information of
the model's own distribution, whatever the number of sites and categories. Parameters take no part: no weight gradient
is computed.

Axes: rows R, positions P of a row (1 where activations are [rows units] or maps), units U, width W, features F,
categories C.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from attribution.hashing import row_seed
from attribution.moments import ExactMoment, Moment, SketchedMoment
from attribution.reading import Kept, apart, at_readers, wide
from attribution.scratch import Scratch, chunks, over_features
from attribution.sites import Site, output_weight, patches
from attribution.stability import Stability, Watch
from attribution.subject import Probe, Segment, Subject, segments
from attribution.table import AttributionTable, SiteSums

Labels = Literal["true", "model", "output"]
"""What is carried back: the loss of the true labels, a draw from the model's own distribution, or one output."""


@dataclass(frozen=True)
class Moments:
    """Second moments of inputs and output gradients, in the same pass."""

    columns: int | None = None
    """Random sketch with so many columns, for moments of more features: memory and time go by features * columns.
    None: exact, features^2."""
    sites: tuple[str, ...] | None = None
    """Only of these sites, so that large networks can be measured a few sites at a time. None: of all."""

    def __post_init__(self) -> None:
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be at least 1, got {self.columns}; give none for exact moments")

    def zeros(self, categories: int, features: int, device: torch.device) -> Moment:
        """Return an empty moment: exact where a sketch would hold as much."""
        if self.columns is None or features <= self.columns:
            return ExactMoment.zeros(categories, features, device)
        return SketchedMoment.zeros(categories, features, self.columns, device)


@dataclass(frozen=True)
class Uncounted:
    """Rows that are run and not counted, for a worker that has none of a batch: passes of a network that is sharded by
    ``fully_shard`` take every worker."""

    rows: Probe


def measure(
    subject: Subject,
    batches: Iterable[Probe | Uncounted],
    *,
    seed: int = 0,
    samples: int = 1,
    exact_outputs: int = 0,
    moments: Moments | None = None,
    stability: Stability | None = None,
) -> AttributionTable:
    """Measure ``subject`` on ``batches``; tables of shards add up to the table of the whole.

    A batch costs a forward pass, a backward pass with true labels and, if the subject has a ``root`` or can ``sample``,
    one more for each of ``samples`` draws, whose mean makes the Fisher information less noisy; no gradient is a
    parameter's. Of a network with at most ``exact_outputs`` outputs a row, [rows outputs], the report is not signed
    Taylor + 1/2 Fisher but nats(outputs - sum a d outputs / d a) - nats(outputs): only the network is taken for
    straight, and not the loss for a parabola (of linearised networks: Immer, Korzepa and Bauer 2021, arXiv 2008.08400).
    That is a backward pass more for every output, and ``nats`` is called with float64 outputs.

    The reader of every site runs once a forward pass; all positions count as tokens, padding included. Everything adds
    up in float64 from products in float64 of what the network computed; second moments of a batch are matrix products
    in the activations' precision (half precision is widened to float32), for float32 a relative error of some 1e-7.
    Raises ValueError for sites, categories or values that make no sense, by name.

    Of a network whose loss each active unit takes its activation off; 2.0 in rows of the category "left", 1.0 in those
    of "right" (so in all examples of this package):

    >>> table = measure(asked, rows)
    >>> table.score("first", "taylor").tolist()  # units x categories, nats
    [[2.0, 0.0], [0.0, 1.0]]
    >>> (measure(asked, rows[:1]) + measure(asked, rows[1:])).score("first", "fisher").tolist()  # of shards
    [[2.0, 0.0], [0.0, 0.5]]
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}; give the subject no 'root' or 'sample' for none")
    table = _empty(subject, moments)
    depth = _Depth(seed, samples, exact_outputs)
    scratch = Scratch()
    taps = [_Tap(site, subject.reader(site), table.sites[site.name], samples, scratch) for site in subject.sites]
    watch = Watch(stability) if stability else None
    with ExitStack() as stack:
        stack.enter_context(subject.still())
        for tap in taps:
            if tap.sums.outputs is not None:
                stack.callback(tap.reader.register_forward_hook(tap.after).remove)
        for batch in batches:
            if isinstance(batch, Uncounted):
                _one_batch(subject, batch.rows, [], taps, table, depth)
            elif len(batch.categories):
                parts = segments(batch, subject.categories)
                _one_batch(subject, batch, parts, taps, table, depth)
            if watch and watch.settled(table):
                break
    if not bool(table.rows.any()):
        raise ValueError("no batches to measure; give at least one row")
    return table.to(torch.device("cpu"))


def _empty(subject: Subject, moments: Moments | None) -> AttributionTable:
    if moments and moments.sites is not None:
        for name in moments.sites:
            subject.site(name)
    sums = {site.name: unmeasured(subject, site, moments) for site in subject.sites}
    return AttributionTable.empty(subject.categories, sums)


def unmeasured(subject: Subject, site: Site, moments: Moments | None = None) -> SiteSums:
    """Return a site's sums before the first row, where its reader is."""
    number, reader, pair = len(subject.categories), subject.reader(site), None
    device = next(reader.parameters(), torch.empty(0)).device
    if moments and (moments.sites is None or site.name in moments.sites):
        inputs, dim = output_weight(reader, site).shape
        pair = moments.zeros(number, inputs, device), moments.zeros(number, dim, device)
    return SiteSums.zeros(site.units, site.features, number, device, pair)


@dataclass(frozen=True)
class _Depth:
    """How much is asked of a batch, see ``measure``."""

    seed: int
    samples: int
    exact_outputs: int


class _Tap:
    """Reduces one site's activations and gradients to sums by category the moment they arrive."""

    def __init__(self, site: Site, reader: nn.Module, sums: SiteSums, samples: int, scratch: Scratch) -> None:
        self.site = site
        self.reader = reader
        self.sums = sums
        self.samples = samples
        self.scratch = scratch
        self.begin([], 0)

    def begin(self, parts: Sequence[Segment], rows: int) -> None:
        """Forget the last batch; ``parts`` are those of the next."""
        self._parts = parts
        self._rows = rows
        self.positions = 0
        self.labels: Labels = "true"
        self.arrived: set[str] = set()
        self.kept: Kept | None = None
        self._taylor_RU: Tensor | None = None
        self._fisher_RU: Tensor | float = 0.0
        self._drawn = 0
        self.exact = False
        self._moves: list[Tensor] = []

    def read(self, activation: Tensor) -> Tensor:
        """Take the reader's input, and listen to its gradient."""
        activation = apart(activation)
        self.kept = Kept(self.site, activation)
        with torch.autocast(activation.device.type, enabled=False):  # sums are exact all the same
            self._add_up(self.kept.value)
        activation.register_hook(self._input_gradient)
        return activation

    def after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Listen at the reader's output (a forward hook): [rows ...], or [rows*positions dim] in some layers."""
        lengths = (self._rows, self._rows * self.positions)
        if not isinstance(output, Tensor) or output.shape[0] not in lengths or not output.requires_grad:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the reader {self.site.reader!r} of site {self.site.name!r} must return a tensor [{self._rows} ...] "
                f"that depends on its input, got {got}"
            )
        output.register_hook(self._output_gradient)

    def _add_up(self, activation: Tensor) -> None:
        """Add up what the activations alone say."""
        site, sums, rows = self.site, self.sums, self._rows
        arranged = site.arrange(activation)
        self.positions = arranged.shape[1]
        rate_RU = _no_sums((rows, site.units), activation.device)
        total_RF, power_RF = (_no_sums((rows, site.features), activation.device) for _ in range(2))
        for some in chunks(arranged):
            a_rPUW, active_rPUW = self.scratch.pair(arranged[some])
            torch.ne(a_rPUW.copy_(arranged[some]), 0, out=active_rPUW)
            rate_RU[some] = over_features(active_rPUW, torch.amax).sum(1)
            if site.spatial:
                total_RF[some], power_RF[some] = a_rPUW.mean(3)[:, 0], a_rPUW.square_().mean(3)[:, 0]
            else:
                total_RF[some] = a_rPUW.sum(1).flatten(1)
                power_RF[some] = a_rPUW.square_().sum(1).flatten(1)
        self._add(sums.rate, rate_RU)
        self._add(sums.total, total_RF)
        self._add(sums.power, power_RF)
        if sums.inputs is not None:
            for part in self._parts:
                sums.inputs.add(part.category, patches(self.reader, site, wide(activation[part.where])).flatten(0, 1))

    def _input_gradient(self, gradient: Tensor) -> None:
        assert self.kept is not None
        site, sums = self.site, self.sums
        self.arrived = self.arrived | {self.labels}
        arranged, gradients = site.arrange(self.kept.value), site.arrange(gradient.detach())
        squares_RU, taylor_RU, absolute_RU = (_no_sums((self._rows, site.units), gradient.device) for _ in range(3))
        for some in chunks(arranged):
            g_rPUW, a_rPUW = self.scratch.pair(arranged[some])
            g_rPUW.copy_(gradients[some]).mul_(a_rPUW.copy_(arranged[some]))
            z_rPU = over_features(g_rPUW, torch.sum)
            if self.labels != "model":
                taylor_RU[some] = -z_rPU.sum(1)
            if self.labels == "true":
                absolute_RU[some] = torch.abs(z_rPU, out=a_rPUW[..., 0]).sum(1)
            squares_RU[some] = z_rPU.square_().sum(1) / 2
        if self.labels == "output":
            self._moves.append(taylor_RU)
            return
        if self.labels == "model":
            self._drawn += 1
            self._fisher_RU = self._fisher_RU + squares_RU / self.samples
            if self._drawn == self.samples:
                assert self._taylor_RU is not None
                self._add(sums.fisher, self._fisher_RU, sums.fisher_squares)
                if not self.exact:
                    self._add(sums.report, self._taylor_RU + self._fisher_RU, sums.report_squares)
            return
        self._taylor_RU = taylor_RU
        self._add(sums.empirical, squares_RU, sums.empirical_squares)
        self._add(sums.taylor, taylor_RU, sums.taylor_squares)
        self._add(sums.absolute, absolute_RU, sums.absolute_squares)

    def _output_gradient(self, gradient: Tensor) -> None:
        outputs = self.sums.outputs
        if self.labels != "model" or outputs is None:
            return
        gradient = gradient.detach()
        if gradient.shape[0] != self._rows:
            gradient = gradient.view(self._rows, self.positions, -1)
        for part in self._parts:
            terms = wide(gradient[part.where])
            if isinstance(self.reader, nn.Conv2d):
                terms = terms.flatten(2).sum(2) / terms[0, 0].numel() ** 0.5
            outputs.add(part.category, terms.reshape(-1, terms.shape[-1]) / self.samples**0.5)

    def report_exactly(self, subject: Subject, outputs: Float[Tensor, "rows outputs"], targets: Tensor) -> None:
        """Take the loss at the outputs that each unit's removal would move in a straight line."""
        moved_RUK = outputs.detach().double()[:, None] + torch.stack(self._moves, 2)
        targets = targets.double() if targets.is_floating_point() else targets
        per_unit = targets.repeat_interleave(self.site.units, 0)
        after_RU = subject.row_nats(moved_RUK.flatten(0, 1), per_unit).view(self._rows, -1)
        before_R = subject.row_nats(outputs.detach().double(), targets)
        self._add(self.sums.report, after_RU - before_R[:, None], self.sums.report_squares)

    def _add(
        self,
        total_XC: Float64[Tensor, "x categories"],
        terms_RX: Float64[Tensor, "rows x"],
        squares_XC: Float64[Tensor, "x categories"] | None = None,
    ) -> None:
        for part in self._parts:
            mine_RX = terms_RX[part.where]
            total_XC[:, part.category] += mine_RX.sum(0)
            if squares_XC is not None:
                squares_XC[:, part.category] += mine_RX.square().sum(0)

    def check(self, what: Literal["activation", "gradient"], categories: Sequence[str]) -> None:
        """Refuse sums that are not finite."""
        sums = self.sums
        if what == "activation":
            sums_C = sums.power.sum(0)
        else:
            sums_C = (sums.fisher + sums.absolute).sum(0)
            sums_C = sums_C + sums.outputs.trace() if sums.outputs is not None else sums_C
        bad = (~sums_C.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"site {self.site.name!r} has a NaN or infinite {what} on category {categories[int(bad[0])]!r}; "
                f"look at the network's weights and the inputs of that category"
            )


def _one_batch(
    subject: Subject,
    batch: Probe,
    parts: Sequence[Segment],
    taps: Sequence[_Tap],
    table: AttributionTable,
    depth: _Depth,
) -> None:
    """Run one batch through the taps and count those of its rows that ``parts`` name."""
    for tap in taps:
        tap.begin(parts, len(batch.categories))
    with at_readers(subject, len(batch.categories), {tap.site.name: tap.read for tap in taps}):
        outputs = subject.forward(batch.inputs.detach(), batch.categories)
    for tap in taps:
        if tap.positions != taps[0].positions:
            raise ValueError(
                f"site {tap.site.name!r} has {tap.positions} positions a row, site {taps[0].site.name!r} "
                f"{taps[0].positions}; measure sites with different positions in separate passes"
            )
        tap.check("activation", subject.categories)
    exact = outputs.ndim == 2 and outputs.shape[1] <= depth.exact_outputs and subject.draws
    for tap in taps:
        tap.exact = exact
    draws, singles = depth.samples if subject.draws else 0, outputs.shape[1] if exact else 0
    _backward(outputs, subject.cotangent(outputs, batch.targets), taps, "true", last=draws == 0)
    seeds = [row_seed(depth.seed, row) for row in batch.ids.tolist()]
    for left in reversed(range(draws)):
        drawn = subject.drawn(outputs, batch.targets, seeds)
        _backward(outputs, drawn, taps, "model", last=left + singles == 0)
        seeds = [row_seed(each, 1) for each in seeds]
    for number in range(singles):
        one = torch.zeros_like(outputs)
        one[:, number] = 1
        _backward(outputs, one, taps, "output", last=number == singles - 1)
    if exact:
        for tap in taps:
            tap.report_exactly(subject, outputs, batch.targets)
    for part in parts:
        tokens = part.rows * taps[0].positions
        table.rows[part.category] += part.rows
        table.counts[part.category] += tokens
        table.sampled[part.category] += tokens if subject.draws else 0
    for tap in taps:
        tap.check("gradient", subject.categories)
        tap.begin([], 0)


def _backward(outputs: Tensor, cotangent: Tensor, taps: Sequence[_Tap], labels: Labels, *, last: bool) -> None:
    for tap in taps:
        tap.labels = labels
    if outputs.requires_grad:
        torch.autograd.backward(outputs, cotangent, retain_graph=not last)
    for tap in taps:
        assert tap.kept is not None
        tap.kept.check(labels in tap.arrived)


def _no_sums(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return memory for sums, which holds anything."""
    return torch.empty(shape, dtype=torch.float64, device=device)
