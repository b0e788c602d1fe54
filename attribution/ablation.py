"""Exact ablation, the oracle that every estimate is compared with: take units out, run again, look at the loss.

A token is what the readers' input has as a position; a row of maps, or without positions, is one token.
Axes: rows R, sets S, units U, features F, categories C.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from attribution.reading import at_readers
from attribution.sites import Site
from attribution.subject import Probe, Segment, Subject, segments

Value = Literal["zero", "mean"]
"""What stands in for a removed unit: ``zero``, or ``mean``: its mean over all tokens of all categories, a feature at a
time (a channel's over its map, too)."""


def single(units: int) -> Bool[Tensor, "units units"]:
    """Return the sets of one unit each.

    >>> single(2).tolist()
    [[True, False], [False, True]]
    """
    return torch.eye(units, dtype=torch.bool)


def ablation_rises(
    subject: Subject,
    batches: Sequence[Probe],
    site: str,
    sets: Bool[Tensor, "sets units"],
    *,
    value: Value = "zero",
    at_once: int = 256,
) -> Float64[Tensor, "sets categories"]:
    """Return the true rise of each category's mean loss when a set of units is replaced at its reader's input.

    Nats per token. Rows are repeated next to each other, once a set, so that many sets share a forward pass of at most
    ``at_once`` rows and a batch in category order stays so. Costs one forward pass of the data a set and one more, two
    with ``value="mean"``. ValueError for sets of another shape than the site's and for categories without rows.

    >>> ablation_rises(asked, rows, "first", single(2)).tolist()  # units x categories
    [[2.0, 0.0], [0.0, 1.0]]
    """
    where = subject.site(site)
    _check_bool("sets", sets)
    if sets.ndim != 2 or sets.shape[1] != where.units:
        raise ValueError(f"sets must be [sets {where.units}], the units of site {site!r}, got {list(sets.shape)}")
    check_value(value)
    if at_once < 1:
        raise ValueError(f"at_once must be at least one row, got {at_once}")
    sums = CategorySums(subject.categories, len(sets))
    with subject.still(), torch.no_grad():
        stand_in = _means(subject, batches, [where])[site] if value == "mean" else None
        for batch in batches:
            for rows in torch.arange(len(batch.categories)).split(at_once) if len(batch.categories) else ():
                part = _Part(subject, batch, rows)
                loss_R = part.losses({site: lambda x: x})
                rises = []
                for some_SU in sets.split(max(1, at_once // len(rows))) if len(sets) else ():
                    keep_XU = ~some_SU.repeat(len(rows), 1)
                    loss_X = part.losses({site: _replacing(where, keep_XU, stand_in)}, copies=len(some_SU))
                    rises.append(loss_X.view(len(rows), -1) - loss_R[:, None])
                sums.add(part.segments, torch.cat(rises, 1) if rises else loss_R.new_zeros(len(rows), 0), part.tokens)
    return sums.means()


def joint_rises(
    subject: Subject,
    batches: Sequence[Probe],
    removed: Mapping[str, Bool[Tensor, " units"] | Bool[Tensor, "categories units"]],
    *,
    value: Value = "zero",
) -> Float64[Tensor, " categories"]:
    """Return the true rise of each category's mean loss when units of several sites are replaced at once.

    ``removed``: by site, the same units for all categories, or each category its own, as a partition does. Nats per
    token; two forward passes of the data, three with ``value="mean"``.

    >>> joint_rises(asked, rows, {"first": torch.tensor([True, False]), "second": torch.tensor([True, True])}).tolist()
    [2.0, 1.0]
    """
    check_value(value)
    sites = [subject.site(name) for name in removed]
    keeps_CU = {}
    for site in sites:
        units = removed[site.name]
        shape = (len(subject.categories), site.units)
        _check_bool(f"the removed units of site {site.name!r}", units)
        if tuple(units.shape) not in (shape, shape[1:]):
            raise ValueError(
                f"the removed units of site {site.name!r} must be [{site.units}] or [{shape[0]} {site.units}], got "
                f"{list(units.shape)}"
            )
        keeps_CU[site.name] = ~units.expand(shape)
    if not sites:
        raise ValueError("no sites to remove units from; give at least one")
    sums = CategorySums(subject.categories, 1)
    with subject.still(), torch.no_grad():
        stand_ins = _means(subject, batches, sites) if value == "mean" else {}
        for batch in batches:
            if not len(batch.categories):
                continue
            part = _Part(subject, batch, torch.arange(len(batch.categories)))
            loss_R = part.losses({site.name: lambda x: x for site in sites})
            category_R = batch.categories.cpu().long()
            changes = {
                site.name: _replacing(site, keeps_CU[site.name][category_R], stand_ins.get(site.name)) for site in sites
            }
            sums.add(part.segments, (part.losses(changes) - loss_R)[:, None], part.tokens)
    return sums.means()[0]


class CategorySums:
    """Float64 sums by category over rows, and the tokens they were taken over."""

    def __init__(self, names: Sequence[str], items: int) -> None:
        self.names = names
        self.sums_XC = torch.zeros(items, len(names), dtype=torch.float64)
        self.tokens_C = torch.zeros(len(names), dtype=torch.float64)

    def add(self, parts: Sequence[Segment], terms: Float[Tensor, "rows items"], tokens: int) -> None:
        """Count rows of so many ``tokens`` each."""
        terms_RX = terms.detach().to("cpu", torch.float64)
        for part in parts:
            self.sums_XC[:, part.category] += terms_RX[part.where].sum(0)
            self.tokens_C[part.category] += part.rows * tokens

    def means(self) -> Float64[Tensor, "items categories"]:
        """Return the means over tokens; ValueError for categories without any, and for sums that are not finite."""
        empty = [name for name, tokens in zip(self.names, self.tokens_C.tolist(), strict=True) if tokens == 0]
        if empty:
            raise ValueError(f"no rows of {', '.join(map(repr, empty))}; give rows of every category")
        for name, sums_X in zip(self.names, self.sums_XC.T, strict=True):
            if not bool(sums_X.isfinite().all()):
                raise ValueError(
                    f"the network gives a NaN or infinite score on category {name!r}; look at its weights and the "
                    f"inputs of that category"
                )
        return self.sums_XC / self.tokens_C


class _Part:
    """Some rows of a batch, and where their categories are."""

    def __init__(self, subject: Subject, batch: Probe, rows: Tensor) -> None:
        where = rows.to(batch.inputs.device)
        self._subject = subject
        self.categories = batch.categories[rows.to(batch.categories.device)]
        self.ids = batch.ids[rows.to(batch.ids.device)]
        self.inputs = batch.inputs[where]
        self.targets = batch.targets[rows.to(batch.targets.device)]
        self.segments = segments(self, subject.categories)
        self.tokens = 0

    def losses(self, changes: Mapping[str, Callable[[Tensor], Tensor]], copies: int = 1) -> Float64[Tensor, " rows"]:
        """Return each row's summed loss, its copies next to each other, with the sites' activations changed."""
        inputs, categories, targets = (
            tensor.repeat_interleave(copies, 0) if copies > 1 else tensor
            for tensor in (self.inputs, self.categories, self.targets)
        )
        seen: dict[str, int] = {}

        def watched(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def watch(x: Tensor) -> Tensor:
                seen[name] = self._subject.site(name).arrange(x).shape[1]
                return change(x)

            return watch

        with at_readers(self._subject, len(inputs), {name: watched(name, c) for name, c in changes.items()}):
            outputs = self._subject.forward(inputs, categories)
        if len(set(seen.values())) > 1:
            raise ValueError(f"the sites differ in positions a row, so in what a token is: {seen}; take them apart")
        self.tokens = next(iter(seen.values()))
        return self._subject.row_nats(outputs, targets).detach().to("cpu", torch.float64)


def check_value(value: str) -> None:
    """Refuse what is not a ``Value``.

    >>> check_value("zero")
    """
    if value not in ("zero", "mean"):
        raise ValueError(f"value must be 'zero' or 'mean', got {value!r}")


def _check_bool(what: str, chosen: Tensor) -> None:
    """Refuse numbers, of which ``~`` is no negation."""
    if chosen.dtype != torch.bool:
        raise ValueError(f"{what} must be torch.bool, True where a unit is removed, got {chosen.dtype}; give x.bool()")


def _replacing(
    site: Site, keep_RU: Bool[Tensor, "rows units"], stand_in: Float64[Tensor, " features"] | None
) -> Callable[[Tensor], Tensor]:
    """Return the change that puts a site's stand-ins (none: zeros) where ``keep_RU`` is False."""

    def change(x: Tensor) -> Tensor:
        kept = site.keeping(keep_RU.to(x.device, x.dtype), x).bool()
        if stand_in is None:
            return torch.where(kept, x, 0)
        filler = stand_in.to(x.device, x.dtype)
        return torch.where(kept, x, filler.view(-1, *[1] * (x.ndim - 2)) if site.spatial else filler)

    return change


def _means(
    subject: Subject, batches: Sequence[Probe], sites: Sequence[Site]
) -> dict[str, Float64[Tensor, " features"]]:
    """Return each feature's mean over all tokens of all categories (a channel's also over its map)."""
    totals = {site.name: torch.zeros(site.features, dtype=torch.float64) for site in sites}
    terms = {site.name: 0 for site in sites}

    def adding(site: Site) -> Callable[[Tensor], Tensor]:
        def add(x: Tensor) -> Tensor:
            values_FX = x.transpose(0, 1).flatten(1) if site.spatial else x.flatten(0, -2).t()
            totals[site.name] += values_FX.to("cpu", torch.float64).sum(1)
            terms[site.name] += values_FX.shape[1]
            return x

        return add

    for batch in batches:
        if len(batch.categories):
            with at_readers(subject, len(batch.categories), {site.name: adding(site) for site in sites}):
                subject.forward(batch.inputs, batch.categories)
    if not all(terms.values()):
        raise ValueError("no batches to take means over; give at least one row")
    return {name: total / terms[name] for name, total in totals.items()}
