"""``moeify export``: what leaves a run."""

import difflib
from pathlib import Path

import click


@click.command("export")
@click.argument("run_", metavar="RUN")
@click.option("--category", metavar="NAME", help="A smaller dense model: the route of this category.")
@click.option("--split", is_flag=True, help="The whole split model.")
@click.option(
    "--out", "-o", required=True, metavar="DIR", type=click.Path(path_type=Path), help="A folder that is new or empty."
)
def command(run_: str, category: str | None, split: bool, out: Path) -> None:
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
