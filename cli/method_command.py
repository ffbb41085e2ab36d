"""A command that takes a METHOD and then understands the method's own options beside the shared ones."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from medrl.cli.completing import METHOD_KEY, complete_methods
from medrl.cli.groups import EVERYWHERE
from medrl.cli.session import manager_of
from medrl.core.errors import ConfigError, PluginError, did_you_mean

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager


@dataclass(frozen=True)
class Call:
    """One parsed call of a method command.

    Attributes:
        shared: Values of the shared options by parameter name.
        own: Values of the method's own options by parameter name, config options included.
        command: The method's click command.
    """

    method: str
    manager: PluginManager
    command: click.Command
    shared: dict[str, Any]
    own: dict[str, Any] = field(default_factory=dict)

    @property
    def extra(self) -> dict[str, Any]:
        """Values of the method's own options that are no config keys."""
        from medrl.core.jobs import ConfigOption

        config = {item.name for item in self.command.params if isinstance(item, ConfigOption)}
        return {name: value for name, value in self.own.items() if name not in config}

    def start(self, job: Any) -> Any:
        """Call the method's callback with the job and its own values."""
        if self.command.callback is None:
            raise PluginError(
                f"plugin '{self.method}', command {self.command.name}", why="it has no function"
            )
        return click.get_current_context().invoke(self.command.callback, job, **self.extra)


