"""``moeify advise``: which categories to separate, before money is spent on it."""

import sys

import click
from click.shell_completion import CompletionItem

from pipelines.commands.arguments import examples, recipes, runs_or_models
from pipelines.commands.options import JSON


def _targets(ctx: click.Context | None, parameter: click.Parameter | None, begun: str) -> list[CompletionItem]:
    """Return runs, recipes and folders to go on in."""
    found = [*runs_or_models(ctx, parameter, begun), *recipes(ctx, parameter, begun)]
    return list({item.value: item for item in reversed(found)}.values())[::-1]


@click.command(
    "advise",
    epilog=examples(
        "moeify advise last",
        "moeify advise recipe.yaml --separation 0.3",
        "moeify advise ./my-model --data texts",
    ),
)
@click.argument("target", metavar="RUN_OR_MODEL_OR_RECIPE", shell_complete=_targets)
@click.option(
    "--data",
    metavar="TEXTS_OR_RECIPE",
    shell_complete=recipes,
    help="For a MODEL: texts in categories, as 'moeify split' takes them, or a recipe with a data section.",
)
@click.option(
    "--separation",
    metavar="FRACTION",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the units that is off in whatever is tried; that of the recipe's first round.",
)
@click.option("--rows", type=click.IntRange(min=2), help="Rows of each category; as the recipe says.")
@click.option(
    "--permutations",
    type=click.IntRange(min=0),
    help="Passes with permuted labels a level of the tree; 8, or as the recipe says. 0: no null test.",
)
@JSON
def command(
    target: str,
    data: str | None,
    separation: float | None,
    rows: int | None,
    permutations: int | None,
    as_json: bool,
) -> None:
    """Recommend a tree of experts; nothing is trained.

    Of a run, its dense twin is looked at; MODEL is a folder that transformers' save_pretrained wrote; of a RECIPE its
    network, trained or not. Says which categories use the same units, what every merge would cost at the same active
    units, which groups are not worth separating, and the 'tree' to put into the recipe.
    """
    from pipelines import advise, show
    from pipelines.advised import find_advised

    if permutations in (1, 2):
        raise ValueError(f"--permutations: got {permutations}, wanted 0 (no null test), or 3 or more")
    say = (lambda _: None) if as_json else (lambda text: click.echo(f"{text} ...", err=True))
    advised = find_advised(target, data)
    advice = advise.advice_of(advised, separation=separation, rows=rows, permutations=permutations, say=say)
    if as_json:
        click.echo(show.to_json(show.finite(advise.summary(advised, advice))))
        return
    advise.print_advice(advised, advice, sys.stdout)
