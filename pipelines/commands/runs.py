"""``moeify runs``: list them."""

import sys

import click

from pipelines.commands.arguments import examples
from pipelines.commands.options import ADDRESS, JSON


@click.command(
    "runs",
    epilog=examples(
        "moeify runs",
        "moeify runs --json",
    ),
)
@ADDRESS
@JSON
def command(address: str | None, as_json: bool) -> None:
    """List all runs, oldest first."""
    from pipelines import copies, ray_jobs, runs, show

    if (where := ray_jobs.address_of(address)) is not None:
        click.echo(ray_jobs.connect(where).ask(["runs", *["--json"] * as_json]), nl=False)
        return
    folders = runs.every(runs.home())
    copies.refresh(folders)
    if as_json:
        click.echo(show.to_json(show.listing(folders)))
    elif folders:
        show.print_runs(folders, sys.stdout)
    else:
        click.echo(f"No runs in {runs.told_home(runs.home())}; start one with: moeify run RECIPE")
