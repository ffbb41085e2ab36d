"""``medrl resume RUN``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from medrl.cli.completing import complete_runs
from medrl.cli.console import console
from medrl.cli.launch import inside_launcher, launch
from medrl.cli.layers import resolve_all
from medrl.cli.many import Planned
from medrl.cli.method_command import Call
from medrl.cli.options import ANY_PATH, POSITIVE, DeviceType
from medrl.cli.runfiles import read_run, require_plugin, run_config
from medrl.cli.session import manager_of
from medrl.cli.train import say_result, train, train_one
from medrl.core.errors import EXIT_OK, CheckpointError, ConfigError, MedrlError


@click.command("resume", short_help="Continue a run from its last checkpoint.")
@click.argument("run", type=ANY_PATH, shell_complete=complete_runs)
@click.option("--extend-to", type=POSITIVE, metavar="N", help="Go on to this number of steps in all.")
@click.option("--devices", type=POSITIVE, metavar="N", help="Number of ranks.  [default: as before]")
@click.option("--device", type=DeviceType(), metavar="DEVICE", help="Compute somewhere else than before.")
@click.pass_context
def resume(
    ctx: click.Context, run: Path, extend_to: int | None, devices: int | None, device: str | None
) -> int:
    """Continue a run from its last checkpoint, with the config that it was started with.

    A run that has all its steps is left as it is, unless --extend-to asks for more.
    """
    facts = read_run(run)
    config = run_config(run)
    method = config.get("method")
    if not isinstance(method, str):
        raise ConfigError(f"{run / 'config.yaml'}", why="it has no key 'method'")
    if not any((run / "checkpoints").glob("*.pt")):
        raise CheckpointError(
            f"run {run}",
            why="it has no checkpoint yet",
            do=shlex.join(_started_by(run)) or f"medrl train {method}",
        )
    steps = config.get("train", {}).get("max_steps")
    if extend_to is not None and isinstance(steps, int) and extend_to < steps:
        raise ConfigError(f"--extend-to {extend_to}", why=f"the run is for {steps} steps already")
    if facts.status == "finished" and (extend_to is None or extend_to == steps):
        console().say(f"{run}: {facts.sentence()}; nothing is left to do")
        if steps != 0:  # 0: the stages of the method decide, and there is no number to raise
            more = 2 * steps if isinstance(steps, int) else "N"
            console().say(f"more steps: medrl resume {run} --extend-to {more}")
        return EXIT_OK
    ranks = devices or _ranks(facts.manifest)
    if ranks > 1 and not inside_launcher():
        return launch([*console().arguments, "--devices", str(ranks)], ranks, console())
    call = _call(ctx, method, run, extend_to, device)
    code = train_one(call, Planned(call.shared["resolved"], run))
    if code == EXIT_OK:
        say_result(call, Planned(call.shared["resolved"], run))
    return code


def _call(ctx: click.Context, method: str, run: Path, extend_to: int | None, device: str | None) -> Call:
    """Rebuild the call that started the run, from its config file and its command."""
    from medrl.core.config import Layer, nest

    manager = manager_of(ctx)
    require_plugin(manager, method, run)
    command = manager.commands(method).train
    if command is None:
        raise ConfigError(f"method '{method}' has no train command")
    layers = []
    if extend_to is not None:
        layers.append(Layer("--extend-to", nest({"train.max_steps": extend_to})))
    if device is not None:
        layers.append(Layer("--device", nest({"train.device": device})))
    resolved = resolve_all(manager, method, config_file=run / "config.yaml", layers=layers)
    shared: dict[str, Any] = {
        "resolved": resolved,
        "resume": "must",
        "init_from": None,
        "trust_checkpoint": False,
        "fast_dev_run": False,
        "devices": 1,
        "output": run,
    }
    words = _started_by(run)
    shared["command"] = tuple(words)
    call = Call(method=method, manager=manager, command=command, shared=shared)
    return replace(call, own=_own_values(ctx, call, run, words))


def _started_by(run: Path) -> list[str]:
    """Return the words of the command that started the run; none if they cannot be read."""
    try:
        return shlex.split((run / "command.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def _own_values(ctx: click.Context, call: Call, run: Path, words: list[str]) -> dict[str, Any]:
    """Read the values of the method's own options from the command line that started the run."""
    from medrl.core.jobs import ConfigOption

    own = [item for item in call.command.params if not isinstance(item, ConfigOption)]
    if not own:
        return {}
    try:
        arguments = words[words.index("train") + 1 :]
        with train.make_context("train", arguments, parent=ctx.find_root()) as old:
            return {item.name: old.params[item.name] for item in own if item.name is not None}
    except (ValueError, KeyError, click.UsageError, MedrlError) as error:
        with click.Context(call.command, info_name=call.command.name) as fresh:
            values = {item.name: item.get_default(fresh, call=True) for item in own if item.name is not None}
        console().line(
            f"warning: the options of {call.method} are taken as their defaults, because "
            f"{run / 'command.txt'} cannot be read as a train command ({error})"
        )
        return values


def _ranks(manifest: Any) -> int:
    value = manifest.get("world_size", 1)
    return value if isinstance(value, int) and value > 0 else 1
