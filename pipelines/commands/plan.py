"""``moeify plan``: what a recipe takes, before it runs."""

import sys

import click

from pipelines.commands.arguments import RECIPE, examples
from pipelines.commands.options import JSON


@click.command(
    "plan",
    epilog=examples(
        "moeify plan text --here",
        "moeify plan big.yaml --gpus 8xH100",
    ),
)
@RECIPE
@click.option("--gpus", metavar="NxGPU", help="Plan for GPUs, one worker each, such as 8xH100.")
@click.option("--here", is_flag=True, help="Measure how fast this machine trains, with a few steps on random rows.")
@click.option("--utilization", type=click.FloatRange(0, 1, min_open=True), help="Share of the GPUs' peak; 0.4.")
@click.option("--categories", type=click.IntRange(min=2), help="How many there are, where only the data itself says.")
@JSON
def command(
    recipe: str, gpus: str | None, here: bool, utilization: float | None, categories: int | None, as_json: bool
) -> None:
    """Say what RECIPE takes: hours, memory, operations.

    Its data are not read, nothing is trained. The network is run once on tensors that hold no numbers, at its full
    size, so this takes seconds for billions of parameters.
    """
    from moeify.far import near_model
    from moeify.recipe.load import parse_recipe
    from pipelines import accelerators, planned, runs
    from pipelines.find_recipe import find_recipe
    from pipelines.show import to_json

    if gpus and here:
        raise ValueError("--here: got it beside --gpus, wanted one of the two; this machine's speed is not theirs")
    if utilization and not gpus:
        raise ValueError(
            "--utilization: got it without --gpus, whose peak it is a share of; name GPUs, or leave it out"
        )
    on = accelerators.asked(gpus) if gpus else None
    text, where, base = find_recipe(recipe)
    config = near_model(parse_recipe(text, where=where), runs.cache())
    known = config.category_names
    number = len(known) if known else categories
    if number is None:
        raise ValueError(f"{where}: its categories are known from its data alone; say how many with --categories")
    if here and config.cluster.gpus:
        raise ValueError(f"--here measures this machine's CPU, and {where} asks for GPUs; name them with --gpus")
    machine = planned.Machine(config.cluster.workers, "GPU" if config.cluster.gpus else None)
    if on:
        machine = planned.on_gpus(*on, config, utilization or accelerators.UTILIZATION)
    plan = planned.planned(config, base, number, machine, here=here)
    if as_json:
        click.echo(to_json(plan))
    else:
        planned.print_plan(plan, sys.stdout)
