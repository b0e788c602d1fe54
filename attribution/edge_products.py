"""The matrix products that turn caught activations and gradients into attributions of edges.

Axes: rows R, terms T of a row (positions, or a convolution's places), groups G (rows, or all of them as one), features
F (f of some of the source's units), stream D, source blocks or units U, target blocks or units V.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from attribution.edge_table import EdgeSums, Pair
from attribution.edge_taps import Linearised, NormTap, SourceTap, WriterTap
from attribution.subject import Segment, Subject

_SCRATCH = 2**22
"""Elements of a product of features by features."""
_ROOM = 2**27
"""Elements of the blocks' outputs and gradients that are held at a time: 512 MB in float32."""


@dataclass(frozen=True)
class Blocks:
    """How a site's units are divided."""

    of: Int[Tensor, " units"]
    size: int
    whole: bool
    """One block a unit, in order."""

    @classmethod
    def make(cls, subject: Subject, site: str, given: Tensor | None) -> "Blocks":
        """Return the blocks as given, one a unit where nothing is given; ValueError if they are none."""
        units = subject.site(site).units
        if given is None:
            return cls(torch.arange(units), units, True)
        if given.shape != (units,) or given.is_floating_point() or given.dtype == torch.bool or int(given.min()) < 0:
            raise ValueError(
                f"blocks of site {site!r} must be the block number (from 0) of each of its {units} units, got "
                f"{given.dtype} {list(given.shape)}"
            )
        given = given.detach().cpu().long()
        return cls(given, int(given.max()) + 1, bool(torch.equal(given, torch.arange(units))))

    @property
    def units(self) -> int:
        """Units of the site."""
        return len(self.of)

    @cached_property
    def members(self) -> list[Int[Tensor, " some"]]:
        """The units of each block."""
        return [(self.of == block).nonzero().squeeze(1) for block in range(self.size)]

    def project(
        self, values: Float[Tensor, "rows terms features"], weight: Float[Tensor, "features dim"]
    ) -> Float[Tensor, "rows terms blocks dim"]:
        """Return each block's share of ``values weight``; the units lie side by side on both."""
        values_RTUW, weight_UWD = values.unflatten(-1, (self.units, -1)), weight.unflatten(0, (self.units, -1))
        found_RTBD = values.new_empty(*values.shape[:2], self.size, weight.shape[1])
        for block, mine in enumerate(self.members):
            mine = mine.to(values.device)
            found_RTBD[:, :, block] = values_RTUW[:, :, mine].flatten(2) @ weight_UWD[mine].flatten(0, 1)
        return found_RTBD


@dataclass(frozen=True)
class Leg:
    """One section of a writer: where edges into a site arrive."""

    gradient: Float[Tensor, "groups terms features"]
    """At the writer's output, times the norm's inverse at each token."""
    weight: Float[Tensor, "features dim"] | None
    """By which the section reads the stream; None: it is the source's own output."""
    at: slice
    """The section."""

    def through(self, outputs: Float[Tensor, "*some dim"]) -> Float[Tensor, "*some features"]:
        """Return what becomes of the reader's outputs, or the norm's, behind the writer."""
        return outputs[..., self.at] if self.weight is None else outputs @ self.weight.mT


