"""``moeify show``: one run, to read."""

import sys

import click

from pipelines.commands.options import JSON


@click.command("show")
@click.argument("run_", metavar="RUN")
@JSON
def command(run_: str, as_json: bool) -> None:
    """Show RUN's expert tree, its rounds, and what they cost."""
    from pipelines import runs, show

    folder = runs.find(run_, runs.home())
    if as_json:
        click.echo(show.to_json(show.summary(folder)))
    else:
        show.print_run(folder, sys.stdout)
