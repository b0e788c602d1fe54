"""``moeify report``: a run as one page."""

from pathlib import Path

import click

from pipelines.commands.arguments import RUN, examples


@click.command(
    "report",
    epilog=examples(
        "moeify report last",
        "moeify report last -o report.html --examples",
    ),
)
@RUN
@click.option("--out", "-o", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Where it goes.")
@click.option("--examples", is_flag=True, help="Pick the examples of what each expert does anew; loads the model.")
def command(run_: str, out: Path | None, examples: bool) -> None:
    """Write RUN's report, one HTML page of all it did.

    It tells the expert tree, what each expert does, who owns what, attribution, tax, training, removals, affinities,
    cost and provenance, and what a router does where RUN has one. It goes to 'report.html' in the run's folder unless
    told where. A run writes it after every round by itself; this makes it anew, for runs that are under way or from an
    earlier version, too.
    """
    from pipelines import copies, runs
    from pipelines.report.page import write

    folder = (runs.find_finished if examples else runs.find)(run_, runs.home())
    if examples:
        from moeify.recipe.load import load_recipe
        from moeify.tasks.build import build_task
        from pipelines.examples import keep

        config = load_recipe(folder.resolved)
        if not config.evaluation.example_rows:
            raise ValueError(f"the recipe of {folder.id} asks for no examples: evaluation.example_rows is 0")
        copies.fetch_checkpoint(folder)
        keep(folder, config, build_task(config, cache=runs.cache(), base=folder.base, shelf=runs.shelf("text")))
    written = write(folder, out)
    copies.publish(folder, folder.plots, folder.report, folder.portraits)
    click.echo(f"report:  {written}")
