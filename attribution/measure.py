"""One pass over data that measures every unit of every site against every category.

A batch costs one forward and two backward passes (labels sampled from the model, then true labels), whatever the
number of sites and categories. Parameters take no part in them: no weight gradient is computed.

Axes: rows R, positions P of a row (1 where activations are [rows units]), units U, categories C, output dim D.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from attribution.sites import Site
from attribution.table import AttributionTable, SiteSums

_MASK = 2**64 - 1


@runtime_checkable
class Probe(Protocol):
    """Rows to measure. In category order they are reduced without copies; any order gives the same sums."""

    @property
    def inputs(self) -> Tensor:
        """What the network takes; rows first."""
        ...

    @property
    def targets(self) -> Tensor:
        """The true labels, as ``nats`` takes them; rows first."""
        ...

    @property
    def categories(self) -> Int[Tensor, " rows"]:
        """Index of each row's category."""
        ...

    @property
    def ids(self) -> Int[Tensor, " rows"]:
        """Each row's number, the same however rows are batched and sharded: it seeds the row's sampled labels."""
        ...


def measure(
    forward: Callable[[Tensor, Tensor], Tensor],
    network: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Probe],
    nats: Callable[[Tensor, Tensor], Tensor],
    sample: Callable[[Tensor, Sequence[int]], Tensor],
    categories: Sequence[str],
    *,
    seed: int = 0,
) -> AttributionTable:
    """Measure ``network`` on ``batches``; tables of shards add up to the table of the whole.

    ``forward(inputs, categories)`` runs the network and returns its outputs; ``nats(outputs, targets)`` is each row's
    summed loss; ``sample(outputs, seeds)`` draws targets from the model's own distribution, one seed a row.
    The reader of every site runs once a forward pass, on activations [rows ... units]; all positions count as tokens,
    padding included. The network runs in eval mode; its modes and ``requires_grad`` are restored.

    Everything adds up in float64 from terms in the activations' precision (half precision is widened to float32).
    Second moments of a batch are matrix products in that precision: for float32 a relative error of some 1e-7.
    """
    readers = _readers(network, sites)
    taps = [_Tap(site, len(categories)) for site in sites]
    counts = torch.zeros(len(categories), dtype=torch.float64)
    rows = torch.zeros(len(categories), dtype=torch.float64)
    seen = False
    with ExitStack() as stack:
        stack.enter_context(_still(network))
        stack.enter_context(torch.enable_grad())
        for tap, reader in zip(taps, readers, strict=True):
            stack.callback(reader.register_forward_pre_hook(tap.before, with_kwargs=True).remove)
            stack.callback(reader.register_forward_hook(tap.after).remove)
        for batch in batches:
            if len(batch.categories) == 0:
                continue
            segments = _segments(batch, categories)
            positions = _both_passes(forward, batch, segments, taps, nats, sample, categories, seed)
            for category, _, number in segments:
                rows[category] += number
                counts[category] += number * positions
            seen = True
    if not seen:
        raise ValueError("no batches to measure; give at least one row")
    return AttributionTable(tuple(categories), counts, rows, {tap.site.name: tap.sums() for tap in taps})


