"""Llamas of random weights and their split twins with partitions as runs make them: a core and four experts.

Random weights run as fast as trained ones, so speed needs no training.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeify.models.build import build_llama
from moeify.recipe.model import LlamaModel
from moeify.recipe.partition import PLAIN, UnitKind
from moeify.routed.split_model import SplitModel
from moeify.splitting.partition import Partition
from moeify.splitting.tree import ExpertTree

CATEGORIES = ("a", "b", "c", "d")
Widths = Literal["equal", "ragged"]
"""``equal``: a quarter core and experts of 18.75 % in every layer, 43.75 % of the units active. ``ragged``: each layer
draws a core of 10 to 40 % and experts of different widths, as budgets over layers make them, with the same mean."""


@dataclass(frozen=True)
class Size:
    """Of a network."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    vocabulary: int = 1024
    length: int = 128


def pair(size: Size, widths: Widths, kinds: Collection[UnitKind] = PLAIN) -> tuple[Any, SplitModel]:
    """Return a dense network and the split model of the same weights."""
    config = LlamaModel(kind="llama", hidden=size.hidden, layers=size.layers, heads=size.heads, ffn=size.ffn)
    dense: nn.Module = build_llama(config, vocabulary=size.vocabulary, length=size.length, end=0, seed=0)
    split = SplitModel(copy.deepcopy(dense), CATEGORIES, kinds=kinds)
    generator = torch.Generator().manual_seed(0)
    shares = {
        site.name: _shares(site.units, 8 if site.kind == "ffn" else 1, widths, generator) for site in split.space.sites
    }
    tree = ExpertTree.undivided(CATEGORIES).split({0: [(category,) for category in CATEGORIES]})
    split.repartition(Partition(tree, shares))
    return dense, split


def _shares(units: int, multiple: int, widths: Widths, generator: torch.Generator) -> tuple[int, ...]:
    """Return the units of the core and of each expert, in multiples; the core has what is left over."""
    core, experts = 0.25, torch.ones(len(CATEGORIES))
    if widths == "ragged":
        core = 0.1 + 0.3 * float(torch.rand((), generator=generator))
        experts = 0.5 + torch.rand(len(CATEGORIES), generator=generator)
    own = (experts / experts.sum() * (1.0 - core) * units / multiple).round().int() * multiple
    while int(own.sum()) >= units:
        own[own.argmax()] -= multiple
    return (units - int(own.sum()), *own.tolist())


def mixed_rows(size: Size, rows: int) -> tuple[Int[Tensor, "rows positions"], Int[Tensor, " rows"]]:
    """Return random tokens and as many rows of each category, in no order."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(size.vocabulary, (rows, size.length), generator=generator)
    categories = torch.arange(rows) % len(CATEGORIES)
    return tokens, categories[torch.randperm(rows, generator=generator)]
