"""Reading weight files of other programs: what kind of file it is, and the networks in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from medrl.core.checkpoint import load_foreign
from medrl.core.errors import CheckpointError
from medrl.core.predicting.record import file_digest

from ..models import UNet3d
from . import naming

_log = logging.getLogger("medrl.rl4seg3d")

LFS_MARK = b"version https://git-lfs"
FORMAT = 1
"""Version of the JSON that `convert` writes into a safetensors file."""
WEIGHT_PARTS = ("actor", "reference", "critic", "rewards")
_CONTAINERS = ("state_dict", "model_state_dict", "model", "weights")


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """The networks of one file.

    Attributes:
        path: The file.
        digest: Its SHA-256.
        kind: ``safetensors``, ``lightning`` or ``bare``.
        networks: By part: ``actor``, ``reference``, ``critic``, ``reward_<name>``.
        temperatures: Temperature of reward nets, where the file has one.
        others: Number of entries that belong to no network, such as the state of an optimiser.
    """

    path: Path
    digest: str
    kind: str
    networks: Mapping[str, UNet3d]
    temperatures: Mapping[str, float] = field(default_factory=dict)
    others: int = 0

    @property
    def rewards(self) -> dict[str, UNet3d]:
        """The reward nets by their name."""
        return {
            part.removeprefix("reward_"): network
            for part, network in self.networks.items()
            if part.startswith("reward_")
        }

    def counts(self) -> dict[str, int]:
        """Return the number of parameters of each part."""
        return {
            part: sum(weight.numel() for weight in network.parameters())
            for part, network in self.networks.items()
        }


def read_weights(path: Path, *, trust: bool = False, reward: str = "") -> Weights:
    """Read the networks of a checkpoint of Lightning, a bare state dict, or a file that `convert` wrote.

    Nothing of the file is executed. The networks are built after the shapes of their weights.

    Args:
        path: The file.
        trust: Accept pickled Python objects, of which nothing but tensors and plain values is kept.
        reward: Name of a reward net in a file that holds nothing else and does not name it.

    Raises:
        CheckpointError: A Git-LFS pointer, damaged, of a kind that is not read here, or without a network.
    """
    refuse_pointer(path)
    kind, state, temperatures = _state(path, trust)
    found, others = naming.networks_of(path, state)
    networks: dict[str, UNet3d] = {}
    for part, weights in found.items():
        network = naming.build(path, part, weights)
        name = naming.part_of_network(network) if part == "network" else part
        if part == "network" and name.startswith("reward_") and reward:
            name = f"reward_{reward}"
        if name in networks:
            raise CheckpointError(f"{path} holds two networks for the part {name}")
        networks[name] = network
    for name in state:
        if name.split(".")[-1] == "temperature" and isinstance(state[name], Tensor):
            prefix = [word for word in name.split(".")[:-1] if word != "module"]
            part = naming.part_of(prefix) if prefix else ""
            rewards = [part] if part in networks else [key for key in networks if key.startswith("reward_")]
            if rewards:
                temperatures.setdefault(rewards[0], float(state[name].reshape(-1)[0]))
    weights_read = Weights(
        path=path,
        digest=file_digest(path),
        kind=kind,
        networks=networks,
        temperatures=temperatures,
        others=len(others),
    )
    told = ", ".join(f"{part} ({count:,} parameters)" for part, count in weights_read.counts().items())
    _log.info("%s: %s; %d other entries are not used", path.name, told, len(others))
    return weights_read


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is missing, and one that only points at weights.

    Raises:
        CheckpointError: It is one of these.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_MARK))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read", why=error.strerror or str(error)
        ) from error
    if start == LFS_MARK:
        raise CheckpointError(
            f"{path} is a Git-LFS pointer, not the weights",
            why="the repository was cloned without its large files",
            do="run 'git lfs install' and 'git lfs pull' in that repository",
        )


def _state(path: Path, trust: bool) -> tuple[str, dict[str, Any], dict[str, float]]:
    """Return the kind of file, its state dict and the temperatures that it tells."""
    if path.suffix == ".safetensors":
        state, meta = _safetensors(path)
        given = meta.get("temperatures", {}) if isinstance(meta, Mapping) else {}
        return "safetensors", state, {str(part): float(value) for part, value in given.items()}
    content = load_foreign(path, trust=trust)
    for name in _CONTAINERS:
        inner = content.get(name)
        if isinstance(inner, Mapping) and inner:
            return "lightning" if "pytorch-lightning_version" in content else "bare", dict(inner), {}
    return "bare", content, {}


def _safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(
            str(path), why="reading it needs safetensors", do="pip install 'medrl[export]'"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            text = (file.metadata() or {}).get("medrl", "{}")
        meta = json.loads(text)
    except Exception as error:  # safetensors raises errors of its own kind
        raise CheckpointError(
            f"{path} cannot be loaded as safetensors",
            why=f"{type(error).__name__}: {error}",
            do="copy it again",
        ) from error
    if isinstance(meta, Mapping) and meta.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path} has format {meta['format']}", why=f"this medrl reads {FORMAT}", do="convert it again"
        )
    return state, dict(meta) if isinstance(meta, Mapping) else {}
