"""The expert tree: which categories share an expert, and which part.

Nodes stand in depth-first order, so that a node and everything below it are one contiguous range of nodes, and,
because leaves are ordered too, serve one contiguous range of categories.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from moeify.recipe import closed

if TYPE_CHECKING:
    import networkx as nx

ROOT = closed.ROOT
"""Name of the root, the shared core that serves every category."""


@dataclass(frozen=True)
class Node:
    """An expert."""

    name: str
    parent: int | None
    """Index of the parent in ``ExpertTree.nodes``; None for the root."""
    categories: tuple[str, ...]
    """The categories it serves, in leaf order."""


@dataclass(frozen=True)
class ExpertTree:
    """Experts in depth-first order; node 0 is the root."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        if not self.nodes or self.nodes[0].parent is not None:
            raise ValueError("an expert tree starts with its root, which has no parent")
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names):
            raise ValueError(f"experts need names of their own, got {names}")
        open_ = [0]
        for index, node in enumerate(self.nodes[1:], start=1):
            while open_ and open_[-1] != node.parent:
                open_.pop()
            if not open_:
                raise ValueError(f"expert {node.name!r} does not follow its parent: nodes must be in depth-first order")
            open_.append(index)
        for index, node in enumerate(self.nodes):
            if not node.categories or len(set(node.categories)) != len(node.categories):
                raise ValueError(f"expert {node.name!r} must serve categories, each once, got {node.categories}")
            below = tuple(c for child in self.children(index) for c in self.nodes[child].categories)
            if self.children(index) and below != node.categories:
                raise ValueError(f"the children of {node.name!r} serve {below}, it serves {node.categories}")

    @classmethod
    def undivided(cls, categories: Sequence[str]) -> Self:
        """Return the tree of a dense model: one root that serves everything."""
        return cls((Node(ROOT, None, tuple(categories)),))

    @property
    def categories(self) -> tuple[str, ...]:
        """All categories in leaf order."""
        return self.nodes[0].categories

    def children(self, index: int) -> tuple[int, ...]:
        """Return the indices of a node's children, in order."""
        return tuple(i for i, node in enumerate(self.nodes) if node.parent == index)

    @property
    def leaves(self) -> tuple[int, ...]:
        """Indices of the nodes without children."""
        parents = {node.parent for node in self.nodes}
        return tuple(i for i in range(len(self.nodes)) if i not in parents)

    def index(self, name: str) -> int:
        """Return the index of the expert of that name."""
        for i, node in enumerate(self.nodes):
            if node.name == name:
                return i
        raise ValueError(f"no expert {name!r}; the tree has {', '.join(node.name for node in self.nodes)}")

    def route(self, category: str) -> tuple[int, ...]:
        """Return the nodes from the root to the category's leaf."""
        if category not in self.categories:
            raise ValueError(f"no category {category!r}; the tree serves {', '.join(self.categories)}")
        return tuple(i for i, node in enumerate(self.nodes) if category in node.categories)

    def span(self, index: int) -> tuple[int, int]:
        """Return the half-open range of positions in ``categories`` that a node serves."""
        mine = self.nodes[index].categories
        start = self.categories.index(mine[0])
        return start, start + len(mine)

    def end(self, index: int) -> int:
        """Return the index behind a node's last descendant: nodes ``index .. end`` are its subtree."""
        stop = index + 1
        while stop < len(self.nodes) and (parent := self.nodes[stop].parent) is not None and parent >= index:
            stop += 1
        return stop

    def related(self, one: int, other: int) -> bool:
        """Say whether one node is an ancestor of, or the same as, the other: only then do edges live between them."""
        low, high = min(one, other), max(one, other)
        return high < self.end(low)

    def split(self, groups: Mapping[int, Sequence[Sequence[str]]]) -> "ExpertTree":
        """Give leaves children, one for each group of the leaf's categories, in the order given."""
        for leaf, parts in groups.items():
            if leaf not in self.leaves:
                raise ValueError(f"only a leaf can be split, {self.nodes[leaf].name!r} has children")
            if len(parts) < 2 or sorted(c for part in parts for c in part) != sorted(self.nodes[leaf].categories):
                raise ValueError(f"groups {parts} do not divide {self.nodes[leaf].categories}")
        order = {  # each old node's categories in the new leaf order
            i: tuple(
                c
                for leaf in self.leaves
                if i <= leaf < self.end(i)
                for c in _ordered(self.nodes[leaf], groups.get(leaf))
            )
            for i in range(len(self.nodes))
        }
        nodes: list[Node] = []
        place: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            place[i] = len(nodes)
            nodes.append(Node(node.name, None if node.parent is None else place[node.parent], order[i]))
            nodes += [Node("+".join(part), place[i], tuple(part)) for part in groups.get(i, ())]
        return ExpertTree(tuple(nodes))

    def graph(self) -> "nx.DiGraph[str]":
        """Return a view for drawing and export: a node for each expert, an edge from parent to child."""
        import networkx as nx

        graph: nx.DiGraph[str] = nx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.name, categories=", ".join(node.categories))
            if node.parent is not None:
                graph.add_edge(self.nodes[node.parent].name, node.name)
        return graph

    def nested(self, units: Sequence[int], index: int = 0) -> dict[str, Any]:
        """Return the tree as nested plain data; ``units`` holds the units each node owns."""
        return {
            "name": self.nodes[index].name,
            "categories": list(self.nodes[index].categories),
            "units": units[index],
            "children": [self.nested(units, child) for child in self.children(index)],
        }


def _ordered(leaf: Node, parts: Sequence[Sequence[str]] | None) -> tuple[str, ...]:
    return leaf.categories if parts is None else tuple(c for part in parts for c in part)
