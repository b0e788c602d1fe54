"""``moeify route``: a router, so that a split model serves text that nobody has labelled."""

import sys
from typing import TYPE_CHECKING

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.options import JSON

if TYPE_CHECKING:
    from moeify.routed.split_model import SplitModel
    from moeify.routers.readings import Twin
    from moeify.routers.router import Kind


@click.command(
    "route",
    epilog=examples(
        "moeify route last",
        "moeify route last --kind token --threshold 0.8",
    ),
)
@RUN
@click.option(
    "--kind",
    type=click.Choice(("document", "token")),
    help="One decision a row, or one a token; not given: the better one.",
)
@click.option(
    "--threshold",
    metavar="P",
    type=click.FloatRange(0, 1),
    help="Ask a second expert where the first has less probability; 0: never. Chosen where not given.",
)
@JSON
def command(run_: str, kind: "Kind | None", threshold: float | None, as_json: bool) -> None:
    """Train RUN's router, for data without labels.

    Says what routing without labels costs. No weight of the model changes. The router learns from train data; how it
    is used is chosen on validation data, and the figures are of test data. It is kept in the run's folder, where
    'moeify generate' finds it; RUN's report has its section then.
    """
    from pipelines import copies, runs, show
    from pipelines.router_tables import print_router

    folder = runs.find_finished(run_, runs.home())
    from moeify.recipe.load import load_recipe
    from moeify.routers.router import save_router
    from moeify.routers.training import route
    from moeify.split_folder import arms_of_run, load_from_run
    from moeify.tasks.build import build_task
    from pipelines.report.page import write_or_warn

    config = load_recipe(folder.resolved)
    copies.fetch_checkpoint(folder)
    task = build_task(config, cache=runs.cache(), base=folder.base, shelf=runs.shelf("text"))
    twins: dict[Twin, SplitModel] = {"dense": load_from_run(folder.path, "dense")}
    if "told" in arms_of_run(folder.path):
        twins["told"] = load_from_run(folder.path, "told")
    if not as_json:
        click.echo("training a router and measuring it ...", err=True)
    router, report = route(load_from_run(folder.path), twins, task, config, kind, threshold)
    place = save_router(router, folder.path, report.model_dump_json(indent=1).encode())
    write_or_warn(folder)
    copies.publish(folder, folder.router.parent, folder.plots, folder.report)
    if as_json:
        click.echo(show.to_json({"run": folder.id, **show.finite(report.model_dump(mode="json"))}))
        return
    print_router(folder.id, report, sys.stdout)
    click.echo(f"\nfiles:   {place}")
    click.echo(f"report:  {folder.report}")
    if report.later:
        click.echo(f"try it:  moeify generate {folder.id} --prompt '...'")
