"""``moeify cluster``: a cluster on this machine, to try the service with."""

import shlex
import time

import click

from pipelines.commands.arguments import examples


@click.group("cluster", epilog=examples('eval "$(moeify cluster up --local 2)"', "moeify cluster down"))
def command() -> None:
    """Start or end a cluster on this machine.

    It is a real one, of several processes, with a job API, a dashboard and an MLflow server, all bound to loopback.
    Ray is closed to whoever has not the token. Runs are kept in $MOEIFY_HOME, or in ./runs.
    """


@command.command(
    "up", epilog=examples('eval "$(moeify cluster up --local 2)"', "moeify cluster up --local 1 --cores 2")
)
@click.option("--local", "nodes", type=click.IntRange(1, 16), required=True, metavar="N", help="Ray nodes.")
@click.option("--cores", type=click.IntRange(1), help="That each node counts; with fewer real ones, runs take turns.")
@click.option("--gpus", type=click.IntRange(0, 16), default=0, help="That each node has of this machine's.")
def up(nodes: int, cores: int | None, gpus: int) -> None:
    """Start it, in the background, and print the environment of a shell that uses it.

    eval "$(moeify cluster up --local 2)" does both.
    """
    from pipelines import cluster, runs
    from pipelines.wording import counted

    began = time.monotonic()
    told = counted(nodes, "Ray node")
    click.echo(f"starting {told} and MLflow; this takes half a minute ...", err=True)
    started = cluster.up(runs.home(), nodes, cores, gpus)
    each = counted(started.cores, "core") + (f" and {counted(gpus, 'GPU')}" if gpus else "")
    for line in (
        f"{told} ({each} each): up after {time.monotonic() - began:.0f} s",
        f"jobs:    {started.api}, the dashboard too; the token is in {started.token}",
        f"curves:  {started.mlflow}",
        f"runs:    {started.home}",
        "end:     moeify cluster down",
    ):
        click.echo(line, err=True)
    for name, value in started.exports.items():
        click.echo(f"export {name}={shlex.quote(value)}")


@command.command("down", epilog=examples("moeify cluster down"))
def down() -> None:
    """End the cluster that 'up' started, and nothing else."""
    from pipelines import cluster, runs

    click.echo(f"the cluster is down; {cluster.down(runs.home())} processes ended")