@dataclass(frozen=True)
class Arrival:
    """All sections into a site, and the norm before them."""

    units: int
    legs: list[Leg]
    norm: Linearised | None

    def as_one_group(self) -> "Arrival":
        """Return the same with rows as further terms of one group."""
        legs = [Leg(_one_group(leg.gradient), leg.weight, leg.at) for leg in self.legs]
        norm = self.norm
        if norm:
            norm = Linearised(norm.scale, _one_group(norm.unit), _one_group(norm.inverse), norm.centred)
        return Arrival(self.units, legs, norm)

    def from_units(
        self, values: Float[Tensor, "groups terms f"], outputs: Float[Tensor, "f dim"], units: int
    ) -> Float64[Tensor, "groups units targets"]:
        """Return the contributions g x of ``units`` units whose features side by side are ``values``."""
        scaled_fD = self.norm.push(outputs) if self.norm else outputs
        found_GuV = values.new_zeros(len(values), units, self.units, dtype=torch.float64)
        for leg in self.legs:
            terms_GfF = (values.mT @ leg.gradient).mul_(leg.through(scaled_fD))
            found_GuV += _by_unit(_by_unit(terms_GfF, self.units).mT, units).mT
        if self.norm:
            # What a unit adds along the normalised stream, the norm takes back.
            along_GTu = _by_unit(values * (self.norm.unit @ outputs.mT), units)
            found_GuV -= along_GTu.mT @ self._against / outputs.shape[1]
        return found_GuV

    def at_stream(self, blocks: Blocks) -> Float[Tensor, "rows terms blocks dim"]:
        """Return each block's part of the gradient with respect to the stream."""
        parts = [blocks.project(leg.gradient, leg.weight) for leg in self.legs if leg.weight is not None]
        found_RTVD = parts[0]
        for part in parts[1:]:
            found_RTVD += part
        if self.norm:
            found_RTVD = self.norm.pull(found_RTVD)
            unit_RTD1 = self.norm.unit[..., None]
            found_RTVD -= (found_RTVD @ unit_RTD1) * unit_RTD1.mT / found_RTVD.shape[-1]
        return found_RTVD

    def at_outputs(self, outputs: Float[Tensor, "rows terms sources dim"]) -> Float64[Tensor, "rows sources units"]:
        """Return the contributions g x of blocks that put out ``outputs`` where the target is written directly."""
        found = [
            _by_unit((outputs[..., leg.at] * leg.gradient[:, :, None]).sum(1), self.units).double() for leg in self.legs
        ]
        return torch.stack(found).sum(0)

    @cached_property
    def _against(self) -> Float[Tensor, "groups terms units"]:
        """How the loss changes with each unit's pre-activations as the normalised stream moves along itself."""
        assert self.norm
        scaled_GTD = self.norm.unit * self.norm.scale
        return torch.stack([_by_unit(leg.gradient * leg.through(scaled_GTD), self.units) for leg in self.legs]).sum(0)


@dataclass(frozen=True)
class Target:
    """A site into which edges lead."""

    writers: list[WriterTap]
    norm: NormTap | None
    blocks: Blocks

    def arrival(self, direct: WriterTap | None, rows: slice | Tensor, places: slice = slice(None)) -> Arrival:
        """Return what arrived at some rows; by the writer ``direct`` alone where that is the source's reader."""
        did = self.norm.did if self.norm and not direct else None
        if did:
            did = Linearised(did.scale, did.unit[rows][:, places], did.inverse[rows][:, places], did.centred)
        legs: list[Leg] = []
        for writer in [direct] if direct else self.writers:
            gradient_RTF = writer.gradient(rows)[:, places]
            gradient_RTF = gradient_RTF * did.inverse if did else gradient_RTF
            weight_FD = None if direct else writer.input_weight()
            legs += [
                Leg(gradient_RTF[..., at], None if weight_FD is None else weight_FD[at], at) for at in writer.sections
            ]
        return Arrival(self.blocks.units, legs, did)


@dataclass(frozen=True)
class Route:
    """Edges between two sites."""

    pair: Pair
    source: SourceTap
    origin: Blocks
    target: Target
    direct: WriterTap | None
    """The writer that is the source's reader."""
    sums: EdgeSums

    def features(self) -> int:
        """Return the output features of the writers, after a forward pass."""
        writers = [self.direct] if self.direct else self.target.writers
        return sum(section.stop - section.start for writer in writers for section in writer.sections)

    def blocked(self) -> bool:
        """Return whether blocks' outputs times blocks' gradients cost less than features times features."""
        if self.direct:
            return self.origin.size < self.origin.units
        dim = self.source.weight.shape[1]
        return self.origin.size * self.target.blocks.size * dim <= len(self.source.weight) * self.features()

    def check(self) -> None:
        """Refuse what cannot be an edge, after a forward pass."""
        source, name = self.source, f"{self.pair[0]} -> {self.pair[1]}"
        for writer in [self.direct] if self.direct else self.target.writers:
            if writer.terms != source.terms:
                raise ValueError(
                    f"edges {name}: the reader {source.name!r} has {source.terms} terms a row, the writer "
                    f"{writer.name!r} {writer.terms}; edges connect units at the same positions"
                )
        for writer in [] if self.direct else self.target.writers:
            dim = writer.input_weight().shape[1]
            if dim != source.weight.shape[1]:
                raise ValueError(
                    f"edges {name}: the reader {source.name!r} writes {source.weight.shape[1]} features and the "
                    f"writer {writer.name!r} takes {dim}; they must meet in one stream"
                )
            first = self.target.norm or writer
            if source.time > first.time:
                raise ValueError(
                    f"edges {name}: {source.name!r} ran after {first.name!r}, so it cannot write what that one takes; "
                    f"order the subject's sites as they run, or give pairs"
                )

    def arrival(self, rows: slice | Tensor, places: slice = slice(None)) -> Arrival:
        """Return what arrived at the target at some rows."""
        return self.target.arrival(self.direct, rows, places)


