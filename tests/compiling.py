"""A program: a split model under torch.compile, on several mixtures of categories. It fails where an output is another,
and prints how many graphs were compiled after each.

On its own because shape checks, which tests switch on, are nothing that a compiler can trace.
"""

import copy
from typing import Any

import torch
from torch.testing import assert_close

from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree
from tests.networks import CATEGORIES, rows_for, tiny_llama
from tests.oracles import gradients


def main() -> None:
    tree = ExpertTree.undivided(CATEGORIES).split({0: [("a", "b"), ("c", "d")]}).split({1: [("a",), ("b",)]})
    heads, ffn = (1, 0, 0, 0, 1), (8, 4, 2, 2, 8)
    widths = {f"layers.{i}.{kind}": width for i in (0, 1) for kind, width in (("heads", heads), ("ffn", ffn))}
    model = SplitModel(tiny_llama(), CATEGORIES, Partition(tree, widths))
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    plain, compiled = copy.deepcopy(model), copy.deepcopy(model)
    compiled.compile(backend=backend)
    inputs = rows_for(model.network, 6)
    for mixture in ([0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 3], [0, 0, 0, 0, 0, 3], [2, 3, 3, 3, 3, 3]):
        categories = torch.tensor(mixture)
        assert_close(compiled(inputs, categories), plain(inputs, categories))
        assert_close(gradients(compiled, inputs, categories), gradients(plain, inputs, categories))
        print(len(graphs))  # noqa: T201


if __name__ == "__main__":
    main()
