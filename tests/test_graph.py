import json
import re
import xml.etree.ElementTree as ET

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tables import empty_table
from torch import Tensor

import attribution.graph
from attribution.edge_table import EdgeSums, EdgeTable
from attribution.graph import EveryEdge, Keep, StrongestPerNode, StrongestShare, UnitGraph
from attribution.table import AttributionTable

NAMES = ("code", 'a < b & "c"')


def units_table(sites: dict[str, Tensor]) -> AttributionTable:
    """Taylor sums [units categories] over 2 tokens of each category."""
    table = empty_table(NAMES, {site: (len(taylor_UC), 1) for site, taylor_UC in sites.items()})
    table.counts[:] = table.rows[:] = 2
    for site, taylor_UC in sites.items():
        table.sites[site].taylor[:] = taylor_UC
    return table


def edge_table(blocks: dict[str, Tensor], pairs: dict[tuple[str, str], Tensor]) -> EdgeTable:
    """Taylor sums [categories sources targets] over 2 tokens of each category."""
    table = EdgeTable.empty(NAMES, blocks, {pair: EdgeSums(taylor_CUV) for pair, taylor_CUV in pairs.items()})
    table.counts[:] = table.rows[:] = 2
    return table


def example() -> tuple[AttributionTable, EdgeTable]:
    """Three sites; the units of the middle one in two blocks."""
    units = units_table(
        {
            "s": torch.tensor([[1.0, 2], [3, 4]]).double(),
            "t": torch.tensor([[1.0, 0], [10, 0], [100, -2]]).double(),
            "out": torch.tensor([[7.0, 7]]).double(),
        }
    )
    blocks = {"s": torch.arange(2), "t": torch.tensor([1, 0, 1]), "out": torch.arange(1)}
    edges = edge_table(
        blocks,
        {
            ("s", "t"): torch.tensor([[[2.0, -4], [6, 0]], [[0, 4], [2, 1]]]).double(),
            ("s", "out"): torch.tensor([[[1.0], [0]], [[0], [0]]]).double(),
            ("t", "out"): torch.tensor([[[20.0], [3]], [[-20], [0]]]).double(),
        },
    )
    return units, edges


def weights(graph: UnitGraph) -> dict[tuple[str, str], float]:
    return {(u, v): data["weight"] for u, v, data in graph.graph.edges(data=True)}


def test_nodes_and_edges_hold_what_the_tables_say() -> None:
    graph = UnitGraph.of(*example(), EveryEdge())
    assert list(graph.graph.nodes) == ["s/0", "s/1", "t/0", "t/1", "out/0"]
    assert graph.graph.nodes["t/1"] == {
        "site": "t", "block": 1, "units": 2, "nats.code": 50.5, "nats.a < b & \"c\"": -1.0
    }  # fmt: skip
    assert graph.graph.edges["s/0", "t/1"] == {"nats.code": -2.0, 'nats.a < b & "c"': 2.0, "weight": 4.0}
    assert weights(graph) == {
        ("s/0", "t/0"): 1, ("s/0", "t/1"): 4, ("s/0", "out/0"): 0.5, ("s/1", "t/0"): 4, ("s/1", "t/1"): 0.5,
        ("s/1", "out/0"): 0, ("t/0", "out/0"): 20, ("t/1", "out/0"): 1.5,
    }  # fmt: skip
    assert graph.categories == NAMES
    assert graph.graph.graph["kept"] == 1


def test_a_graph_survives_graphml_as_it_was() -> None:
    graph = UnitGraph.of(*example(), StrongestShare(0.9))
    text = graph.graphml()
    back = UnitGraph.from_graphml(text)
    assert nx.utils.graphs_equal(back.graph, graph.graph)
    assert back.graph.graph == graph.graph.graph
    assert back.categories == NAMES
    assert list(back.graph.nodes) == list(graph.graph.nodes)
    assert back.graphml() == text == UnitGraph.of(*example(), StrongestShare(0.9)).graphml()


