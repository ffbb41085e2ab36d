"""``medrl env list|check|play``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from medrl.cli.console import console, counted, number, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.options import NATURAL, POSITIVE, json_option
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_OK, EXIT_PLUGIN, ConfigError, MedrlError

POLICIES = ("random", "greedy")


@click.group("env", cls=FriendlyGroup, short_help="List, check and play environments.")
def env() -> None:
    """List, check and play the environments that plugins register."""


def _keys(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    try:
        found = manager_of(ctx).registry("environments").entries()
    except MedrlError:
        return []
    return [CompletionItem(e.key, help=e.summary) for e in found if e.key.startswith(incomplete)]


def _set_option() -> Callable[[Any], Any]:
    return click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="A parameter of the environment; medrl env list NAME shows them. Repeatable.",
    )


@env.command("list", short_help="List the environments, or show the parameters of one.")
@click.argument("name", required=False, shell_complete=_keys)
@json_option()
@click.pass_context
def list_environments(ctx: click.Context, name: str | None, as_json: bool) -> None:
    """List the environments, or show the parameters of one with their defaults."""
    registry = manager_of(ctx).registry("environments")
    if name is not None:
        console().loading()
        rows = parameters(registry.get(name))
        if as_json:
            write_json(rows)
        else:
            console().table(["parameter", "default"], [[row["name"], _shown(row)] for row in rows])
        return
    entries = registry.entries()
    if as_json:
        write_json([{"name": e.key, "plugin": e.plugin, "summary": e.summary} for e in entries])
        return
    console().table(["environment", "summary"], [[e.key, e.summary] for e in entries])
    console().say("medrl env list NAME shows its parameters; medrl env play NAME plays it")


@env.command(short_help="Check that an environment keeps the rules.")
@click.argument("name", required=False, shell_complete=_keys)
@_set_option()
@click.option("--seed", type=NATURAL, default=0, show_default=True, metavar="N", help="Seed of the check.")
@json_option()
@click.pass_context
def check(
    ctx: click.Context, name: str | None, assignments: tuple[str, ...], seed: int, as_json: bool
) -> int:
    """Check that an environment keeps the rules of batched environments, and those of gymnasium.

    Without NAME, all environments are checked. The exit code is 5 if one breaks a rule.
    """
    registry = manager_of(ctx).registry("environments")
    if name is None and assignments:
        raise ConfigError("--set", why="parameters are those of one environment", do="name it")
    names = [name] if name is not None else registry.keys()
    console().loading()
    from medrl.core.rl.playing import problems_of

    results = {}
    for key in names:
        registry.get(key)
        results[key] = problems_of(_builder(registry, key, values_of(assignments)), seed=seed)
    if as_json:
        write_json([{"name": key, "ok": not found, "problems": found} for key, found in results.items()])
    else:
        screen = console()
        for key, found in results.items():
            if not found:
                screen.say(f"{screen.style('ok     ', fg='green')} {key}")
            for problem in found:
                screen.line(f"{screen.style('problem', fg='red')} {key}: {problem}")
    return EXIT_PLUGIN if any(results.values()) else EXIT_OK


@env.command("play", short_help="Play episodes of an environment.")
@click.argument("name", shell_complete=_keys)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="random",
    show_default=True,
    help="greedy tries each action on a copy and takes the one whose next reward is largest.",
)
@click.option("--episodes", type=POSITIVE, default=5, show_default=True, metavar="N", help="How many.")
@click.option("--seed", type=NATURAL, default=0, show_default=True, metavar="N", help="Seed of everything.")
@click.option("--steps", is_flag=True, help="Show every step.")
@_set_option()
@json_option()
@click.pass_context
def play_environment(
    ctx: click.Context,
    name: str,
    policy: str,
    episodes: int,
    seed: int,
    steps: bool,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Play episodes of an environment by a policy that has learned nothing.

    The greedy policy looks at rewards that a learned one must predict: between both lies what there is to
    learn in one step.
    """
    registry = manager_of(ctx).registry("environments")
    values = values_of(assignments)
    console().loading()
    from medrl.core.rl.playing import play

    made = _builder(registry, name, values)(1)
    found = list(play(made, policy, episodes=episodes, seed=seed))  # type: ignore[arg-type]  # a click choice
    if as_json:
        write_json(
            {
                "name": name,
                "policy": policy,
                "seed": seed,
                "episodes": [
                    {"return": e.total, "ended": e.ended, "actions": e.actions, "rewards": e.rewards}
                    for e in found
                ],
            }
        )
        return
    screen = console()
    if steps:
        rows = [
            [str(k + 1), str(t + 1), str(action), number(reward)]
            for k, e in enumerate(found)
            for t, (action, reward) in enumerate(zip(e.actions, e.rewards, strict=True))
        ]
        screen.table(["episode", "step", "action", "reward"], rows, right=(0, 1, 2, 3))
        screen.say()
    screen.table(
        ["episode", "steps", "return", "ended"],
        [[str(k + 1), str(len(e.rewards)), number(e.total), e.ended] for k, e in enumerate(found)],
        right=(0, 1, 2),
    )
    mean = sum(e.total for e in found) / len(found)
    screen.say(f"{name}, {policy}: mean return {number(mean)} over {counted(len(found), 'episode')}")


def values_of(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Return the parameters of ``--set``.

    Raises:
        ConfigError: One is malformed, or sets the number of episodes.
    """
    from medrl.core.config import parse_set

    values = dict(parse_set(text) for text in assignments)
    if "num_envs" in values:
        raise ConfigError("--set num_envs", why="the command sets it", do="leave it out")
    return values


def parameters(target: Any) -> list[dict[str, Any]]:
    """Return name and default of each parameter of an environment."""
    import inspect

    return [
        {
            "name": item.name,
            "required": item.default is item.empty,
            "default": None if item.default is item.empty else item.default,
        }
        for item in inspect.signature(target).parameters.values()
        if item.name != "num_envs" and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
    ]


def _fitting(target: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters, each of the type of its default.

    Raises:
        ConfigError: One is of another type.
    """
    defaults = {row["name"]: row["default"] for row in parameters(target) if row["default"] is not None}
    found = dict(values)
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(default, float) and type(value) is int:
            found[name] = float(value)
        elif isinstance(default, (bool, int, float, str)) and type(value) is not type(default):
            raise ConfigError(f"--set {name}={value}", why=f"expected a value like {default!r}")
    return found


def _shown(row: dict[str, Any]) -> str:
    return "(required)" if row["required"] else repr(row["default"])


def _builder(registry: Any, key: str, values: dict[str, Any]) -> Callable[[int], Any]:
    """Return what makes the environment with a number of episodes.

    Raises:
        ConfigError: The parameters do not fit.
    """
    fitting = _fitting(registry.get(key), values)

    def build(count: int) -> Any:
        return registry.build(key, **fitting, num_envs=count)

    return build