class MethodCommand(click.Command):
    """Base of ``train`` and ``predict``: METHOD first or left out, shared options, then the method's own.

    Args:
        kind: ``train`` or ``predict``.
    """

    def __init__(self, name: str, *, kind: str, params: Sequence[click.Parameter], **kwargs: Any) -> None:
        method = click.Argument(["method"], required=False, shell_complete=complete_methods(kind))
        super().__init__(name, params=[method, *params], **kwargs)
        self.kind = kind

    @abstractmethod
    def work(self, call: Call) -> object:
        """Do the work of the command; an integer is the exit code."""

    def find_method(self, ctx: click.Context, values: dict[str, Any]) -> str:
        """Return the method where none is named on the command line.

        Raises:
            ConfigError: It cannot be told.
        """
        raise ConfigError("METHOD is missing", why=self._known(ctx), do=f"{ctx.command_path} METHOD --help")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method first, because it decides which options there are."""
        wants_help = any(arg in ("-h", "--help") for arg in args)
        method, words = self._named(ctx, args)
        if method is None and not wants_help and not ctx.resilient_parsing:
            try:
                method = self.find_method(ctx, self._peek(ctx, args)[0])
            except ConfigError as error:
                raise self._unknown(ctx, words[0]) if words else error from error
            manager_of(ctx).load(method)
        if method is not None:
            self._bind(ctx, method)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # so that the message can name the help of this method
            raise

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the shared parameters and those of the method that was found."""
        shared = super().get_params(ctx)
        command = self.command_of(ctx)
        return [*shared, *command.params] if command is not None else shared

    def invoke(self, ctx: click.Context) -> Any:
        """Split the values into shared and own ones and do the work."""
        command = self.command_of(ctx)
        if command is None:
            raise ConfigError("METHOD is missing", why=self._known(ctx))
        own_names = {parameter.name for parameter in command.params}
        values = dict(ctx.params)
        word = values.pop("method", None)
        if word is not None and word != ctx.meta[METHOD_KEY][0]:
            raise self._unknown(ctx, str(word))
        call = Call(
            method=ctx.meta[METHOD_KEY][0],
            manager=manager_of(ctx),
            command=command,
            shared={name: value for name, value in values.items() if name not in own_names},
            own={name: value for name, value in values.items() if name in own_names},
        )
        return self.work(call)

    def command_of(self, ctx: click.Context) -> click.Command | None:
        """Return the click command of the method, once it is known."""
        found = ctx.meta.get(METHOD_KEY)
        return cast(click.Command, found[1]) if found else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the method's own options in a section of their own, before the shared ones."""
        command = self.command_of(ctx)
        if command is None:
            super().format_options(ctx, formatter)
            with formatter.section("Options of a method"):
                formatter.write_text(f"{ctx.command_path} METHOD --help shows them; {self._known(ctx)}")
            return
        own = [record for item in command.params if (record := item.get_help_record(ctx)) is not None]
        if own:
            with formatter.section(f"Options of {ctx.meta[METHOD_KEY][0]}"):
                formatter.write_dl(own)
        own_names = {item.name for item in command.params}
        shared = [item for item in self.get_params(ctx) if item.name not in {*own_names, "method"}]
        with formatter.section("Options of every method"):
            formatter.write_dl([r for item in shared if (r := item.get_help_record(ctx)) is not None])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show METHOD where none was named yet."""
        return ["[OPTIONS]"] if self.command_of(ctx) is not None else ["METHOD", "[OPTIONS]"]

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the command does, and what the method says about it."""
        super().format_help_text(ctx, formatter)
        command = self.command_of(ctx)
        if command is not None and command.help:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(f"{ctx.meta[METHOD_KEY][0]}: {inspect.cleandoc(command.help)}")

    def _known(self, ctx: click.Context) -> str:
        return "known methods: " + (", ".join(manager_of(ctx).names()) or "none")

    def _peek(self, ctx: click.Context, args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Read the shared options alone; whatever else there is comes back as the rest."""
        probe = click.Command(
            self.name, params=[item for item in self.params if isinstance(item, click.Option)]
        )
        with click.Context(
            probe,
            info_name=self.name,
            resilient_parsing=True,
            ignore_unknown_options=True,
            allow_extra_args=True,
        ) as inner:
            rest = probe.parse_args(inner, list(args))
        return dict(inner.params), rest

    def _named(self, ctx: click.Context, args: Sequence[str]) -> tuple[str | None, list[str]]:
        """Return the method named on the command line, loaded, and the words that may be a misspelt one."""
        try:
            rest = self._peek(ctx, args)[1]
        except click.UsageError:
            rest = [arg for arg in args if not arg.startswith("-")][:1]
        words = [arg for arg in rest if not arg.startswith("-")]
        manager = manager_of(ctx)
        known = [word for word in words if manager.knows(word)]
        if known:
            if not ctx.resilient_parsing:
                manager.load(known[0])
            return known[0], words
        if words and words[0] == args[0] and not ctx.resilient_parsing:
            raise self._unknown(ctx, words[0])
        return None, words

    def _unknown(self, ctx: click.Context, word: str) -> ConfigError:
        names = manager_of(ctx).names()
        return ConfigError(f"no method '{word}'", why=did_you_mean(word, names), do="medrl methods")

    def _bind(self, ctx: click.Context, method: str) -> None:
        """Take the method's command and make sure that its options do not hide shared ones."""
        try:
            command = cast("click.Command | None", getattr(manager_of(ctx).commands(method), self.kind))
        except PluginError:
            if ctx.resilient_parsing:
                return
            raise
        if command is None:
            if ctx.resilient_parsing:
                return
            raise ConfigError(
                f"method '{method}' has no {self.kind} command", do=f"medrl {method} lists what it has"
            )
        taken = {name for item in self.params for name in (*item.opts, *item.secondary_opts)}
        taken |= {*EVERYWHERE, "-h", "--help"}
        names = {item.name for item in self.params}
        for item in command.params:
            clash = sorted(taken.intersection([*item.opts, *item.secondary_opts]))
            if clash or item.name in names:
                raise PluginError(
                    f"plugin '{method}', command {self.kind}",
                    why=f"its option {clash[0] if clash else item.name} is one that every method has",
                    do=f"rename that option in the plugin '{method}'",
                )
        ctx.meta[METHOD_KEY] = (method, command)
        # A method may have other defaults for the options that all methods share.
        ctx.default_map = {**(ctx.default_map or {}), **command.context_settings.get("default_map", {})}
        ctx.info_name = f"{self.name} {method}"


def existing(path: Path | None, *, option: str) -> Path | None:
    """Refuse a path that does not exist, naming the option.

    Raises:
        ConfigError: There is nothing at the path.
    """
    if path is not None and not path.exists():
        raise ConfigError(f"{option} {path}", why="no such file or folder")
    return path
