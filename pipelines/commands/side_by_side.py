"""What commands do that run jobs side by side: run, tell, deliver, and say where everything is."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

if TYPE_CHECKING:
    from pipelines.kept_jobs import JobsFolder


class Whole(Protocol):
    """A comparison or a study that has ended."""

    @property
    def broken(self) -> dict[Any, Any]:
        """The jobs that failed."""
        ...


W = TypeVar("W", bound=Whole)
Taken = TypeVar("Taken", bound=Whole, contravariant=True)


class Tracker(Protocol[Taken]):
    """Delivers it to MLflow."""

    @property
    def where_to_look(self) -> str:
        """The command line that shows it, or its address on the server."""
        ...

    def finish(self, whole: Taken, /) -> None:
        """Deliver what is missing; raises ``DeliveryError``."""
        ...

    def stop(self) -> None:
        """Say that it was interrupted."""
        ...


def drive(
    ctx: click.Context,
    folder: "JobsFolder",
    tracker: Tracker[W],
    run: Callable[[], W],
    summary: Callable[[W], Any],
    show: Callable[[W], None],
    *,
    as_json: bool,
) -> None:
    """Run it, say what came out and where it is, and exit: 1 where a job failed, 130 where it was stopped.

    ``run`` leaves its files too; ``summary`` returns what ``--json`` prints, ``show`` prints the same for people.
    """
    from pipelines.kept_jobs import publish
    from pipelines.show import to_json

    try:
        whole = run()
        publish(folder)
    except KeyboardInterrupt:
        click.echo("moeify: stopped; go on with the same command", err=True)
        tracker.stop()
        ctx.exit(130)
    if as_json:
        click.echo(to_json(summary(whole)))
    else:
        click.echo()
        show(whole)
    there = _delivered(lambda: tracker.finish(whole))
    if not as_json:
        picture = folder.picture if folder.picture.is_file() else "none, since no run ended well"
        click.echo(f"\npicture: {picture}\nfiles:   {folder.address}")
        if there:
            click.echo(f"curves:  {tracker.where_to_look}")
    ctx.exit(1 if whole.broken else 0)


def _delivered(deliver: Callable[[], None]) -> bool:
    """Deliver to MLflow; where it does not take it, say so and return False."""
    from pipelines.mlflow_store import DeliveryError

    try:
        deliver()
    except DeliveryError as error:
        click.echo(f"moeify: warning: {error}", err=True)
        return False
    return True
