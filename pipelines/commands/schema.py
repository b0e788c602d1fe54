"""``moeify schema``: the JSON schema of recipes."""

import json

import click


@click.command("schema")
def command() -> None:
    """Print the JSON schema of recipes, for editors."""
    from moeify.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
