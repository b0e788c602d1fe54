"""A cut in one go, as the loop makes it without a budget."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attribution.table import AttributionTable, Unsigned
from moeify.recipe.partition import Partition as PartitionConfig
from moeify.recipe.rounds import Round
from moeify.splitting.partition import Partition
from moeify.splitting.propose import Proposal, menu


def propose(
    partition: Partition,
    table: AttributionTable,
    weights: Mapping[str, Tensor],
    config: PartitionConfig,
    rounds: Sequence[Round],
    score: Unsigned,
    *more: Any,
    **others: Any,
) -> Proposal:
    choices = menu(partition, table, weights, config, rounds, score, *more, **others)
    return choices.refined(choices.cut(rounds[0].separation))
