"""How fast a category's route can be: the share that it needs of the least time that the dense network can take.

Both by the roofline (``moeify.roofline``): operations that read each weight for few tokens, or keys and values for one
token alone, are limited by what they read, all others by their arithmetic. What a route needs is what its own units
need: padding and copies of a format count against the export.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moeify.export.speeds import Bound
from moeify.export.works import Work, dense_run, routed_run
from moeify.roofline import Machine, operations, this_machine
from moeify.routed.split_model import SplitModel


@dataclass(frozen=True)
class Limit:
    """What a route's saved work allows."""

    times: float
    """How many times as fast as the dense network."""
    bound: Bound
    """What the dense network spends most of its least time on."""


def limit_of(
    dense: nn.Module, split: SplitModel, work: Work, categories: Sequence[str], machine: Machine | None = None
) -> Limit:
    """Return the limit of rows of these categories, in turn; ``machine``: this one, where it is not given."""
    machine = machine or this_machine(next(dense.parameters()).dtype, torch.get_num_threads())
    whole = operations(dense_run(dense, work), dense)
    own = operations(routed_run(split, work, categories), split.network)
    bound: Bound = "bytes" if machine.reads_most(whole) else "FLOPs"
    return Limit(machine.seconds(whole) / machine.seconds(own), bound)
