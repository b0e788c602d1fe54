"""The units (or blocks of them) and the edges between them as a graph: for drawing, reading and other programs.

A view: tables are the truth. Nodes and edges are in the order of the tables, so the same tables give the same text.
"""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from itertools import pairwise
from typing import assert_never

import networkx as nx
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from attribution.edge_table import EdgeTable
from attribution.table import AttributionTable, Score

MOST_EDGES = 200_000
"""Edges that a graph may have: some 0.2 GB in memory, 50 MB of GraphML and 10 seconds with two categories."""


_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 has no way to write, or that a reader gets back as another."""


@dataclass(frozen=True)
class EveryEdge:
    """Keep all edges."""


@dataclass(frozen=True)
class StrongestPerNode:
    """Keep an edge that is among the strongest out of its source or among the strongest into its target."""

    count: int
    """How many of either."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


@dataclass(frozen=True)
class StrongestShare:
    """Keep the fewest edges that together hold a share of the weight of all."""

    share: float
    """Above 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")


Keep = EveryEdge | StrongestPerNode | StrongestShare
"""Which edges to keep. An edge's strength is its ``weight``; of equals the first in the table's order is kept."""


@dataclass(frozen=True)
class UnitGraph:
    """A directed graph from source to target, one node a block of units (a unit where a site has no blocks).

    A node ``SITE/NUMBER`` has ``site``, ``block``, ``units`` (how many) and for each category ``nats.CATEGORY``: its
    units' attributions, added up. An edge has for each category ``nats.CATEGORY``, signed, and ``weight``, the sum of
    their magnitudes. All in nats per token. The graph has ``categories`` (a JSON list), ``score`` (the kind of the
    nodes' attribution) and ``kept`` (the share of the weight of all edges that the graph's edges hold).
    """

    graph: nx.DiGraph

    def __post_init__(self) -> None:
        for key in ("categories", "score", "kept"):
            if key not in self.graph.graph:
                raise ValueError(f"a graph of units has {key!r}; this one has {sorted(self.graph.graph)}")

    @classmethod
    def of(cls, units: AttributionTable, edges: EdgeTable, keep: Keep, score: Score = "taylor") -> "UnitGraph":
        """Return the graph of two tables of one network; sites without edges are left out.

        Raises ValueError for tables that do not fit and for more than ``MOST_EDGES`` edges.
        """
        if units.categories != edges.categories:
            raise ValueError(
                f"tables of different categories: {list(units.categories)} and {list(edges.categories)}; "
                f"measure units and edges with one subject"
            )
        graph: nx.DiGraph = nx.DiGraph(categories=json.dumps(edges.categories), score=score)
        for site in (site for site in units.sites if site in edges.blocks):
            _add_nodes(graph, units, edges, site, score)
        missing = [site for site in edges.blocks if site not in units.sites]
        if missing:
            raise ValueError(f"the table of units has no site {missing[0]!r}, which has edges; measure it")
        kept, share = _kept(edges, keep)
        number = sum(int(mask.sum()) for mask in kept)
        if number > MOST_EDGES:
            raise ValueError(
                f"{number} edges are more than {MOST_EDGES}; keep fewer (StrongestPerNode, StrongestShare) or measure "
                f"edges between blocks"
            )
        graph.graph["kept"] = share
        for (source, target), mask_UV in zip(edges.pairs, kept, strict=True):
            nats_CUV = edges.taylor(source, target)
            for u, v in mask_UV.nonzero().tolist():
                nats = nats_CUV[:, u, v].tolist()
                values = {f"nats.{c}": x for c, x in zip(edges.categories, nats, strict=True)}
                graph.add_edge(f"{source}/{u}", f"{target}/{v}", **values, weight=sum(map(abs, nats)))
        return cls(graph)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories, in the tables' order."""
        return tuple(json.loads(self.graph.graph["categories"]))

    def graphml(self) -> str:
        """Return the graph as GraphML; ValueError for names with control characters, which XML has none of."""
        for name in (*map(str, self.graph), *self.categories):
            if _NOT_XML.search(name):
                raise ValueError(f"GraphML cannot hold the name {name!r}; give sites and categories printable names")
        return "\n".join(nx.generate_graphml(self.graph, named_key_ids=True)) + "\n"

    @classmethod
    def from_graphml(cls, text: str) -> "UnitGraph":
        """Return the graph that ``graphml`` wrote; ValueError where the text is something else."""
        try:
            graph = nx.parse_graphml(text)
        except (ET.ParseError, nx.NetworkXException, KeyError, ValueError) as error:
            raise ValueError(f"not a graph as UnitGraph.graphml writes it ({error}), got {text[:40]!r}") from error
        if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
            raise ValueError(f"a graph of units is a directed graph, got a {type(graph).__name__}")
        for defaults in ("node_default", "edge_default"):
            graph.graph.pop(defaults, None)
        return cls(graph)


