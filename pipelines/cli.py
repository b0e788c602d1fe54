"""The command line. What a command needs is imported when it runs: help, schema and a bad recipe stay quick.

Exit codes: 0 done; 1 the run broke down; 2 recipe, data, files or arguments are at fault; 130 stopped with Ctrl-C.
"""

import difflib
import errno
import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from moeify.arms import Arm

if TYPE_CHECKING:
    from moeify.config import RunConfig
    from moeify.subjects import Probed
    from pipelines.runs import RunFolder


class _Commands(click.Group):
    """Turns errors that a person can mend into lines on stderr; ``--debug`` lets them through."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        ctx.obj = {}
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            run = ctx.obj.get("run")
            click.echo(f"moeify: stopped; go on with: moeify resume {run}" if run else "moeify: stopped", err=True)
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


def _exit_code(error: Exception) -> int | None:
    """Return 2 for a user's mistake, 1 for a run whose workers broke down, None for a mistake of ours."""
    if isinstance(error, ValueError | OSError):
        return 2
    launch = sys.modules.get("pipelines.launch")
    return 1 if launch and isinstance(error, launch.RunFailedError) else None


def _told(error: Exception) -> str:
    """Return one line; a recipe's problems have one each."""
    from moeify.recipe import RecipeError

    if isinstance(error, RecipeError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pipelines.runs import package_version

        click.echo(f"moeify {package_version()}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main(debug: bool) -> None:
    """Split a network into experts, one for each kind of data, while it trains.

    RUN is a run's id, a unique start of it, or 'last'. Runs are kept in $MOEIFY_HOME, or in ./runs.
    """


_LOCAL = click.option("--local", is_flag=True, help="In this process, one worker, without Ray.")
_QUIET = click.option("--quiet", "-q", is_flag=True, help="Say nothing unless something fails.")
_JSON = click.option("--json", "as_json", is_flag=True, help="For programs: the same as JSON.")


@main.command()
@click.argument("recipe")
@_LOCAL
@_QUIET
@click.pass_obj
def run(obj: dict[str, str], recipe: str, local: bool, quiet: bool) -> None:
    """Run RECIPE to the end, watched.

    RECIPE is a YAML file, or the name of a recipe that comes with moeify: 'text', 'digits'. A run that was stopped
    goes on with 'moeify resume'.
    """
    from moeify.recipe import parse_recipe
    from pipelines import runs

    text, where, base = _recipe(recipe)
    config = parse_recipe(text, where=where)
    folder = runs.create(config, text, runs.home(), base)
    obj["run"] = folder.id
    _drive(folder, config, local=local, quiet=quiet)


@main.command()
@click.argument("run_", metavar="RUN")
@_LOCAL
@_QUIET
@click.pass_obj
def resume(obj: dict[str, str], run_: str, local: bool, quiet: bool) -> None:
    """Go on with RUN from its last checkpoint.

    The result is the same, bit for bit, as without the break.
    """
    from moeify.recipe import load_recipe
    from pipelines import runs

    folder = runs.find(run_, runs.home())
    obj["run"] = folder.id
    match runs.status(folder):
        case "running":
            raise runs.RunBusyError(
                f"run {folder.id} is being driven by another process; wait for it, or stop it first"
            )
        case "finished":
            click.echo(f"{folder.id} is finished; see it with: moeify show {folder.id}")
        case _:
            _drive(folder, load_recipe(folder.resolved), local=local, quiet=quiet)


@main.command("runs")
@_JSON
def runs_(as_json: bool) -> None:
    """List all runs, oldest first."""
    from pipelines import runs, show

    folders = runs.every(runs.home())
    if as_json:
        click.echo(show.to_json(show.listing(folders)))
    elif folders:
        show.print_runs(folders, sys.stdout)
    else:
        click.echo(f"No runs in {runs.home()}; start one with: moeify run RECIPE")


@main.command()
@click.argument("run_", metavar="RUN")
@_JSON
def show(run_: str, as_json: bool) -> None:
    """Show RUN's expert tree, its rounds, and what they cost."""
    from pipelines import runs, show

    folder = runs.find(run_, runs.home())
    if as_json:
        click.echo(show.to_json(show.summary(folder)))
    else:
        show.print_run(folder, sys.stdout)


@main.command()
@click.argument("run_", metavar="RUN")
@click.option("--category", metavar="NAME", help="A smaller dense model: the route of this category.")
@click.option("--split", is_flag=True, help="The whole split model.")
@click.option(
    "--out", "-o", required=True, metavar="DIR", type=click.Path(path_type=Path), help="A folder that is new or empty."
)
def export(run_: str, category: str | None, split: bool, out: Path) -> None:
    """Write RUN's model, or one category's part of it, to a folder."""
    from pipelines import runs
    from pipelines.show import summary

    if (category is not None) == split:
        raise click.UsageError("give either --category NAME or --split")
    folder = runs.find(run_, runs.home())
    known = summary(folder)
    if known["status"] != "finished":
        raise ValueError(f"run {folder.id} is {known['status']}, wanted a finished one; see 'moeify resume'")
    if category is not None and category not in known["categories"]:
        close = difflib.get_close_matches(category, known["categories"], 1)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise ValueError(f"no category {category!r}; the run has {', '.join(known['categories'])}{nearest}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a folder that is new or empty")
    from moeify.export import export_category, export_split

    if category is None:
        export_split(folder.path, out)
    else:
        export_category(folder.path, category, out)
    click.echo(f"wrote {out}")


@main.command()
@click.argument("target", metavar="RUN_OR_MODEL")
@click.option("--arm", type=click.Choice(get_args(Arm)), help="Of a run; split where it has been split.")
@click.option("--data", metavar="RECIPE", help="For a MODEL: the recipe whose data section gives text in categories.")
@click.option("--rows", type=click.IntRange(min=2), help="Rows of each category (16, or as the recipe says).")
@click.option("--agreement", is_flag=True, help="Hold every method against exact ablation, too (minutes).")
@click.option("--out", "-o", metavar="DIR", type=click.Path(path_type=Path), help="Where the files go.")
@_JSON
def attribute(
    target: str, arm: Arm | None, data: str | None, rows: int | None, agreement: bool, out: Path | None, as_json: bool
) -> None:
    """Measure which unit of RUN_OR_MODEL matters to which category.

    MODEL is a folder that transformers' save_pretrained wrote. Leaves the table (safetensors and Parquet), a picture
    and the categories' affinity graph (GraphML) in DIR, or in the run's folder under 'attribution'.
    """
    from pipelines import attribute, show

    name, probed, config, place, removed = _probed(target, arm, data, rows)
    say = (lambda _: None) if as_json else (lambda text: click.echo(f"{text} ...", err=True))
    score, place = config.attribution.score, out or place
    found = attribute.attribute(
        probed, place, score=score, seed=config.seed, agreement=agreement, removed=removed, say=say
    )
    if as_json:
        click.echo(show.to_json(show.finite(attribute.summary(found))))
        return
    attribute.print_found(name, found, probed.unit, sys.stdout)
    click.echo(f"\nfiles:   {place}")


@main.command()
@click.argument("run_", metavar="RUN")
def sync(run_: str) -> None:
    """Deliver to MLflow what it missed of RUN.

    It goes to $MLFLOW_TRACKING_URI, or to the database beside the runs. A run delivers by itself as it goes on; this
    is for what MLflow could not take then. Nothing shows twice.
    """
    from moeify.recipe import load_recipe
    from pipelines import runs

    folder = runs.find(run_, runs.home())
    config = load_recipe(folder.resolved)
    from pipelines.tracking import deliver, where_to_look

    count = deliver(folder, config)
    click.echo(f"{count:,} {'event' if count == 1 else 'events'} delivered" if count else "MLflow misses nothing")
    click.echo(f"curves:  {where_to_look(folder)}")


@main.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from moeify.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


def _drive(folder: "RunFolder", config: "RunConfig", *, local: bool, quiet: bool) -> None:
    """Run to the end, watched; then show what came out."""
    from pipelines.display import choose_display
    from pipelines.journal import read_events
    from pipelines.show import print_run

    earlier = len(read_events(folder.journal, 0)[0])
    if not quiet:
        click.echo(f"run {folder.id} in {folder.path}")
    display = choose_display(quiet, sys.stdout, earlier)
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
        click.echo(f"\nagain:   moeify show {folder.id}\nfiles:   {folder.path}\ncurves:  {where_to_look(folder)}")


def _probed(
    target: str, arm: Arm | None, data: str | None, rows: int | None
) -> tuple[str, "Probed", "RunConfig", Path, float]:
    """Return what to call the model, what to measure, the recipe, the folder of files and the share a cut removes."""
    from moeify.config import TextData
    from moeify.recipe import load_recipe, parse_recipe
    from moeify.split_folder import arms_of_run
    from moeify.subjects import of_checkpoint, of_run
    from pipelines import runs

    model = Path(target)
    if model.is_dir() and (model / "config.json").is_file():
        if arm or data is None:
            raise click.UsageError("a MODEL needs --data RECIPE and has no --arm")
        text, where, base = _recipe(data)
        config = parse_recipe(text, where=where)
        if not isinstance(config.data, TextData):
            raise ValueError(f"{where} has data.kind {config.data.kind!r}; a language model needs 'text'")
        probed = of_checkpoint(
            model,
            config.data,
            base=base,
            rows=rows or 16,
            rows_at_once=config.attribution.rows_at_once,
            seed=config.seed,
        )
        return model.name, probed, config, Path.cwd() / f"{model.absolute().name}-attribution", 0.5
    if data is not None:
        raise click.UsageError(f"--data is for a MODEL, and {target!r} is no folder with a config.json")
    folder = runs.find(target, runs.home())
    config = load_recipe(folder.resolved)
    there = arms_of_run(folder.path)
    arm = arm or ("split" if "split" in there else "dense")
    probed = of_run(
        folder.path, config, arm, cache=runs.cache(), base=folder.base, rows=rows or config.attribution.rows
    )
    removed = config.rounds[-1].separation
    return f"{folder.id} ({arm})", probed, config, folder.path / "attribution" / arm, removed


def _recipe(reference: str) -> tuple[str, str, Path]:
    """Return a recipe's text, what to call it in errors, and where its relative paths start.

    A bare name means a recipe that comes with moeify first, and a file only where there is no such recipe.
    """
    from moeify.recipe import read_text

    shipped = {
        Path(entry.name).stem: entry for entry in files("pipelines.recipes").iterdir() if entry.name.endswith(".yaml")
    }
    if reference in shipped:
        return shipped[reference].read_text(encoding="utf-8"), f"recipe {reference!r}", Path.cwd()
    path = Path(reference)
    if path.exists():
        return read_text(path), str(path), path.absolute().parent
    close = difflib.get_close_matches(reference, shipped, 1)
    nearest = f"; nearest: {close[0]}" if close else ""
    raise ValueError(
        f"{reference!r} is neither a file nor a recipe that comes with moeify ({', '.join(sorted(shipped))}){nearest}"
    )
