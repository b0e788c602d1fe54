"""``moeify status``: where a run stands."""

from typing import TYPE_CHECKING, Any

import click

from pipelines.commands.arguments import RUN, examples
from pipelines.commands.options import ADDRESS, JSON

if TYPE_CHECKING:
    from pipelines.ray_jobs import Jobs


@click.command(
    "status",
    epilog=examples(
        "moeify status last",
        "moeify status last --json",
    ),
)
@RUN
@ADDRESS
@JSON
def command(run_: str, address: str | None, as_json: bool) -> None:
    """Say where RUN stands."""
    from pipelines import ray_jobs, runs
    from pipelines.show import to_json
    from pipelines.standing import lines, standing

    if (where := ray_jobs.address_of(address)) is None:
        stands = standing(runs.find(run_, runs.home()))
    else:
        stands = _on_cluster(ray_jobs.connect(where), run_)
    if as_json:
        click.echo(to_json(stands))
        return
    click.echo("\n".join(lines(stands)))
    if where:
        job = stands["job"]
        click.echo(f"job:     {job['id']} {job['status']}" if job else "job:     none that the head knows")


def _on_cluster(cluster: "Jobs", reference: str) -> dict[str, Any]:
    """Return what the folder says and the newest job."""
    from pipelines.commands.watching import reason

    run = cluster.resolve(reference)
    newest = next(reversed(cluster.attempts(run)), None)
    try:
        stands = cluster.status(run)
    except ValueError:
        if newest is None:
            raise
        # Its driver has not made the folder yet, or never could.
        stands = {"run": run, "status": "queued" if newest.live else "failed", "work": 0.0, "where": "", "step": ""}
        stands |= {"rounds": 0, "reason": None if newest.live else reason(newest), "folder": None}
    if newest and newest.live and stands["status"] in ("interrupted", "failed"):
        stands |= {"status": "starting", "reason": None}  # the driver of this attempt has yet to take the run up
    return stands | {"job": newest and {"id": newest.id, "status": newest.status}}
