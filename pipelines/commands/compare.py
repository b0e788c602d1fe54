"""``moeify compare``: which way to split is the better one, over several seeds."""

import sys
from typing import TYPE_CHECKING

import click

from pipelines.commands.arguments import RECIPE, examples
from pipelines.commands.options import JSON
from pipelines.commands.side_by_side import drive
from pipelines.find_recipe import find_recipe

if TYPE_CHECKING:
    from moeify.comparison import Job
    from moeify.recipe.config import RunConfig
    from pipelines.compare import Comparison


class _Lists(click.Command):
    """Lets an option that may be given several times take all its values at once: ``--methods a b``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Write each value of such an option as an option of its own."""
        several = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        spelt: list[str] = []
        option = ""
        for place, word in enumerate(args):
            if word.startswith("-"):
                option = word if word in several else ""
                follows = place + 1 < len(args) and not args[place + 1].startswith("-")
                if not option or not follows:
                    spelt.append(word)
            else:
                spelt += [option, word] if option else [word]
        return super().parse_args(ctx, spelt)


@click.command(
    "compare",
    cls=_Lists,
    epilog=examples(
        "moeify compare digits",
        "moeify compare recipe.yaml --methods random oneshot --seeds 3",
    ),
)
@RECIPE
@click.option(
    "--methods", multiple=True, metavar="METHOD ...", help="The loop's rivals; all that differ from it if not given."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="From the recipe's seed on.")
@click.option(
    "--separations", multiple=True, type=float, metavar="FRACTION ...", help="Of the last round; the recipe's own."
)
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    recipe: str,
    methods: tuple[str, ...],
    seeds: int,
    separations: tuple[float, ...],
    as_json: bool,
) -> None:
    """Compare RECIPE's loop with its rivals, seed by seed.

    As many runs at a time as there are cores. METHOD is 'oneshot' (one cut into all leaves), 'init' (such a cut before
    the first step, at random), the loop with one switch of its partition thrown (equal_widths, uncompensated,
    closed_form, following, refined, unrefined, told_split), or another way to find owners (random, magnitude,
    moefication, coactivation, cmoe, llama_moe, learned). The loop is always run. The same command goes on where it was
    stopped; more methods, seeds or separations add to what is there.
    """
    from moeify.comparison import jobs
    from moeify.recipe.load import parse_recipe
    from moeify.recipe.variants import rivals
    from pipelines import runs

    text, where, base = find_recipe(recipe)
    config = parse_recipe(text, where=where)
    asked = jobs(
        methods or rivals(config),
        separations or (config.rounds[-1].separation,),
        range(config.seed, config.seed + seeds),
    )
    from pipelines import compare, compare_report
    from pipelines.compare_tracking import ComparisonTracker

    folder = compare.open_folder(config, base, runs.home())
    _announce(config, asked, folder.address)
    tracker = ComparisonTracker(folder, config)

    def heard(comparison: "Comparison", job: "Job", cores: int) -> None:
        click.echo(compare.progress_line(comparison, job, cores), err=True)
        tracker.tell(comparison)

    def run() -> "Comparison":
        comparison = compare.compare(config, asked, base, folder, heard)
        compare_report.write(comparison, folder)
        return comparison

    def show(comparison: "Comparison") -> None:
        compare_report.print_comparison(comparison, folder, sys.stdout)

    drive(ctx, folder, tracker, run, lambda whole: compare_report.summary(whole, folder), show, as_json=as_json)


def _announce(config: "RunConfig", jobs: "tuple[Job, ...]", where: str) -> None:
    """Say what is going to happen, and what of the recipe does not count here."""
    click.echo(f"{len(jobs)} runs, kept in {where}", err=True)
    asked = config.cluster
    if asked.workers > 1 or asked.threads > 1:
        click.echo(
            f"each run has one worker of one thread, not the recipe's {asked.workers} of {asked.threads}", err=True
        )
