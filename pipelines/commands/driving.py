"""Drive a run to its end in front of a person."""

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moeify.recipe.config import RunConfig
    from pipelines.runs import RunFolder


def drive(folder: "RunFolder", config: "RunConfig", *, local: bool, quiet: bool) -> None:
    """Run to the end, watched; then show what came out."""
    from pipelines.display import choose_display
    from pipelines.journal import read_events
    from pipelines.show import print_run

    earlier = len(read_events(folder.journal, 0)[0])
    if not quiet:
        click.echo(f"run {folder.id} in {folder.address}")
    display = choose_display(quiet, sys.stdout, earlier, config)
    try:
        from pipelines.launch import in_process, on_ray

        start = in_process if local else on_ray
        start(folder, config, folder.base, [display] if display else [])
    finally:
        if display:
            display.close()
    if not quiet:
        from pipelines.tracking import where_to_look

        click.echo()
        print_run(folder, sys.stdout)
        click.echo(f"\nagain:   moeify show {folder.id}\nfiles:   {folder.address}")
        if folder.report.is_file():
            click.echo(f"report:  {folder.report}")
        click.echo(f"curves:  {where_to_look(folder)}")
