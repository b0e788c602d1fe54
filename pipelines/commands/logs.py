"""``moeify logs``: what a run did."""

import sys

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.options import ADDRESS, JSON


@click.command(
    "logs",
    epilog=examples(
        "moeify logs last",
        "moeify logs -f text",
        "moeify logs last --json",
    ),
)
@RUN
@click.option("--follow", "-f", is_flag=True, help="Until it ends; of a run on a cluster: exit as it does.")
@ADDRESS
@JSON
@click.pass_context
def command(ctx: click.Context, run_: str, follow: bool, address: str | None, as_json: bool) -> None:
    """Tell what RUN did, line by line.

    Of a run on a cluster: what its newest job wrote, or what its journal says where the head has forgotten its jobs.
    With --json: its journal, an event a line.
    """
    from pipelines import ray_jobs, runs

    if (where := ray_jobs.address_of(address)) is None:
        from pipelines.display import JsonDisplay, PlainDisplay
        from pipelines.standing import recipe_of, tell

        folder = runs.find(run_, runs.home())
        display = JsonDisplay(sys.stdout) if as_json else PlainDisplay(sys.stdout, config=recipe_of(folder))
        tell(folder, display, follow=follow)
        return
    from pipelines.commands.watching import watch

    cluster = ray_jobs.connect(where)
    run = cluster.resolve(run_)
    newest = next(reversed(cluster.attempts(run)), None)
    if as_json and follow:
        raise click.UsageError("--follow of a run on a cluster tells lines to read; leave out --json, or --follow")
    if newest is None or as_json:
        click.echo(cluster.ask(["logs", run, *["--json"] * as_json]), nl=False)
    elif follow:
        ctx.exit(watch(cluster, run, newest.id))
    else:
        click.echo(cluster.logs(newest.id), nl=False)
