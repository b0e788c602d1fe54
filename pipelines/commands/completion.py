"""``moeify completion``: what a shell completes commands, options, runs and recipes with."""

import click

_RUN_BY = "_MOEIFY_COMPLETE"
"""The variable by which a shell asks the program for what fits; click derives it from the program's name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete moeify's commands and runs.

    \b
    Examples:
      bash   eval "$(moeify completion bash)"            in ~/.bashrc
      zsh    eval "$(moeify completion zsh)"             in ~/.zshrc
      fish   moeify completion fish | source             in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "moeify", _RUN_BY).source())
