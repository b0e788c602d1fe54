"""``moeify logs``: what a run did."""

import sys

import click

from pipelines.commands.options import ADDRESS


@click.command("logs")
@click.argument("run_", metavar="RUN")
@click.option("--follow", "-f", is_flag=True, help="Until it ends; of a run on a cluster: exit as it does.")
@ADDRESS
@click.pass_context
def command(ctx: click.Context, run_: str, follow: bool, address: str | None) -> None:
    """Tell what RUN did, line by line.

    Of a run on a cluster: what its newest job wrote, or what its journal says where the head has forgotten its jobs.
    """
    from pipelines import ray_jobs, runs

    if (where := ray_jobs.address_of(address)) is None:
        from pipelines.display import PlainDisplay
        from pipelines.standing import tell

        tell(runs.find(run_, runs.home()), PlainDisplay(sys.stdout), follow=follow)
        return
    from pipelines.commands.watching import watch

    cluster = ray_jobs.connect(where)
    run = cluster.resolve(run_)
    newest = next(reversed(cluster.attempts(run)), None)
    if newest is None:
        click.echo(cluster.ask(["logs", run]), nl=False)
    elif follow:
        ctx.exit(watch(cluster, run, newest.id))
    else:
        click.echo(cluster.logs(newest.id), nl=False)
