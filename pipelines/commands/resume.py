"""``moeify resume``: go on with a run that was stopped."""

from typing import TYPE_CHECKING

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.driving import drive
from pipelines.commands.options import ADDRESS, LOCAL, QUIET

if TYPE_CHECKING:
    from pipelines.ray_jobs import Jobs


@click.command(
    "resume",
    epilog=examples(
        "moeify resume last",
        "moeify resume text --local",
    ),
)
@RUN
@LOCAL
@QUIET
@ADDRESS
@click.option("--wait", is_flag=True, help="On a cluster: tell what it does until it ends, and exit as it does.")
@click.pass_context
def command(ctx: click.Context, run_: str, local: bool, quiet: bool, address: str | None, wait: bool) -> None:
    """Go on with RUN from its last checkpoint.

    The result is the same, bit for bit, as without the break.
    """
    from moeify.recipe.load import load_recipe
    from pipelines import ray_jobs, runs

    if not local and (where := ray_jobs.address_of(address)) is not None:
        ctx.exit(_on_cluster(ray_jobs.connect(where), run_, quiet=quiet, wait=wait))
    folder = runs.find(run_, runs.home())
    ctx.obj["run"] = folder.id
    match runs.status(folder):
        case "running":
            raise runs.RunBusyError(
                f"run {folder.id} is being driven by another process; wait for it, or stop it first"
            )
        case "finished":
            click.echo(f"{folder.id} is finished; see it with: moeify show {folder.id}")
        case _:
            drive(folder, load_recipe(folder.resolved), local=local, quiet=quiet)


def _on_cluster(cluster: "Jobs", reference: str, *, quiet: bool, wait: bool) -> int:
    """Go on in a new job; return what to exit with."""
    from pipelines.commands.watching import job_of, watch
    from pipelines.runs import RunBusyError

    stands = cluster.status(cluster.resolve(reference))
    run = str(stands["run"])
    if stands["status"] == "finished":
        click.echo(f"{run} is finished; see it with: moeify show {run}")
        return 0
    if stands["status"] == "running" or any(each.live for each in cluster.attempts(run)):
        raise RunBusyError(f"run {run} is driven by another process; wait for it, or stop it first")
    job = cluster.resume(run)
    if not quiet:
        click.echo(f"run {run} goes on, on {cluster.address}\n{job_of(run)}")
    return watch(cluster, run, job) if wait else 0
