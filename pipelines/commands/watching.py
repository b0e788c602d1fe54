"""What commands share that see to a run on a cluster."""

from typing import TYPE_CHECKING

import click

from pipelines.one_line import one_line

if TYPE_CHECKING:
    from pipelines.ray_jobs import Attempt, Jobs

_ERROR = "moeify: error: "


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
    if cluster.finished(ended):
        return 0
    if ended.code:
        at_fault = ended.code == 2
        way_out = "mend the recipe or its data and submit again" if at_fault else f"go on with: moeify resume {run}"
        click.echo(f"moeify: {run} {_how(ended)}; {way_out}", err=True)
    return ended.code


def reason(attempt: "Attempt") -> str:
    """Return why a job failed: what the command said of it, which stands in Ray's message among the log, or that."""
    told = [line for line in attempt.message.splitlines() if line.startswith(_ERROR)]
    return one_line(told[-1].removeprefix(_ERROR) if told else attempt.message)


def _how(attempt: "Attempt") -> str:
    """Say how a job ended that did not end well; the log, which was told, says why, where there is one."""
    if attempt.status == "STOPPED":
        return "was stopped"
    if attempt.exit_code is not None:
        return f"failed with exit code {attempt.exit_code}"
    return f"failed ({one_line(attempt.message, 200)})"
