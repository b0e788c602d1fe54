"""``moeify init``: a recipe for one's own data."""

from pathlib import Path

import click

from pipelines.commands.amounts import amounts, print_amounts
from pipelines.commands.arguments import examples
from pipelines.commands.options import JSON


@click.command(
    "init",
    epilog=examples(
        "moeify init texts",
        "moeify init notes.jsonl.gz --text body --category label -o notes.yaml",
        "moeify init saved-data-set",
        "moeify init articles.parquet --discover",
    ),
)
@click.argument("data", metavar="FOLDER_OR_FILE", type=click.Path(path_type=Path))
@click.option(
    "--out",
    "-o",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("recipe.yaml"),
    show_default=True,
    help="Where the recipe goes.",
)
@click.option("--text", metavar="FIELD", help="Of JSON lines or a table: the document; the longest one if not given.")
@click.option("--category", metavar="FIELD", help="Of JSON lines or a table: the category; the likeliest if not given.")
@click.option("--discover", is_flag=True, help="Take them as unlabelled: clusters become the categories.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@JSON
def command(
    data: Path, out: Path, text: str | None, category: str | None, discover: bool, force: bool, as_json: bool
) -> None:
    """Look at your texts and write a recipe for them.

    FOLDER_OR_FILE is a folder whose folders of text files are the categories; a file of JSON lines: .jsonl, .jsonl.gz,
    .jsonl.xz; a table, or a folder of its files: .parquet, .arrow, .csv, .tsv; or a data set that Hugging Face
    datasets wrote with save_to_disk. Nothing is downloaded. Says what it found, prepares the tokens, and sizes model,
    steps and rounds to the data and to this machine, for a first run of minutes.
    """
    import re
    import secrets

    from moeify.data.survey import look
    from moeify.starter import Machine, starter
    from pipelines import machine, runs
    from pipelines.show import to_json

    if category and discover:
        raise click.UsageError("give either --category or --discover")
    if out.exists() and not force:
        raise ValueError(f"{out} is there already; give another name with -o, or --force to write over it")
    base = out.absolute().parent
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder; make it first, or give another name with -o")
    found = look(data, text, category, discover=discover)
    if not as_json:
        for note in found.notes:
            click.echo(note)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", data.absolute().name.partition(".")[0]).strip("-._")[:40] or "mine"
    here = Machine(machine.cores(), machine.free_memory())
    made = starter(found, name, here, runs.cache(), base)
    if not as_json:
        print_amounts(found, made)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(made.text, encoding="utf-8")
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    config = made.config
    if as_json:
        click.echo(to_json({"recipe": str(out), "notes": found.notes, **amounts(found, made)}))
        return
    click.echo(
        f"\nrecipe:  {out}: {config.training.steps:,} steps an arm, about {max(1, round(made.minutes))} min here"
    )
    click.echo(f"run it:  moeify run {out}")
