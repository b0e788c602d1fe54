import networkx as nx
import pytest
from hypothesis import given

from moeify.splitting.tree import ROOT, ExpertTree, Node
from tests.trees import expert_trees


def four() -> ExpertTree:
    tree = ExpertTree.undivided(["python", "prose", "c", "web"])
    tree = tree.split({0: [("python", "c"), ("prose", "web")]})
    return tree.split({1: [("python",), ("c",)], 2: [("prose",), ("web",)]})


def test_two_splits_by_hand() -> None:
    tree = four()
    assert [node.name for node in tree.nodes] == [ROOT, "python+c", "python", "c", "prose+web", "prose", "web"]
    assert [node.parent for node in tree.nodes] == [None, 0, 1, 1, 0, 4, 4]
    assert tree.categories == ("python", "c", "prose", "web")
    assert tree.route("c") == (0, 1, 3)
    assert tree.span(4) == (2, 4)
    assert tree.end(1) == 4
    assert tree.related(0, 6)
    assert tree.related(5, 4)
    assert not tree.related(1, 6)
    assert tree.nested([7, 6, 5, 4, 3, 2, 1])["children"][1]["children"][0] == {
        "name": "prose",
        "categories": ["prose"],
        "units": 2,
        "children": [],
    }


@given(expert_trees())
def test_every_node_serves_a_contiguous_range_of_leaves_and_nodes(tree: ExpertTree) -> None:
    for index, node in enumerate(tree.nodes):
        start, stop = tree.span(index)
        assert tree.categories[start:stop] == node.categories
        below = {
            i for i in range(len(tree.nodes)) if set(tree.nodes[i].categories) <= set(node.categories) and i >= index
        }
        assert set(range(index, tree.end(index))) == below


@given(expert_trees())
def test_no_category_is_lost_and_each_has_one_leaf(tree: ExpertTree) -> None:
    for category in tree.categories:
        route = tree.route(category)
        assert route[0] == 0
        assert route[-1] in tree.leaves
        assert sum(node in tree.leaves for node in route) == 1
    assert sorted(c for leaf in tree.leaves for c in tree.nodes[leaf].categories) == sorted(tree.categories)


@given(expert_trees())
def test_related_is_what_the_graph_says(tree: ExpertTree) -> None:
    graph = tree.graph()
    assert nx.is_arborescence(graph)
    names = [node.name for node in tree.nodes]
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            path = nx.has_path(graph, one, other) or nx.has_path(graph, other, one)
            assert tree.related(i, j) == path


def test_broken_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="depth-first"):
        ExpertTree((Node("core", None, ("a", "b")), Node("a", 0, ("a",)), Node("b", 0, ("b",)), Node("x", 1, ("a",))))
    with pytest.raises(ValueError, match="serve"):
        ExpertTree((Node("core", None, ("a", "b")), Node("a", 0, ("a",))))
    with pytest.raises(ValueError, match="names of their own"):
        ExpertTree((Node("a", None, ("a",)), Node("a", 0, ("a",))))
    with pytest.raises(ValueError, match="do not divide"):
        ExpertTree.undivided(["a", "b"]).split({0: [("a",)]})
    with pytest.raises(ValueError, match="only a leaf"):
        four().split({1: [("python",), ("c",)]})
    with pytest.raises(ValueError, match="no category 'rust'"):
        four().route("rust")
