"""``moeify run``: start a run and see it through."""

import click

from pipelines.commands.driving import drive
from pipelines.commands.options import LOCAL, QUIET
from pipelines.find_recipe import find_recipe


@click.command("run")
@click.argument("recipe")
@LOCAL
@QUIET
@click.pass_obj
def command(obj: dict[str, str], recipe: str, local: bool, quiet: bool) -> None:
    """Run RECIPE to the end, watched.

    RECIPE is a YAML file, or the name of a recipe that comes with moeify: 'text', 'digits'. A run that was stopped
    goes on with 'moeify resume'.
    """
    from moeify.recipe import parse_recipe
    from pipelines import runs

    text, where, base = find_recipe(recipe)
    config = parse_recipe(text, where=where)
    folder = runs.create(config, text, runs.home(), base)
    obj["run"] = folder.id
    drive(folder, config, local=local, quiet=quiet)
