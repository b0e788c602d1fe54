"""``moeify split``: an existing checkpoint in, a split model out."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines.commands.arguments import examples
from pipelines.commands.driving import drive
from pipelines.commands.options import LOCAL, QUIET

if TYPE_CHECKING:
    from moeify.starter import Starter
    from pipelines.runs import RunFolder


@click.command(
    "split",
    epilog=examples(
        "moeify split ./my-model --data texts --budget tax=2%",
        "moeify split ./my-model --data notes.jsonl --separation 0.5 --steps 400 --local",
    ),
)
@click.argument("checkpoint", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    metavar="FOLDER_OR_FILE",
    type=click.Path(path_type=Path),
    help="Texts in categories, as 'moeify init' takes them; a recipe (.yaml) whose data section gives images.",
)
@click.option("--text", metavar="FIELD", help="Of JSON lines or a table: the document; the longest one if not given.")
@click.option("--category", metavar="FIELD", help="Of JSON lines or a table: the category; the likeliest if not given.")
@click.option("--discover", is_flag=True, help="Take them as unlabelled: clusters become the categories.")
@click.option("--budget", metavar="tax=2%", help="Cut as deep as this tax allows: nats, or a share of the dense loss.")
@click.option(
    "--separation",
    metavar="FRACTION",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of FFN units that are off, or at most off with --budget.",
)
@click.option("--steps", type=click.IntRange(min=10), help="Of retraining, cuts among them; sized to this machine.")
@click.option(
    "--distill/--no-distill", default=True, show_default=True, help="Recover by what the checkpoint says, too."
)
@click.option(
    "--out", "-o", "name", metavar="RUN", help="What the run's id starts with; the checkpoint's name if not given."
)
@LOCAL
@QUIET
@click.pass_obj
def command(
    obj: dict[str, str],
    checkpoint: Path,
    data: Path,
    text: str | None,
    category: str | None,
    discover: bool,
    budget: str | None,
    separation: float | None,
    steps: int | None,
    distill: bool,
    name: str | None,
    local: bool,
    quiet: bool,
) -> None:
    """Split the checkpoint in PATH, retrained briefly, watched.

    PATH is a folder that transformers' save_pretrained wrote: a language model, causal or masked, or an image
    classifier. Nothing is trained from scratch: the checkpoint is measured, cut and retrained for a short while, held
    against itself retrained on the same rows. Only safetensors are read, and no code of the checkpoint is run. The
    recipe is kept in the run's folder, for 'moeify run'; 'show', 'report', 'export' and 'route' work as on any run.
    """
    from moeify.conversion import Wish, conversion, conversion_by_images
    from moeify.data.survey import look
    from moeify.models import pretrained
    from moeify.recipe.data import ImageData
    from moeify.recipe.load import load_recipe
    from moeify.starter import Machine
    from pipelines import machine, runs
    from pipelines.commands.amounts import print_amounts

    if category and discover:
        raise click.UsageError("give either --category or --discover")
    pretrained.look(checkpoint)  # before the texts are read, which takes longer
    wish = Wish(separation, read_budget(budget) if budget else None, steps, distill)
    called = re.sub(r"[^A-Za-z0-9_.-]+", "-", name or checkpoint.absolute().name).strip("-._")[:40] or "split"
    here = Machine(machine.cores(), machine.free_memory())
    found = None
    if data.suffix in (".yaml", ".yml"):
        if text or category or discover:
            raise click.UsageError("--text, --category and --discover are for texts, and --data is a recipe")
        given = load_recipe(data)
        if not isinstance(given.data, ImageData) or given.data.objective != "classify":
            raise ValueError(f"{data} has no images to classify in its data section; give texts as a folder or a file")
        made = conversion_by_images(checkpoint, given, data.absolute().parent, called, wish, here)
    else:
        found = look(data, text, category, discover=discover)
        made = conversion(checkpoint, found, called, wish, here, runs.cache())
    folder = runs.create(made.config, made.text, runs.home())
    obj["run"] = folder.id
    if not quiet:
        for note in found.notes if found else ():
            click.echo(note)
        print_amounts(found, made)
        _print_plan(made, folder)
    drive(folder, made.config, local=local, quiet=quiet)


def _print_plan(made: "Starter", folder: "RunFolder") -> None:
    """Say what is about to be done, and where it is written down."""
    config = made.config
    cuts = ", ".join(dict.fromkeys(f"{r.separation:.0%}" for r in config.rounds))
    limit = f", as far as a tax of {config.budget.tax} allows" if config.budget else ""
    click.echo(f"\ncuts:    FFN units off: {cuts}{limit}")
    teacher = " and from the checkpoint itself" if config.distillation else ""
    click.echo(f"learns:  {config.training.steps:,} steps an arm, the dense twin too, from the rows{teacher}")
    click.echo(
        f"recipe:  {folder.recipe}: about {max(1, round(made.minutes))} min here; again: moeify run {folder.recipe}"
    )


def read_budget(text: str) -> dict[str, str | float]:
    """Return ``tax=2%``, ``2%``, ``tax=0.02`` or ``tax=2%,per=category`` as a recipe says it; ValueError for others."""
    found: dict[str, str | float] = {}
    for part in text.split(","):
        key, equals, value = part.strip().rpartition("=")
        key = key.strip() if equals else "tax"
        if key not in ("tax", "per", "least_step") or key in found:
            raise ValueError(
                f"--budget: got {text!r}, wanted tax=2% or tax=0.02 (nats), and per=category if every one counts"
            )
        try:
            found[key] = float(value)
        except ValueError:
            found[key] = value.strip()
    return found
