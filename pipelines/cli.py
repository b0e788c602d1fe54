"""The command line: what it offers, and how it tells errors. Each command is a module of ``pipelines.commands``.

What a command needs is imported when it runs: help, schema and a bad recipe stay quick.

Exit codes: 0 done; 1 the run broke down; 2 recipe, data, files or arguments are at fault; 130 stopped with Ctrl-C.
"""

import errno
import os
import sys
from importlib import import_module
from typing import Any

import click

from pipelines.commands.arguments import examples
from pipelines.one_line import one_line

COMMANDS = (
    *("init", "plan", "run", "split", "resume", "compare", "study"),
    *("runs", "show", "report", "status", "logs", "stop", "submit", "cluster"),
    *("attribute", "advise", "export", "route", "generate", "ui", "sync", "schema", "doctor", "completion"),
)
"""In the order of the help; the module of each holds ``command``."""


class _Commands(click.Group):
    """Imports a command when it is asked for, and turns errors that a person can mend into lines on stderr.

    ``--debug`` lets errors through.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        return import_module(f"pipelines.commands.{cmd_name}").command if cmd_name in COMMANDS else None

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        ctx.obj = {}
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            run, how = ctx.obj.get("run"), str(stop) or "stopped"
            click.echo(f"moeify: {how}" + (f"; go on with: moeify resume {run}" if run else ""), err=True)
            ctx.exit(130)
        except (ValueError, OSError, RuntimeError) as error:
            if ctx.params["debug"] or isinstance(error, click.exceptions.Exit):
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            code = _exit_code(error)
            if code is None:
                raise
            click.echo(f"moeify: error: {_told(error)}", err=True)
            ctx.exit(code)


def entry() -> None:
    """Be the process of a command.

    Where a follower of a run is still busy with a slow server, leave at once: what it missed is in the journal, and the
    interpreter, which ends threads wherever they are, may abort inside of a library and spoil the exit code.
    """
    try:
        main(prog_name="moeify")
    except SystemExit as end:
        journal = sys.modules.get("pipelines.journal")
        if not (journal and journal.left_behind()):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _exit_code(error: Exception) -> int | None:
    """Return 2 for a user's mistake, 1 for a run whose workers broke down, None for a mistake of ours."""
    if isinstance(error, ValueError | OSError):
        return 2
    on_ray = sys.modules.get("pipelines.ray_cluster")
    return 1 if on_ray and isinstance(error, on_ray.RunFailedError) else None


def _told(error: Exception) -> str:
    """Return one line; a recipe's problems have one each."""
    from moeify.recipe.load import RecipeError

    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(error, None)


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pipelines.versions import package_version

        click.echo(f"moeify {package_version()}")
        ctx.exit()


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples("moeify run text", "moeify init texts", "moeify show last", "moeify show --help"),
)
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main(debug: bool) -> None:
    """Split a network into experts, one for each kind of data, while it trains.

    RUN is a run's id, a unique start of it, or 'last'. Runs are kept in $MOEIFY_HOME, a
    folder or an s3:// or gs:// URL, or in ./runs.
    """
