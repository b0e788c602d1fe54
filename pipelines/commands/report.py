"""``moeify report``: a run as one page."""

from pathlib import Path

import click


@click.command("report")
@click.argument("run_", metavar="RUN")
@click.option("--out", "-o", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Where it goes.")
def command(run_: str, out: Path | None) -> None:
    """Write RUN's report, one HTML page of all it did.

    It tells the expert tree, who owns what, attribution, tax, training, removals, affinities, cost and provenance, and
    goes to 'report.html' in the run's folder unless told where. A run writes it after every round by itself; this makes
    it anew, for runs that are under way or from an earlier version, too.
    """
    from pipelines import runs
    from pipelines.report.page import write

    folder = runs.find(run_, runs.home())
    click.echo(f"report:  {write(folder, out)}")
