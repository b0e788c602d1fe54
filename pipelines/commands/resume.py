"""``moeify resume``: go on with a run that was stopped."""

import click

from pipelines.commands.driving import drive
from pipelines.commands.options import LOCAL, QUIET


@click.command("resume")
@click.argument("run_", metavar="RUN")
@LOCAL
@QUIET
@click.pass_obj
def command(obj: dict[str, str], run_: str, local: bool, quiet: bool) -> None:
    """Go on with RUN from its last checkpoint.

    The result is the same, bit for bit, as without the break.
    """
    from moeify.recipe import load_recipe
    from pipelines import runs

    folder = runs.find(run_, runs.home())
    obj["run"] = folder.id
    match runs.status(folder):
        case "running":
            raise runs.RunBusyError(
                f"run {folder.id} is being driven by another process; wait for it, or stop it first"
            )
        case "finished":
            click.echo(f"{folder.id} is finished; see it with: moeify show {folder.id}")
        case _:
            drive(folder, load_recipe(folder.resolved), local=local, quiet=quiet)
