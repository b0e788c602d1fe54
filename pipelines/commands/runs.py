"""``moeify runs``: list them."""

import sys

import click

from pipelines.commands.options import JSON


@click.command("runs")
@JSON
def command(as_json: bool) -> None:
    """List all runs, oldest first."""
    from pipelines import runs, show

    folders = runs.every(runs.home())
    if as_json:
        click.echo(show.to_json(show.listing(folders)))
    elif folders:
        show.print_runs(folders, sys.stdout)
    else:
        click.echo(f"No runs in {runs.home()}; start one with: moeify run RECIPE")
