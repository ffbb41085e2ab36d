"""One small file with the networks that are wanted, in place of a training checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.core.errors import CheckpointError, ConfigError, did_you_mean
from medrl.core.predicting.record import versions
from medrl.core.volume.write import write_bytes

from .naming import arguments_of
from .reading import FORMAT, WEIGHT_PARTS, Weights, read_weights


def convert(
    source: Path,
    target: Path,
    *,
    parts: Sequence[str] = ("actor", "rewards"),
    trust: bool = False,
    overwrite: bool = False,
) -> Weights:
    """Write some networks of a checkpoint as safetensors, with their architecture and origin as JSON.

    The JSON is the entry ``medrl`` of the file's metadata. Heads of deep supervision are left out, because
    prediction never uses them.

    Args:
        source: A checkpoint that `read_weights` reads.
        target: Ends in ``.safetensors``.
        parts: Of ``actor``, ``reference``, ``critic``, ``rewards``.
        trust: As in `read_weights`.
        overwrite: Replace an existing file.

    Returns:
        What was read.

    Raises:
        ConfigError: An unknown part, or another suffix, or the file exists.
        CheckpointError: A part is not in the file.
    """
    unknown = [part for part in parts if part not in WEIGHT_PARTS]
    if unknown or not parts:
        name = unknown[0] if unknown else ""
        raise ConfigError(f"--parts {name}", why=did_you_mean(name, WEIGHT_PARTS), do="--parts actor,rewards")
    if target.suffix != ".safetensors":
        raise ConfigError(str(target), why="weights are written as .safetensors", do="change the file name")
    if target.exists() and not overwrite:
        raise ConfigError(str(target), why="it exists", do="add --overwrite, or name another file")
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ConfigError(
            "convert", why="writing needs safetensors", do="pip install 'medrl[export]'"
        ) from error
    read = read_weights(source, trust=trust)
    chosen = {
        part: network
        for part, network in read.networks.items()
        if (part if not part.startswith("reward_") else "rewards") in parts
    }
    have = {part if not part.startswith("reward_") else "rewards" for part in chosen}
    missing = [part for part in parts if part not in have and not (part == "rewards" and "actor" in have)]
    if missing:
        raise CheckpointError(
            f"{source} has no {missing[0]}", why=f"it holds {', '.join(read.networks)}", do="choose --parts"
        )
    tensors = {
        f"{part}.{name}": weight.contiguous()
        for part, network in chosen.items()
        for name, weight in network.state_dict().items()
        if not name.startswith("deep_supervision_heads.")
    }
    meta: dict[str, Any] = {
        "format": FORMAT,
        "method": "rl4seg3d",
        "networks": {part: arguments_of(network) for part, network in chosen.items()},
        "temperatures": {part: value for part, value in read.temperatures.items() if part in chosen},
        "source": {"file": source.name, "sha256": read.digest, "kind": read.kind},
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_bytes(target, save(tensors, metadata={"medrl": json.dumps(meta)}), suffix=".safetensors")
    return read