def by_features(route: Route, part: Segment) -> None:
    """Count a category's edges from products of features by features, some units of the source at a time."""
    origin, target, source = route.origin, route.target.blocks, route.source
    product = source.width * route.features()
    some = max(1, min(origin.units, _SCRATCH // product))
    apart = route.sums.squares is not None
    room = _SCRATCH // (some * product) if apart else _ROOM // (source.terms * (len(source.weight) + route.features()))
    for rows in _chunks(part, max(1, room)):
        values_GTF, arrival = source.features(rows), route.arrival(rows)
        if not apart:
            values_GTF, arrival = _one_group(values_GTF), arrival.as_one_group()
        found_GUV = values_GTF.new_zeros(len(values_GTF), origin.size, target.size, dtype=torch.float64)
        for start in range(0, origin.units, some):
            mine = slice(start, min(origin.units, start + some))
            inputs = slice(mine.start * source.width, mine.stop * source.width)
            some_GuV = arrival.from_units(values_GTF[..., inputs], source.weight[inputs], mine.stop - start)
            if not target.whole:
                some_GuV = _merged(target, slice(None), some_GuV.mT).mT
            if origin.whole:
                found_GUV[:, mine] = some_GuV
            else:
                found_GUV += _merged(origin, mine, some_GuV)
        route.sums.add(part.category, found_GUV)


def by_blocks(routes: Sequence[Route], part: Segment) -> None:
    """Count a category's edges from the outputs of whole blocks, which routes through the stream share."""
    origins = {route.source: route.origin for route in routes}
    arrivals = {route.pair[1]: route for route in routes if not route.direct}
    dim = routes[0].source.weight.shape[1]
    held = dim * sum(blocks.size for blocks in (*origins.values(), *(r.target.blocks for r in arrivals.values())))
    terms, at_once = routes[0].source.terms, max(1, _ROOM // held)
    for rows in _chunks(part, max(1, at_once // terms)):
        sums: list[Tensor] = []
        for start in range(0, terms, at_once):
            places = slice(start, start + at_once)
            outputs = {
                source: origin.project(source.features(rows)[:, places], source.weight)
                for source, origin in origins.items()
            }
            pulled = {n: r.arrival(rows, places).at_stream(r.target.blocks) for n, r in arrivals.items()}
            found = [_meet(r, outputs[r.source], pulled.get(r.pair[1]), rows, places) for r in routes]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        for route, found_RUV in zip(routes, sums, strict=True):
            route.sums.add(part.category, found_RUV)


def _meet(
    route: Route, outputs_RTUD: Tensor, pulled_RTVD: Tensor | None, rows: slice | Tensor, places: slice
) -> Float64[Tensor, "rows sources targets"]:
    """Return each row's contributions g x between blocks."""
    if pulled_RTVD is not None:
        return (outputs_RTUD.transpose(1, 2).flatten(2) @ pulled_RTVD.transpose(1, 2).flatten(2).mT).double()
    found_RUV = route.arrival(rows, places).at_outputs(outputs_RTUD)
    return _merged(route.target.blocks, slice(None), found_RUV.mT).mT


def _merged(blocks: Blocks, units: slice, values_GUX: Tensor) -> Float64[Tensor, "groups blocks x"]:
    """Add up some units by block, on the second axis."""
    found_GBX = values_GUX.new_zeros(len(values_GUX), blocks.size, values_GUX.shape[2])
    return found_GBX.index_add_(1, blocks.of[units].to(values_GUX.device), values_GUX)


def _by_unit(values: Tensor, units: int) -> Tensor:
    """Add up features that lie side by side, on the last axis."""
    return values if values.shape[-1] == units else values.unflatten(-1, (units, -1)).sum(-1)


def _one_group(values: Tensor) -> Tensor:
    return values.flatten(0, 1)[None]


def _chunks(part: Segment, rows: int) -> Iterator[slice | Tensor]:
    """Cut a category's rows into parts of at most so many."""
    for start in range(0, part.rows, rows):
        stop = min(part.rows, start + rows)
        if isinstance(part.where, slice):
            yield slice(part.where.start + start, part.where.start + stop)
        else:
            yield part.where[start:stop]
