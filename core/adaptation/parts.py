"""Networks by registry key, parts of the checkpoints of other stages, anatomical rules of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core import rng
from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_into
from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.learned_reward import RewardNet, widen_input
from medrl.core.validity import Rules, load_rules

from .actors import logits_of

if TYPE_CHECKING:
    from medrl.core.config import ModelConfig
    from medrl.core.manager import PluginManager


def build_network(
    model: ModelConfig,
    manager: PluginManager,
    what: str,
    *,
    in_channels: int,
    out_channels: int,
    seed: int,
    trial: Sequence[int],
    advice: str,
) -> nn.Module:
    """Build a network by its registry key, and try it on an empty image.

    Args:
        model: Key and parameters.
        manager: Source of networks of every plugin.
        what: The block of the config that names it; a ``critic`` may also give one number of an image.
        in_channels: Channels of its input; the data decide.
        out_channels: Channels of its output.
        seed: Of its weights.
        trial: Spatial size of that image; its dimensions are those of the method.
        advice: What to do about a network that does not fit.

    Raises:
        ConfigError: Unknown key or parameters, or a network that does not map such images to logits.
    """
    params = model.params
    for name in ("in_channels", "out_channels"):
        if name in params:
            raise ConfigError(f"{what}.{name}", why="the data decide it", do=f"leave out {what}.{name}")
    with rng.isolated(seed):
        network: nn.Module = manager.registry("models").build(
            model.name, in_channels=in_channels, out_channels=out_channels, **params
        )
    wrong = _mismatch(network, (1, in_channels, *trial), out_channels, what)
    if wrong:
        raise ConfigError(f"{what}.name {model.name}", why=wrong, do=advice)
    if all(parameter.ndim < 5 for parameter in network.parameters()):
        # A fifth faster in bf16 on CPUs, and faster on GPUs with matrix units.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def given_checkpoint(path: Path, what: str) -> Path:
    """Return the checkpoint file of a run folder or file that a setting names.

    Raises:
        ConfigError: It does not exist.
        CheckpointError: The folder has no checkpoint.
    """
    if not path.exists():
        raise ConfigError(what, why=f"{path} does not exist", do="name a run folder or a checkpoint")
    return find_checkpoint(path, "last")


def open_part(path: Path | None, name: str, what: str, *, method: str) -> Checkpoint:
    """Open a checkpoint of a method that holds a part; arguments as in `load_part`."""
    if path is None:
        raise ConfigError(what, why="it is not named", do=f"--set {what}=RUN")
    found = load_checkpoint(given_checkpoint(path, what), method=method)
    if name not in found.states:
        raise CheckpointError(
            f"checkpoint {found.path}",
            why=f"it holds no {name}, only {', '.join(sorted(found.states))}",
            do=f"name another run with --set {what}=RUN",
        )
    return found


def load_part(path: Path | None, name: str, module: nn.Module, what: str, *, method: str) -> Checkpoint:
    """Fill a module from a checkpoint of a method.

    Args:
        path: Run folder or checkpoint file.
        name: Name of the part in the checkpoint: ``actor``, ``critic``, ``corrector``, ``reward``.
        module: What is filled.
        what: The setting that names the path.
        method: Name of the method.

    Raises:
        ConfigError: No path is given.
        CheckpointError: There is no such part, or it does not fit.
    """
    found = open_part(path, name, what, method=method)
    load_into(module, found.states[name])
    return found


def start_reward(net: RewardNet, weights: Mapping[str, Tensor], init: str) -> None:
    """Start every network of a reward net from an actor's weights, with a wider first layer.

    Args:
        net: The reward net.
        weights: Of the actor.
        init: The setting that names the actor, for the message.

    Raises:
        ConfigError: Actor and reward net are not of one kind.
    """
    try:
        for network in net.networks:
            network.load_state_dict(widen_input(dict(weights), network.state_dict()))
    except ConfigError as error:
        raise ConfigError(
            f"reward.init {init}",
            why="the actor's weights do not fit the reward net",
            do="give model and reward_model the same settings and reward.head class, or --set "
            "reward.init=random",
            problems=error.problems,
        ) from error


def rules_of(name: str, label_names: Mapping[str, int]) -> Rules:
    """Load anatomical rules by name or file, with the label values of the data where names agree."""
    found = load_rules(name)
    known = {label.lower(): label for label in found.labels}
    values = {known[label.lower()]: value for label, value in label_names.items() if label.lower() in known}
    return load_rules(name, labels=values) if values else found


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return tensors and numbers as plain numbers, for a log."""
    return {
        name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in values.items()
    }


def _mismatch(network: nn.Module, shape: tuple[int, ...], out_channels: int, what: str) -> str:
    """Why a network does not map images ``shape`` to logits; empty if it does."""
    training = network.training
    network.eval()
    wrong = ""
    try:
        with torch.no_grad():
            found = tuple(logits_of(network(torch.zeros(shape))).shape)
        whole = (1, out_channels, *shape[2:])
        if found != whole and not (what == "critic" and found == (1, out_channels)):
            wrong = f"it maps an image {shape} to {found}, not to {whole}"
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        kind = {4: "2D image", 5: "volume or sequence"}.get(len(shape), "image")
        wrong = f"it does not take a {kind}: {str(error).strip().splitlines()[0]}"
    network.train(training)
    return wrong