def _add_nodes(graph: nx.DiGraph, units: AttributionTable, edges: EdgeTable, site: str, score: Score) -> None:
    block_U, score_UC = edges.blocks[site], units.score(site, score)
    if len(block_U) != len(score_UC):
        raise ValueError(
            f"site {site!r} has {len(score_UC)} units in one table and {len(block_U)} in the other; "
            f"measure units and edges with one subject"
        )
    number = edges.size(site)
    score_BC = score_UC.new_zeros(number, score_UC.shape[1]).index_add_(0, block_U, score_UC)
    sizes = torch.bincount(block_U, minlength=number).tolist()
    for block, (size, nats) in enumerate(zip(sizes, score_BC.tolist(), strict=True)):
        values = {f"nats.{c}": x for c, x in zip(units.categories, nats, strict=True)}
        graph.add_node(f"{site}/{block}", site=site, block=block, units=size, **values)


def _kept(edges: EdgeTable, keep: Keep) -> tuple[list[Bool[Tensor, "sources targets"]], float]:
    """Return which edges of each pair to keep, and their share of the weight of all."""
    weights = [edges.taylor(*pair).abs().sum(0) for pair in edges.pairs]
    match keep:
        case EveryEdge():
            kept = [torch.ones_like(weight_UV, dtype=torch.bool) for weight_UV in weights]
        case StrongestPerNode(count):
            kept = _per_node(edges, weights, count)
        case StrongestShare(share):
            flat = torch.cat([weight_UV.flatten() for weight_UV in weights])
            order = flat.argsort(descending=True, stable=True)
            reached = flat[order].cumsum(0)
            # Up to and with the first edge at which the share is reached.
            short = reached < share * reached[-1] * (1 - 1e-12)
            strong = torch.zeros_like(flat, dtype=torch.bool)
            strong[order[: int(short.sum()) + 1]] = True
            parts = strong.split([weight_UV.numel() for weight_UV in weights])
            kept = [part.view_as(weight_UV) for part, weight_UV in zip(parts, weights, strict=True)]
        case _:
            assert_never(keep)
    total = float(sum(weight_UV.sum() for weight_UV in weights))
    mass = float(sum(weight_UV[mask_UV].sum() for weight_UV, mask_UV in zip(weights, kept, strict=True)))
    return kept, mass / total if total else 1.0


def _per_node(
    edges: EdgeTable, weights: list[Float64[Tensor, "..."]], count: int
) -> list[Bool[Tensor, "sources targets"]]:
    kept = [torch.zeros_like(weight_UV, dtype=torch.bool) for weight_UV in weights]
    for end in (0, 1):
        for site in edges.blocks:
            mine = [i for i, pair in enumerate(edges.pairs) if pair[end] == site]
            if not mine:
                continue
            # All edges out of (into) each of the site's nodes, side by side: one row a node.
            rows_BX = torch.cat([weights[i] if end == 0 else weights[i].T for i in mine], 1)
            order = rows_BX.argsort(dim=1, descending=True, stable=True)[:, :count]
            strong_BX = torch.zeros_like(rows_BX, dtype=torch.bool).scatter_(1, order, True)
            ends = [0, *torch.tensor([weights[i].shape[1 - end] for i in mine]).cumsum(0).tolist()]
            for i, (start, stop) in zip(mine, pairwise(ends), strict=True):
                part = strong_BX[:, start:stop]
                kept[i] |= part if end == 0 else part.T
    return kept
