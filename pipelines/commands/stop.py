"""``moeify stop``: ask the process that drives a run to end."""

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.options import ADDRESS


@click.command(
    "stop",
    epilog=examples("moeify stop last"),
)
@RUN
@ADDRESS
def command(run_: str, address: str | None) -> None:
    """Stop RUN, which leaves a checkpoint first.

    Where that takes more than 20 seconds, it ends without. Either way nothing that was reported is lost, and 'moeify
    resume' goes on from the newest checkpoint. A run that was at its end may finish meanwhile, which is told.
    """
    from pipelines import ray_jobs, runs

    if (where := ray_jobs.address_of(address)) is None:
        from pipelines.standing import stop

        folder = runs.find(run_, runs.home())
        finished = stop(folder) == "finished"
        run = folder.id
    else:
        cluster = ray_jobs.connect(where)
        run = cluster.resolve(run_)
        newest = next(reversed(cluster.attempts(run)), None)
        if newest is None or not newest.live:
            how = f"its newest job is {newest.status}" if newest else "the head knows no job of it"
            raise ValueError(f"run {run} is not running there: {how}; see 'moeify status {run}'")
        finished = cluster.finished(cluster.stop(newest.id))
    if finished:
        click.echo(f"{run} finished before it could be stopped; see it with: moeify show {run}")
    else:
        click.echo(f"{run} is stopped; go on with: moeify resume {run}")
