"""``moeify ui``: MLflow's pages of the runs, for as long as the command lives."""

import click

from pipelines.commands.arguments import RUN_OR_NONE, examples


@click.command(
    "ui",
    epilog=examples(
        "moeify ui",
        "moeify ui last --open",
        "moeify ui --port 5001",
    ),
)
@RUN_OR_NONE
@click.option("--port", type=click.IntRange(1, 65535), help="On this machine; not given: 5000, or one that is free.")
@click.option("--open", "open_", is_flag=True, help="Open the page in a browser.")
def command(run_: str | None, port: int | None, open_: bool) -> None:
    """Serve MLflow's pages of all runs until Ctrl-C.

    They are served to this machine alone. Says where to look: the list of runs, or RUN's page. Where
    $MLFLOW_TRACKING_URI names a server, its address is said and nothing is served.
    """
    from pipelines import mlflow_ui, runs

    folder = runs.find(run_ or "last", runs.home())
    server = mlflow_ui.server_of(runs.home())
    if server is not None:
        _say(mlflow_ui.page(server, folder, alone=run_ is not None), open_)
        return
    with mlflow_ui.served(runs.home(), port) as (address, ended):
        _say(mlflow_ui.page(address, folder, alone=run_ is not None), open_)
        click.echo("Ctrl-C ends it", err=True)
        ended()


def _say(address: str, open_: bool) -> None:
    click.echo(f"runs:    {address}")
    if open_:
        click.launch(address)