def row_seed(seed: int, row: int) -> int:
    """Mix a pass's seed and a row's id into 63 bits (splitmix64), so that neighbours do not correlate."""
    state = (seed * 0x9E3779B97F4A7C15 + row + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1


_Segment = tuple[int, slice | Tensor, int]
"""A category, where its rows are, and how many."""


class _Tap:
    """Reduces one site's activations and gradients to sums by category the moment they arrive."""

    def __init__(self, site: Site, categories: int) -> None:
        self.site = site
        self._categories = categories
        self._sums: SiteSums | None = None
        self.begin([], 0)

    def begin(self, segments: Sequence[_Segment], rows: int) -> None:
        """Forget the last batch; ``segments`` are those of the next."""
        self._segments = segments
        self._rows = rows
        self.calls = 0
        self.positions = 0
        self.labels: Literal["sampled", "true"] = "sampled"
        self.arrived: set[str] = set()
        self._input_RPU: Tensor | None = None
        self._fisher_RU: Tensor | None = None

    def sums(self) -> SiteSums:
        """Return the sums so far, on the CPU."""
        assert self._sums is not None
        return self._sums.to(torch.device("cpu"))

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """Capture the reader's input (a forward pre-hook)."""
        name, units = self.site.name, self.site.units
        self.calls += 1
        if self.calls > 1:
            raise ValueError(
                f"the reader {self.site.reader!r} of site {name!r} ran more than once in a forward pass; "
                f"a site is read at one place: give each use a module of its own"
            )
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(f"the reader {self.site.reader!r} of site {name!r} must take its input first, as a tensor")
        activation: Tensor = args[0]
        if activation.ndim < 2 or activation.shape[0] != self._rows or activation.shape[-1] != units:
            raise ValueError(
                f"site {name!r} has {units} units and the batch {self._rows} rows, so the input of "
                f"{self.site.reader!r} must be [{self._rows} ... {units}], got {list(activation.shape)}"
            )
        # A view of its own, so that the gradient is the one through this reader alone.
        activation = activation.view_as(activation) if activation.requires_grad else activation.detach()
        activation.requires_grad_()
        self._input_RPU = _widen(activation, self._rows)
        self.positions = self._input_RPU.shape[1]
        activation.register_hook(self._input_gradient)
        return (activation, *args[1:]), kwargs

    def after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Listen at the reader's output (a forward hook) and add up the second moment of its input."""
        assert self._input_RPU is not None
        name = self.site.name
        if not isinstance(output, Tensor) or output.shape[0] != self._rows or not output.requires_grad:
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"the reader {self.site.reader!r} of site {name!r} must return a tensor [{self._rows} ... dim] "
                f"that depends on its input, got {got}"
            )
        if self._sums is None:
            self._sums = SiteSums.zeros(self.site.units, output.shape[-1], self._categories, output.device)
        self._add_moment(self._sums.inputs, self._input_RPU)
        output.register_hook(self._output_gradient)

    def _input_gradient(self, gradient: Tensor) -> None:
        assert self._sums is not None
        assert self._input_RPU is not None
        sums, self.arrived = self._sums, self.arrived | {self.labels}
        change_RPU = _widen(gradient, self._rows) * self._input_RPU
        if self.labels == "sampled":
            self._fisher_RU = fisher_RU = change_RPU.square().sum(1, dtype=torch.float64) / 2
            self._add(sums.fisher, sums.fisher_squares, fisher_RU)
            return
        assert self._fisher_RU is not None
        taylor_RU = -change_RPU.sum(1, dtype=torch.float64)
        self._add(sums.absolute, sums.absolute_squares, change_RPU.abs_().sum(1, dtype=torch.float64))
        self._add(sums.taylor, None, taylor_RU)
        self._add(None, sums.report_squares, taylor_RU + self._fisher_RU)

    def _output_gradient(self, gradient: Tensor) -> None:
        if self.labels == "sampled":
            assert self._sums is not None
            self._add_moment(self._sums.outputs, _widen(gradient, self._rows))

    def _add(
        self,
        total_UC: Float64[Tensor, "units categories"] | None,
        squares_UC: Float64[Tensor, "units categories"] | None,
        terms_RU: Float64[Tensor, "rows units"],
    ) -> None:
        for category, where, _ in self._segments:
            if total_UC is not None:
                total_UC[:, category] += terms_RU[where].sum(0)
            if squares_UC is not None:
                squares_UC[:, category] += terms_RU[where].square().sum(0)

    def _add_moment(
        self, moment_CXX: Float64[Tensor, "categories x x"], terms_RPX: Float[Tensor, "rows positions x"]
    ) -> None:
        for category, where, _ in self._segments:
            terms_TX = terms_RPX[where].flatten(0, 1)
            moment_CXX[category] += terms_TX.T @ terms_TX

    def check(self, what: Literal["activation", "gradient"], categories: Sequence[str]) -> None:
        """Refuse sums that are not finite."""
        assert self._sums is not None
        sums = self._sums
        if what == "activation":
            sums_C = sums.inputs.diagonal(dim1=1, dim2=2).sum(1)
        else:
            sums_C = (sums.fisher + sums.absolute).sum(0) + sums.outputs.diagonal(dim1=1, dim2=2).sum(1)
        bad = (~sums_C.isfinite()).nonzero()
        if len(bad):
            raise ValueError(
                f"site {self.site.name!r} has a NaN or infinite {what} on category {categories[int(bad[0])]!r}; "
                f"look at the network's weights and the inputs of that category"
            )


