"""How fast an export is, as a table."""

from typing import TextIO

from moeify.export.speeds import Speeds
from pipelines.tables import console_for, table_for
from pipelines.wording import percent


def print_speeds(speeds: Speeds, stream: TextIO) -> None:
    """Print what an export was timed at."""
    console = console_for(stream)
    columns = ("work", "batch", "route", "dense", "export", "ratio", "limit", "by", "of limit")
    table = table_for(console, *columns, text=(0, 2, 7))
    for row in speeds.rows:
        rates = (f"{rate:,.0f}" for rate in (row.dense, row.export))
        ratios = (f"{number:.2f}" for number in (row.over_dense, row.limit))
        table.add_row(row.work, str(row.batch), row.route, *rates, *ratios, row.bound, percent(row.of_limit))
    threads = f"{speeds.threads} thread" + ("s" if speeds.threads > 1 else "")
    behind = "" if speeds.prompt is None else f", prompts of {speeds.prompt}"
    console.print(f"\nSpeed ({speeds.unit}s a second; {speeds.dtype}, {threads}{behind})")
    console.print(table)
    console.print("ratio: median within turns; limit: of it, by what the route needs", style="dim")
