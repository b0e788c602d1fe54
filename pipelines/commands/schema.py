"""``moeify schema``: what a recipe may say."""

import json

import click

from pipelines.commands.arguments import examples


@click.command(
    "schema",
    epilog=examples(
        "moeify schema > recipe.schema.json",
        "moeify schema --markdown",
    ),
)
@click.option("--markdown", is_flag=True, help="As a page to read: every field, its default and what it is.")
def command(markdown: bool) -> None:
    """Print the JSON schema of recipes, for editors."""
    if markdown:
        from moeify.recipe.reference import markdown as page

        click.echo(page(), nl=False)
        return
    from moeify.recipe.load import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
