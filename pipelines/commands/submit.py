"""``moeify submit``: start a run on a cluster."""

import click

from pipelines.commands.arguments import RECIPE, examples
from pipelines.commands.options import ADDRESS
from pipelines.commands.watching import job_of, watch
from pipelines.find_recipe import find_recipe


@click.command(
    "submit",
    epilog=examples(
        "moeify submit text --address http://head:8265",
        "moeify submit recipe.yaml --wait",
    ),
)
@RECIPE
@ADDRESS
@click.option("--wait", is_flag=True, help="Tell what it does until it ends, and exit as it does.")
@click.pass_context
def command(ctx: click.Context, recipe: str, address: str | None, wait: bool) -> None:
    """Start a run of RECIPE on a Ray cluster.

    RECIPE is as for 'moeify run'. Data that it names by relative paths goes with it; absolute paths are the
    cluster's. The run is kept in the cluster's $MOEIFY_HOME. $RAY_AUTH_TOKEN, or the file $RAY_AUTH_TOKEN_PATH,
    lets you in.
    """
    from moeify.recipe.load import parse_recipe
    from pipelines import ray_jobs, runs

    where = ray_jobs.address_of(address)
    if where is None:
        raise click.UsageError("give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS")
    text, name, base = find_recipe(recipe)
    config = parse_recipe(text, where=name)
    run = runs.new_id(config.name)
    cluster = ray_jobs.connect(where)
    job, shared = cluster.submit(run, text, config, base)
    click.echo(f"run {run} on {where}")
    for path in shared:
        click.echo(f"reads:   {path}, on the cluster")
    click.echo(job_of(run))
    if wait:
        ctx.exit(watch(cluster, run, job))
