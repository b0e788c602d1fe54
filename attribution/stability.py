"""When a measuring pass may end early: when the partition that its table implies has become stable.

Axes: units U.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from attribution.table import AttributionTable, SiteSums


@dataclass(frozen=True)
class Stability:
    """When a pass may end early: when the partition that its table implies no longer changes."""

    implied: Callable[[AttributionTable], Mapping[str, Int[Tensor, " units"]]]
    """Site -> owner of each unit. Called only on tables that have rows of every category."""
    agreement: float = 0.99
    """Least fraction of units whose owner is the one of the look before."""
    patience: int = 2
    """Looks in a row that must agree."""
    every: int = 4
    """Batches between two looks."""
    reduce: Callable[[Sequence[Tensor]], None] | None = None
    """Sums tensors over workers in place, so that all of them stop at the same batch; each must have as many."""

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement must be a fraction of units, 0 to 1, got {self.agreement}")
        if self.patience < 1 or self.every < 1:
            raise ValueError(f"patience and every must be at least 1, got {self.patience} and {self.every}")


def strongest_category(table: AttributionTable) -> dict[str, Int[Tensor, " units"]]:
    """Return, as the simplest implied partition, the category that each unit matters to most.

    >>> strongest_category(table)["first"].tolist()
    [0, 1]
    """
    return {site: table.score(site, "absolute").argmax(1) for site in table.sites}


class Watch:
    """Looks now and then whether the implied partition still changes."""

    def __init__(self, stability: Stability) -> None:
        self._asked = stability
        self._batches = 0
        self._agreed = 0
        self._last: Tensor | None = None

    def settled(self, table: AttributionTable) -> bool:
        """Count one more batch, and say whether the pass may end.

        >>> watch = Watch(Stability(strongest_category, patience=1, every=1))
        >>> watch.settled(table), watch.settled(table)
        (False, True)
        """
        self._batches += 1
        if self._batches % self._asked.every:
            return False
        table = table.to(torch.device("cpu"))
        if self._asked.reduce:
            table = table + AttributionTable.empty(table.categories, {n: _nothing(s) for n, s in table.sites.items()})
            self._asked.reduce(table.tensors())
        if not bool(table.counts.all()):
            return False
        owners = torch.cat([owner.flatten() for owner in self._asked.implied(table).values()])
        last, self._last = self._last, owners
        same = last is not None and float((owners == last).double().mean()) >= self._asked.agreement
        self._agreed = self._agreed + 1 if same else 0
        return self._agreed >= self._asked.patience


def _nothing(sums: SiteSums) -> SiteSums:
    return sums.like([torch.zeros_like(tensor) for tensor in sums.tensors()])
