"""``moeify sync``: deliver to MLflow what it missed."""

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.options import ADDRESS


@click.command(
    "sync",
    epilog=examples("moeify sync last"),
)
@RUN
@ADDRESS
def command(run_: str, address: str | None) -> None:
    """Deliver to MLflow what it missed of RUN.

    It goes to $MLFLOW_TRACKING_URI, or to the database beside the runs. A run delivers by itself as it goes on; this
    is for what MLflow could not take then. Nothing shows twice.
    """
    from moeify.recipe.load import load_recipe
    from pipelines import ray_jobs, runs

    if (where := ray_jobs.address_of(address)) is not None:
        click.echo(ray_jobs.connect(where).ask(["sync", run_]), nl=False)
        return
    folder = runs.find(run_, runs.home())
    config = load_recipe(folder.resolved)
    from pipelines.tracking import deliver, where_to_look
    from pipelines.wording import counted

    count = deliver(folder, config)
    click.echo(f"{counted(count, 'event')} delivered" if count else "MLflow misses nothing")
    click.echo(f"curves:  {where_to_look(folder)}")
