"""``moeify attribute``: which unit matters to which category."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from moeify.recipe.arms import Arm
from pipelines.commands.arguments import examples, recipes, runs_or_models
from pipelines.commands.options import JSON
from pipelines.find_recipe import find_recipe

if TYPE_CHECKING:
    from moeify.recipe.config import RunConfig
    from moeify.subjects import Probed
    from pipelines.runs import RunFolder


@click.command(
    "attribute",
    epilog=examples(
        "moeify attribute last",
        "moeify attribute last --arm dense --rows 64 --agreement",
        "moeify attribute ./my-model --data recipe.yaml -o attribution",
    ),
)
@click.argument("target", metavar="RUN_OR_MODEL", shell_complete=runs_or_models)
@click.option("--arm", type=click.Choice(get_args(Arm)), help="Of a run; split where it has been split.")
@click.option(
    "--data",
    metavar="RECIPE",
    shell_complete=recipes,
    help="For a MODEL: the recipe whose data section gives text or images in categories.",
)
@click.option("--rows", type=click.IntRange(min=2), help="Rows of each category (16, or as the recipe says).")
@click.option("--agreement", is_flag=True, help="Hold every method against exact ablation, too (minutes).")
@click.option("--out", "-o", metavar="DIR", type=click.Path(path_type=Path), help="Where the files go.")
@JSON
def command(
    target: str, arm: Arm | None, data: str | None, rows: int | None, agreement: bool, out: Path | None, as_json: bool
) -> None:
    """Measure which unit of RUN_OR_MODEL matters to which category.

    MODEL is a folder that transformers' save_pretrained wrote. Leaves the table (safetensors and Parquet), a picture
    and the categories' affinity graph (GraphML) in DIR, or in the run's folder under 'attribution'.
    """
    from pipelines import attribute, copies, show

    name, probed, config, place, removed, folder = _probed(target, arm, data, rows)
    say = (lambda _: None) if as_json else (lambda text: click.echo(f"{text} ...", err=True))
    score, place = config.attribution.score, out or place
    found = attribute.attribute(
        probed, place, score=score, seed=config.seed, agreement=agreement, removed=removed, say=say
    )
    if folder and not out:
        copies.publish(folder, place)
    if as_json:
        click.echo(show.to_json(show.finite(attribute.summary(found))))
        return
    attribute.print_found(name, found, probed.unit, sys.stdout)
    click.echo(f"\nfiles:   {place}")


def _probed(
    target: str, arm: Arm | None, data: str | None, rows: int | None
) -> tuple[str, "Probed", "RunConfig", Path, float, "RunFolder | None"]:
    """Return what to call the model, what to measure, the recipe, the folder of files, the share cut off, the run."""
    from moeify.recipe.data import ImageData, TextData
    from moeify.recipe.load import load_recipe, parse_recipe
    from moeify.split_folder import arms_of_run
    from moeify.subjects import of_checkpoint, of_classifier, of_run
    from pipelines import copies, runs

    model = Path(target)
    if model.is_dir() and (model / "config.json").is_file():
        if arm or data is None:
            raise click.UsageError("a MODEL needs --data RECIPE and has no --arm")
        text, where, base = find_recipe(data)
        config = parse_recipe(text, where=where)
        called, place = model.name, Path.cwd() / f"{model.absolute().name}-attribution"
        if isinstance(config.data, ImageData):
            return called, of_classifier(model, config, base=base, rows=rows or 16), config, place, 0.5, None
        if not isinstance(config.data, TextData):
            raise ValueError(f"{where} has data.kind {config.data.kind!r}; a MODEL needs 'text' or 'images'")
        probed = of_checkpoint(
            model,
            config.data,
            base=base,
            rows=rows or 16,
            rows_at_once=config.attribution.rows_at_once,
            seed=config.seed,
        )
        return called, probed, config, place, 0.5, None
    if data is not None:
        raise click.UsageError(f"--data is for a MODEL, and {target!r} is no folder with a config.json")
    folder = runs.find(target, runs.home())
    config = load_recipe(folder.resolved)
    copies.fetch_checkpoint(folder)
    there = arms_of_run(folder.path)
    arm = arm or ("split" if "split" in there else "dense")
    probed = of_run(
        folder.path,
        config,
        arm,
        cache=runs.cache(),
        base=folder.base,
        rows=rows or config.attribution.rows,
        shelf=runs.shelf("text"),
    )
    removed = config.rounds[-1].separation
    return f"{folder.id} ({arm})", probed, config, folder.path / "attribution" / arm, removed, folder
