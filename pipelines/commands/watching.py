"""What commands share that see to a run on a cluster."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipelines.ray_jobs import Attempt, Jobs


def job_of(run: str) -> str:
    """Return the lines that say where to look."""
    return f"watch:   moeify logs -f {run}\nstands:  moeify status {run}\nstop:    moeify stop {run}"


def watch(cluster: "Jobs", run: str, job: str) -> int:
    """Tell what a job writes until it ends; return what to exit with."""
    try:
        ended = cluster.follow(job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"moeify: no longer watched; {run} goes on, see: moeify logs -f {run}", err=True)
        return 130
    if ended.code:
        click.echo(f"moeify: {run} {how(ended)}; go on with: moeify resume {run}", err=True)
    return ended.code


def how(attempt: "Attempt") -> str:
    """Say how a job ended."""
    match attempt.status:
        case "SUCCEEDED":
            return "has ended"
        case "STOPPED":
            return "was stopped"
        case _:
            return f"failed ({' '.join(attempt.message.split())[:200]})"