def _both_passes(
    forward: Callable[[Tensor, Tensor], Tensor],
    batch: Probe,
    segments: Sequence[_Segment],
    taps: Sequence[_Tap],
    nats: Callable[[Tensor, Tensor], Tensor],
    sample: Callable[[Tensor, Sequence[int]], Tensor],
    categories: Sequence[str],
    seed: int,
) -> int:
    """Run one batch through the taps and return the positions a row."""
    for tap in taps:
        tap.begin(segments, len(batch.categories))
    outputs = forward(batch.inputs.detach(), batch.categories)
    for tap in taps:
        if tap.calls == 0:
            raise ValueError(f"the reader {tap.site.reader!r} of site {tap.site.name!r} did not run in forward")
        if tap.positions != taps[0].positions:
            raise ValueError(
                f"site {tap.site.name!r} has {tap.positions} positions a row, site {taps[0].site.name!r} "
                f"{taps[0].positions}; measure sites with different positions in separate passes"
            )
        tap.check("activation", categories)
    seeds = [row_seed(seed, row) for row in batch.ids.tolist()]
    with torch.no_grad():
        sampled = sample(outputs.detach(), seeds)
    for labels, targets in (("sampled", sampled), ("true", batch.targets)):
        loss_R = nats(outputs, targets)
        if tuple(loss_R.shape) != (len(batch.categories),):
            raise ValueError(f"nats must return one loss a row [{len(batch.categories)}], got {list(loss_R.shape)}")
        for tap in taps:
            tap.labels = "sampled" if labels == "sampled" else "true"
        if loss_R.requires_grad:
            torch.autograd.backward(loss_R.sum(), retain_graph=labels == "sampled")
        for tap in taps:
            if labels not in tap.arrived:
                raise ValueError(f"the loss does not depend on the units of site {tap.site.name!r}; drop the site")
    positions = taps[0].positions
    for tap in taps:
        tap.check("gradient", categories)
        tap.begin([], 0)
    return positions


def _readers(network: nn.Module, sites: Sequence[Site]) -> list[nn.Module]:
    if not sites:
        raise ValueError("no sites to measure; give at least one")
    names = [site.name for site in sites]
    if len(set(names)) != len(names):
        raise ValueError(f"sites must have distinct names, got {names}")
    modules = dict(network.named_modules())
    for site in sites:
        if site.reader not in modules:
            near = difflib.get_close_matches(site.reader, modules, n=3, cutoff=0.5) or [n for n in modules if n][:3]
            raise ValueError(
                f"site {site.name!r}: the network has no module {site.reader!r}; nearest: {', '.join(near) or 'none'}"
            )
    return [modules[site.reader] for site in sites]


def _segments(batch: Probe, names: Sequence[str]) -> list[_Segment]:
    """Return where each category's rows are: slices if the batch is in category order, else indices."""
    categories = batch.categories.cpu()
    for what, tensor in (("inputs", batch.inputs), ("targets", batch.targets), ("ids", batch.ids)):
        if len(tensor) != len(categories):
            raise ValueError(f"a batch has {len(categories)} categories but {len(tensor)} rows of {what}")
    if int(categories.min()) < 0 or int(categories.max()) >= len(names):
        raise ValueError(
            f"a batch has categories {int(categories.min())} to {int(categories.max())}; "
            f"there are {len(names)}, numbered from 0: {', '.join(names)}"
        )
    ordered = bool((categories[1:] >= categories[:-1]).all())
    segments: list[_Segment] = []
    start = 0
    for category, number in enumerate(torch.bincount(categories, minlength=len(names)).tolist()):
        if number:
            where = slice(start, start + number) if ordered else (categories == category).nonzero().squeeze(1)
            segments.append((category, where, number))
        start += number
    return segments


def _widen(values: Tensor, rows: int) -> Float[Tensor, "rows positions x"]:
    """Detach, bring to [rows positions x], and widen half precision to float32."""
    values = values.detach().reshape(rows, -1, values.shape[-1])
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@contextmanager
def _still(network: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients for the time being."""
    modes = [(module, module.training) for module in network.modules()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    network.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
