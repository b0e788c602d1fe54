"""What an export was timed at, as plain data: readers need no torch."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["prefill", "decode", "rows"]
"""``prefill``: reads prompts; ``decode``: adds tokens behind them; ``rows``: reads rows where nothing is written."""
Bound = Literal["bytes", "FLOPs"]
"""What takes most of a least time: bytes that are read, or floating-point operations."""


@dataclass(frozen=True)
class Speed:
    """One kind of work, done by an export and by the dense network."""

    work: Kind
    batch: int
    route: str
    """The category that rows are of; ``mixed``: of all categories in turn."""
    dense: float
    """Tokens (or rows) a second; so is ``export``."""
    export: float
    over_dense: float
    """How many times as fast as the dense network."""
    limit: float
    """What that can be: the dense network's least time over that of what the route needs (``moeify.export.limits``)."""
    bound: Bound
    """What the dense network spends most of its least time on."""

    @property
    def of_limit(self) -> float:
        """Fraction of the limit."""
        return self.over_dense / self.limit


@dataclass(frozen=True)
class Speeds:
    """All that was timed of an export."""

    rows: tuple[Speed, ...]
    unit: Literal["token", "row"]
    """That rates count."""
    dtype: str
    """Of both sides' weights."""
    threads: int
    prompt: int | None
    """Tokens of a prompt; None where the model writes no text."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data, fractions of the limit among it."""
        rows = [asdict(row) | {"of_limit": row.of_limit} for row in self.rows]
        return asdict(self) | {"rows": rows}
