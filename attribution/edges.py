"""One pass over data that measures the edges between units of different sites against every category.

An edge u -> v is what unit u alone adds to the pre-activations of unit v at the same token: its activation times its
output weights, through the norm (linearised where it stands) and v's rows of the writers. Its attribution is minus the
inner product with the loss's gradient at those pre-activations: the first-order rise of the loss if this edge alone
were cut, every other path left as it is. Edge attribution patching (Syed, Rager and Conmy, "Attribution patching
outperforms automated circuit discovery", 2023, arXiv 2310.10348) with zero for the corrupted activation, between units
or blocks of them instead of whole heads and layers. For fixed v, the edges from all sources and what embeddings and
biases add come to -g J x: x is the stream, J the Jacobian of norm and writers.

A batch costs one forward and one backward pass whatever the number of pairs, then matrix products. Between units, with
f and f' features of both sites, tokens T and stream width D: (T + D) f f' a pair. Between blocks, B of each site:
T D (f + f') once a site and T D B^2 a pair; nothing of the size units x units is made. The cheaper way is taken.

What is not checked: that sources write into the stream their targets read, with nothing but the named norm between. A
block whose attention and feed-forward network read the same stream (in parallel) needs ``pairs``, and so does a stream
without norms beyond the neighbouring site.

Axes: rows R.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count

import torch
from jaxtyping import Int
from torch import Tensor

from attribution.edge_products import Blocks, Route, Target, by_blocks, by_features
from attribution.edge_table import EdgeSums, EdgeTable, Pair
from attribution.edge_taps import Entry, NormTap, SourceTap, WriterTap
from attribution.subject import Probe, Segment, Subject, segments

MOST_EDGES = 2**24
"""Edges of one pair of sites that a table may hold: 128 MB a category, twice that with standard errors."""


def measure_edges(
    subject: Subject,
    batches: Iterable[Probe],
    entries: Sequence[Entry],
    *,
    pairs: Sequence[Pair] | None = None,
    blocks: Mapping[str, Int[Tensor, " units"]] | None = None,
    errors: bool = True,
) -> EdgeTable:
    """Measure the edges into the sites of ``entries``; tables of shards add up to the table of the whole.

    ``pairs``: which sites to connect; not given: the sites whose reader is a writer of the entry, or else every site
    before the target in the subject's order if the entry names a norm, or else the one right before it. ``blocks``:
    site -> block number of each unit, for sites too large to show every unit. ``errors``: with squares of rows, for
    standard errors; without them edges between units of networks without positions are much cheaper.

    Products are in the activations' precision (half precision is widened to float32), sums over rows in float64. The
    subject's ``sample`` is not used. Of a network sharded by ``fully_shard`` every worker gathers the weights of the
    sites' readers and writers, and needs as many batches as the others. Raises ValueError for entries, pairs, blocks or
    values that make no sense, by name.

    >>> from attribution.edge_taps import Writer
    >>> edges = measure_edges(asked, rows, [Entry("second", (Writer("2"),))])
    >>> edges.taylor("first", "second").tolist()  # categories x sources x targets, nats
    [[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]
    """
    with ExitStack() as stack:
        stack.enter_context(subject.still())
        run = _Pass(subject, entries, pairs, blocks or {}, errors)
        for source in run.sources.values():
            stack.callback(source.module.register_forward_pre_hook(source.before).remove)
        for norm in run.norms.values():
            stack.callback(norm.module.register_forward_hook(norm.after).remove)
        for target in run.targets.values():
            for writer in target.writers:
                stack.callback(writer.module.register_forward_hook(writer.after).remove)
        for batch in batches:
            if len(batch.categories):
                run.batch(batch)
    table = run.table
    if not bool(table.rows.any()):
        raise ValueError("no batches to measure; give at least one row")
    cpu = torch.device("cpu")
    sums = {pair: found.to(cpu) for pair, found in table.pairs.items()}
    return EdgeTable(table.categories, table.counts, table.rows, table.blocks, sums)


class _Pass:
    """The taps, and the sums that they are reduced to."""

    def __init__(
        self,
        subject: Subject,
        entries: Sequence[Entry],
        pairs: Sequence[Pair] | None,
        blocks: Mapping[str, Tensor],
        errors: bool,
    ) -> None:
        self.subject = subject
        for name in blocks:
            subject.site(name)
        found = _pairs(subject, entries, pairs)
        divided = {s: Blocks.make(subject, s, blocks.get(s)) for s in dict.fromkeys(s for pair in found for s in pair)}
        clock = count()
        self.sources = {s: SourceTap(subject, subject.site(s), clock) for s in dict.fromkeys(s for s, _ in found)}
        self.norms: dict[str, NormTap] = {}
        self.targets: dict[str, Target] = {}
        for entry in entries:
            if entry.site not in {target for _, target in found}:
                continue
            whose = f"the entry of site {entry.site!r}"
            if entry.norm is not None and entry.norm not in self.norms:
                self.norms[entry.norm] = NormTap(subject.module(entry.norm, whose), entry.norm, clock)
            norm = None if entry.norm is None else self.norms[entry.norm]
            writers = [WriterTap(subject, writer, subject.site(entry.site), norm, clock) for writer in entry.writers]
            self.targets[entry.site] = Target(writers, norm, divided[entry.site])
        self.routes = []
        for pair in found:
            source, target = self.sources[pair[0]], self.targets[pair[1]]
            sizes = divided[pair[0]].size, divided[pair[1]].size
            if sizes[0] * sizes[1] > MOST_EDGES:
                raise ValueError(
                    f"edges {pair[0]} -> {pair[1]}: {sizes[0]} x {sizes[1]} are more than {MOST_EDGES}; give blocks, "
                    f"e.g. the expert of each unit, or fewer pairs"
                )
            direct = next((writer for writer in target.writers if writer.name == source.site.reader), None)
            sums = EdgeSums.zeros(len(subject.categories), *sizes, errors, source.weight.device)
            self.routes.append(Route(pair, source, divided[pair[0]], target, direct, sums))
        self.table = EdgeTable.empty(
            subject.categories, {s: b.of for s, b in divided.items()}, {r.pair: r.sums for r in self.routes}
        )

    def batch(self, batch: Probe) -> None:
        """Run one batch and count it."""
        subject, table = self.subject, self.table
        parts = segments(batch, subject.categories)
        writers = [writer for target in self.targets.values() for writer in target.writers]
        taps = [*self.sources.values(), *self.norms.values(), *writers]
        for tap in taps:
            tap.begin(len(batch.categories))
        outputs = subject.forward(batch.inputs.detach(), batch.categories)
        for tap in taps:
            tap.check()
        for route in self.routes:
            route.check()
        positions = {tap.site.name: tap.positions for tap in self.sources.values()}
        if len(set(positions.values())) > 1:
            raise ValueError(
                f"sites have different positions a row ({positions}); measure them in separate passes, by pairs"
            )
        loss_R = subject.row_nats(outputs, batch.targets)
        if loss_R.requires_grad:
            torch.autograd.backward(loss_R.sum())
        for writer in writers:
            if writer.caught is None:
                raise ValueError(
                    f"the loss does not depend on the writer {writer.name!r} of site {writer.site.name!r}; drop it"
                )
        with torch.no_grad():
            self._reduce(parts)
        for part in parts:
            table.rows[part.category] += part.rows
            table.counts[part.category] += part.rows * next(iter(positions.values()))
        for tap in taps:
            tap.begin(0)

    def _reduce(self, parts: Sequence[Segment]) -> None:
        blocked = [route for route in self.routes if route.blocked()]
        together = [[route for route in blocked if not route.direct], *([route] for route in blocked if route.direct)]
        for part in parts:
            for route in self.routes:
                if not route.blocked():
                    by_features(route, part)
            for routes in together:
                if routes:
                    by_blocks(routes, part)
        for route in self.routes:
            bad = (~route.sums.taylor.isfinite()).flatten(1).any(1).nonzero()
            if len(bad):
                raise ValueError(
                    f"edges {route.pair[0]} -> {route.pair[1]} have a NaN or infinite attribution on category "
                    f"{self.subject.categories[int(bad[0])]!r}; look at the network's weights and the inputs of that "
                    f"category"
                )


def _pairs(subject: Subject, entries: Sequence[Entry], pairs: Sequence[Pair] | None) -> list[Pair]:
    """Return the pairs of sites to connect, in the subject's order."""
    names = [site.name for site in subject.sites]
    by_site = {subject.site(entry.site).name: entry for entry in entries}
    if len(by_site) < len(entries):
        raise ValueError(f"entries must be of distinct sites, got {[entry.site for entry in entries]}")
    if pairs is not None:
        for source, target in pairs:
            subject.site(source)
            if target not in by_site:
                raise ValueError(f"edges {source} -> {target} need an entry of site {target!r}; there are {[*by_site]}")
            if names.index(source) >= names.index(target):
                raise ValueError(f"edges {source} -> {target}: the source must come before the target in {names}")
        if not pairs or len(set(pairs)) < len(pairs):
            raise ValueError(f"pairs must be distinct, at least one, got {list(pairs)}")
        return [(s, t) for t in names for s in names if (s, t) in set(pairs)]
    found: list[Pair] = []
    for place, site in enumerate(names):
        if site in by_site:
            writers = {writer.module for writer in by_site[site].writers}
            direct = [source.name for source in subject.sites[:place] if source.reader in writers]
            before = names[:place] if by_site[site].norm is not None else names[:place][-1:]
            found += [(source, site) for source in direct or before]
    if not found:
        raise ValueError(f"no edges between {names} with entries of {[*by_site]}; a target needs a site before it")
    return found
