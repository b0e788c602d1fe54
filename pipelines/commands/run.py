"""``moeify run``: start a run and see it through."""

import os

import click

from pipelines.commands.arguments import RECIPE, examples
from pipelines.commands.arguments import runs as complete_runs
from pipelines.commands.driving import drive
from pipelines.commands.options import LOCAL, QUIET
from pipelines.find_recipe import find_recipe


@click.command(
    "run",
    epilog=examples(
        "moeify run text",
        "moeify run recipe.yaml --local",
        "moeify run digits --id digits-again --quiet",
    ),
)
@RECIPE
@LOCAL
@QUIET
@click.option(
    "--id", "run_", metavar="RUN", shell_complete=complete_runs, help="The run's id; one that is there already goes on."
)
@click.option("--pack", is_flag=True, help="Keep the data that RECIPE names by relative paths in the run's folder.")
@click.pass_obj
def command(obj: dict[str, str], recipe: str, local: bool, quiet: bool, run_: str | None, pack: bool) -> None:
    """Run RECIPE to the end, watched.

    RECIPE is a YAML file, or the name of a recipe that comes with moeify: 'text', 'digits'; and where MOEIFY_DATA names
    a folder of data, 'domains', 'cifar'. A run that was stopped goes on with 'moeify resume'.
    """
    from moeify.recipe.load import load_recipe, parse_recipe
    from pipelines import homes, package, runs

    if pack and not os.environ.get("MOEIFY_HOME"):
        raise ValueError(
            "--pack keeps data where the run is kept; set MOEIFY_HOME to that folder, on every node the same"
        )
    text, where, base = find_recipe(recipe)
    config = parse_recipe(text, where=where)
    if known := runs.there(run_, runs.home()) if run_ else None:
        folder = known
        if load_recipe(folder.resolved) != config:
            raise ValueError(f"run {folder.id} is there already, of another recipe; give another id")
        if runs.status(folder) == "finished":
            click.echo(f"{folder.id} is finished; see it with: moeify show {folder.id}")
            return
    else:
        pack = pack or homes.home_of(runs.home()) is not None  # who goes on may have nothing but the URL
        fill = (lambda to: package.pack(config, base, to)) if pack else None
        folder = runs.create(config, text, runs.home(), base, run=run_, fill=fill)
    obj["run"] = folder.id
    drive(folder, config, local=local, quiet=quiet)