def test_graphml_names_its_attributes_for_other_programs() -> None:
    root = ET.fromstring(UnitGraph.of(*example(), EveryEdge()).graphml())
    keys = {(key.get("for"), key.get("attr.name"), key.get("attr.type")) for key in root if key.tag.endswith("key")}
    assert keys >= {
        ("node", "site", "string"), ("node", "nats.code", "double"), ("edge", "weight", "double"),
        ("edge", "nats.a < b & \"c\"", "double"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (StrongestPerNode(1), ["s/0 t/1", "s/1 t/0", "t/0 out/0", "t/1 out/0"]),
        (StrongestShare(0.6), ["t/0 out/0"]),
        (StrongestShare(0.64), ["s/0 t/1", "t/0 out/0"]),
        (StrongestShare(28 / 31.5), ["s/0 t/1", "s/1 t/0", "t/0 out/0"]),
    ],
    ids=str,
)
def test_the_strongest_edges_are_kept_and_of_equals_the_first(keep: Keep, wanted: list[str]) -> None:
    graph = UnitGraph.of(*example(), keep)
    assert [f"{u} {v}" for u, v in graph.graph.edges] == wanted
    assert graph.graph.graph["kept"] == pytest.approx(sum(weights(graph).values()) / 31.5)
    assert len(graph.graph) == 5


@given(seed=st.integers(0, 1000), count=st.integers(1, 4), share=st.floats(0.01, 1))
def test_what_is_kept_is_what_a_sorted_list_would_keep(seed: int, count: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"a": 3, "b": 4, "c": 2}
    pairs = {
        (s, t): torch.randint(-3, 4, (2, sizes[s], sizes[t]), generator=generator).double()
        for s, t in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    units = units_table({site: torch.zeros(n, 2).double() for site, n in sizes.items()})
    edges = edge_table({site: torch.arange(n) for site, n in sizes.items()}, pairs)
    every = weights(UnitGraph.of(units, edges, EveryEdge()))
    by_strength = sorted(every, key=lambda edge: -every[edge])
    kept = set()
    for end in (0, 1):
        for node in UnitGraph.of(units, edges, EveryEdge()).graph:
            kept |= set([edge for edge in by_strength if edge[end] == node][:count])
    assert set(weights(UnitGraph.of(units, edges, StrongestPerNode(count)))) == kept
    total, held, number = sum(every.values()), 0.0, 0
    while number == 0 or held < share * total * (1 - 1e-9):
        held += every[by_strength[number]]
        number += 1
    assert len(weights(UnitGraph.of(units, edges, StrongestShare(share)))) == number


@pytest.mark.parametrize(("name", "fits"), [("a\tb\n", True), ("ü 日", True), ("a\x01", False), ("a\r", False)])
def test_names_that_graphml_cannot_hold_are_refused(name: str, fits: bool) -> None:
    graph = UnitGraph(nx.DiGraph(categories=json.dumps([name]), score="taylor", kept=1.0))
    graph.graph.add_node("s/0", site="s", **{f"nats.{name}": 1.0})
    if fits:
        assert nx.utils.graphs_equal(UnitGraph.from_graphml(graph.graphml()).graph, graph.graph)
    else:
        with pytest.raises(ValueError, match=re.escape(f"GraphML cannot hold the name {name!r}; give")):
            graph.graphml()


def test_bad_input_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    units, edges = example()
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        StrongestPerNode(0)
    with pytest.raises(ValueError, match="share must be above 0"):
        StrongestShare(0.0)
    with pytest.raises(ValueError, match="no site 'out', which has edges; measure it"):
        UnitGraph.of(units_table({s: sums.taylor for s, sums in units.sites.items() if s != "out"}), edges, EveryEdge())
    with pytest.raises(ValueError, match="site 't' has 2 units in one table and 3 in the other"):
        UnitGraph.of(
            units_table({**{s: x.taylor for s, x in units.sites.items()}, "t": torch.zeros(2, 2)}), edges, EveryEdge()
        )
    with pytest.raises(ValueError, match="tables of different categories"):
        UnitGraph.of(empty_table(["x"], {"s": (2, 1)}), edges, EveryEdge())
    with pytest.raises(ValueError, match="a graph of units has 'categories'"):
        UnitGraph(nx.DiGraph())
    with pytest.raises(ValueError, match="a directed graph, got a Graph"):
        UnitGraph.from_graphml("\n".join(nx.generate_graphml(nx.Graph())))
    for text in ("", "<a/>", "{}"):
        with pytest.raises(ValueError, match=r"not a graph as UnitGraph\.graphml writes it"):
            UnitGraph.from_graphml(text)
    monkeypatch.setattr(attribution.graph, "MOST_EDGES", 7)
    with pytest.raises(ValueError, match="8 edges are more than 7; keep fewer"):
        UnitGraph.of(units, edges, EveryEdge())
