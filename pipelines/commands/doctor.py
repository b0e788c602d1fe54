"""``moeify doctor``: whether this machine is fit for a run."""

import click

from pipelines.commands.arguments import examples
from pipelines.commands.options import JSON


@click.command(
    "doctor",
    epilog=examples(
        "moeify doctor",
        "moeify doctor --json",
    ),
)
@JSON
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check what a run needs, and say what to do.

    Tries it rather than asks: imports, writes, connects. Exits with 1 where there is a problem.
    """
    from pipelines.doctor import examine

    checks = []
    for check in examine():
        checks.append(check)
        if not as_json:
            color = {"ok": "green", "warning": "yellow", "problem": "red"}[check.state]
            click.echo(f"{click.style(f'{check.state:8}', fg=color)} {check.name:9} {check.line}")
    problems = sum(check.state == "problem" for check in checks)
    if as_json:
        from dataclasses import asdict

        from pipelines.show import to_json

        click.echo(to_json({"problems": problems, "checks": [asdict(check) for check in checks]}))
    if problems:
        ctx.exit(1)
