"""``moeify show``: one run, to read."""

import sys

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.options import ADDRESS, JSON


@click.command(
    "show",
    epilog=examples(
        "moeify show last",
        "moeify show text --json",
    ),
)
@RUN
@ADDRESS
@JSON
def command(run_: str, address: str | None, as_json: bool) -> None:
    """Show RUN's expert tree, its rounds, and what they cost."""
    from pipelines import ray_jobs, runs, show

    if (where := ray_jobs.address_of(address)) is not None:
        click.echo(ray_jobs.connect(where).ask(["show", run_, *["--json"] * as_json]), nl=False)
        return
    folder = runs.find(run_, runs.home())
    if as_json:
        click.echo(show.to_json(show.summary(folder)))
    else:
        show.print_run(folder, sys.stdout)
