"""Attribution tables made by hand."""

from collections.abc import Mapping, Sequence

from attribution.moments import ExactMoment
from attribution.table import AttributionTable, SiteSums


def empty_table(categories: Sequence[str], sites: Mapping[str, tuple[int, int]], *, width: int = 1) -> AttributionTable:
    """Sums over nothing with exact moments; ``sites`` maps a site's name to (units, dim), ``width`` features a unit."""
    number = len(categories)
    sums = {
        name: SiteSums.zeros(
            units,
            units * width,
            number,
            moments=(ExactMoment.zeros(number, units * width), ExactMoment.zeros(number, dim)),
        )
        for name, (units, dim) in sites.items()
    }
    return AttributionTable.empty(categories, sums)
