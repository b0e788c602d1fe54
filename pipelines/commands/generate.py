"""``moeify generate``: text, and which expert served each token of it."""

import sys
from typing import TYPE_CHECKING

import click

from pipelines.commands.arguments import RUN, check_category, examples
from pipelines.commands.options import JSON

if TYPE_CHECKING:
    from moeify.routers.router import Router


@click.command(
    "generate",
    epilog=examples(
        'moeify generate last --prompt "The court"',
        'moeify generate last --prompt "" --category law --temperature 0',
    ),
)
@RUN
@click.option("--prompt", required=True, metavar="TEXT", help="What the text starts with; may be empty.")
@click.option("--tokens", type=click.IntRange(min=1), default=100, show_default=True, help="To write at most.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the draws.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0: the likeliest token each."
)
@click.option("--category", metavar="NAME", help="Take this category's route; no router is asked.")
@JSON
def command(
    run_: str, prompt: str, tokens: int, seed: int, temperature: float, category: str | None, as_json: bool
) -> None:
    """Write text with RUN, and show who served each token.

    The router that 'moeify route' trained reads the prompt and chooses the experts, unless --category does. A router
    of kind 'document' decides from the prompt alone, and one of kind 'token' goes on deciding as the text is written.
    """
    from pipelines import copies, runs, show
    from pipelines.served import as_json as served_as_json
    from pipelines.served import print_served

    folder = runs.find_finished(run_, runs.home())
    from moeify.data.pieces import pieces
    from moeify.routers.generation import encode_prompt, generate, tokenizer_of
    from moeify.routers.router import leaf_of_category, leaves, load_router
    from moeify.split_folder import load_from_run

    copies.fetch_checkpoint(folder)
    tokenizer = tokenizer_of(folder.path)
    model = load_from_run(folder.path)
    if category is None:
        chosen: Router | int = load_router(folder.path)
    else:
        check_category(category, model.categories)
        chosen = int(leaf_of_category(model)[model.categories.index(category)])
    start = encode_prompt(tokenizer, prompt)
    tokens_served = generate(
        model, chosen, start, tokens=tokens, seed=seed, temperature=temperature, ends=tokenizer.ends
    )
    served = list(tokens_served)[1:]  # without the end token that the prompt starts behind
    texts = list(pieces(tokenizer.tokenizer, (each.token for each in served)))
    if as_json:
        settings = {"prompt": prompt, "seed": seed, "temperature": temperature, "category": category}
        click.echo(show.to_json({"run": folder.id, **settings, **served_as_json(served, texts, leaves(model))}))
    else:
        print_served(served, texts, leaves(model), sys.stdout)
