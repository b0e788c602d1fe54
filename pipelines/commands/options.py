"""Options that several commands share."""

import click

LOCAL = click.option("--local", is_flag=True, help="In this process, one worker, without Ray.")
QUIET = click.option("--quiet", "-q", is_flag=True, help="Say nothing unless something fails.")
JSON = click.option("--json", "as_json", is_flag=True, help="For programs: the same as JSON.")
ADDRESS = click.option(
    "--address",
    metavar="URL",
    help="A cluster's job API, http://HEAD:8265 ($RAY_API_SERVER_ADDRESS); 'local': this machine.",
)
