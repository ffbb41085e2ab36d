"""``medrl completion SHELL``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from medrl.core.errors import ConfigError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets a shell complete commands, methods, options, runs and config keys.

    \b
    bash:  medrl completion bash >> ~/.bash_completion
    zsh:   medrl completion zsh > ~/.zfunc/_medrl   (a folder of $fpath)
    fish:  medrl completion fish > ~/.config/fish/completions/medrl.fish
    """  # noqa: D301 - \b is click's mark for a paragraph that is not re-wrapped
    found = get_completion_class(shell)
    if found is None:
        raise ConfigError(f"shell '{shell}'", why="this version of click cannot complete it")
    click.echo(found(ctx.find_root().command, {}, "medrl", "_MEDRL_COMPLETE").source())
