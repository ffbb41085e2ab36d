"""Which network a weight belongs to, and the network that fits its shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from medrl.core.checkpoint import load_into
from medrl.core.errors import CheckpointError

from ..models import Triple, UNet3d

REWARD_NAMES = ("anatomical", "landmark")
"""Names of the original's reward nets, in its order."""

_INNER = re.compile(
    r"(?P<prefix>.*?)(?P<inner>(?:input_block|downsamples\.\d+|bottleneck|upsamples\.\d+|output_block"
    r"|deep_supervision_heads\.\d+)\.(?:conv|transp_conv).*)"
)
_WRAPPERS = ("module", "_orig_mod")
_HEADS = "deep_supervision_heads."
_ONLY = "network"


def networks_of(path: Path, state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Take a state dict apart.

    Args:
        path: For messages.
        state: Names to tensors, as Lightning, plain PyTorch, DistributedDataParallel or `convert` write them.

    Returns:
        The weights of each network by part (``actor``, ``reference``, ``critic``, ``reward_anatomical``,
        ``reward_landmark``, ``reward_2``, … or ``network`` where no name says which it is), and the names
        that belong to none of them.

    Raises:
        CheckpointError: The network depends on the view, or nothing of it is known.
    """
    if any("view_embed" in name or ".film." in name.lower() for name in state):
        raise CheckpointError(
            f"{path} holds a network that depends on the view (FiLM)",
            why="weights named view_embed belong to later versions, whose layers are not published as such",
            do="use its TorchScript package with --view a4c, or weights without view embedding",
        )
    found: dict[str, dict[str, Tensor]] = {}
    others: list[str] = []
    for name, value in state.items():
        match = _INNER.fullmatch(name)
        if match is None or not isinstance(value, Tensor):
            others.append(name)
            continue
        words = [word for word in match["prefix"].split(".") if word and word not in _WRAPPERS]
        found.setdefault(part_of(words), {})[match["inner"]] = value
    found = {part: weights for part, weights in found.items() if part}
    if not found:
        some = ", ".join(list(state)[:3])
        raise CheckpointError(
            f"{path} holds no network of rl4seg3d",
            why=f"{len(state)} entries, such as {some}" if state else "it is empty",
            do="name an actor.ckpt, a Lightning checkpoint, a .safetensors of convert, or a TorchScript .pt",
        )
    return found, others


def part_of_network(network: UNet3d) -> str:
    """Return which part a network without a name is, by its channels.

    Two channels in are an image and an action, so a reward; one out is a critic, more an actor.
    """
    if network.in_channels == 2:
        return f"reward_{REWARD_NAMES[0]}"
    return "critic" if network.out_channels == 1 else "actor"


def build(path: Path, part: str, weights: Mapping[str, Tensor]) -> UNet3d:
    """Build the network that a state dict fits, and fill it.

    Only the heads of deep supervision may be missing; prediction never uses them.

    Raises:
        CheckpointError: Weights are missing, unknown or of shapes that make no network.
    """
    what = f"{path}, part {part}"
    try:
        arguments = architecture(weights)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{what} is no network of rl4seg3d", why=f"its shapes make none ({type(error).__name__}: {error})"
        ) from error
    network = UNet3d(**arguments)
    own = {name: value.float() for name, value in weights.items()}
    missing = [name for name in network.state_dict() if name not in own]
    own |= {name: network.state_dict()[name] for name in missing if name.startswith(_HEADS)}
    try:
        load_into(network, own)
    except CheckpointError as error:
        raise CheckpointError(f"{what} is no network of rl4seg3d", why=error.why) from error
    return network


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `UNet3d` that give the shapes of a state dict.

    Channels and kernels are those of the convolutions; the strides of the decoder are the shapes of its
    transposed convolutions, and the encoder has the same.

    Raises:
        KeyError: A layer is missing.
        ValueError: Layers contradict each other.
    """
    downs = _count(weights, "downsamples")
    ups = _count(weights, "upsamples")
    if ups != downs + 1:
        raise ValueError(f"{downs} levels down and {ups} up")
    blocks = ["input_block", *(f"downsamples.{k}" for k in range(downs)), "bottleneck"]
    first = [weights[f"{block}.conv1.conv.weight"] for block in blocks]
    steps: list[Triple] = [(1, 1, 1)]
    for k in reversed(range(ups)):
        steps.append(_triple(weights[f"upsamples.{k}.transp_conv.weight"].shape[2:]))
    return {
        "in_channels": int(first[0].shape[1]),
        "out_channels": int(weights["output_block.conv.weight"].shape[0]),
        "filters": [int(weight.shape[0]) for weight in first],
        "kernels": [_triple(weight.shape[2:]) for weight in first],
        "strides": steps,
    }


def arguments_of(network: nn.Module) -> dict[str, Any]:
    """Return what builds a `UNet3d` again, as plain values."""
    if not isinstance(network, UNet3d):
        raise CheckpointError("these weights", why=f"{type(network).__name__} is no U-Net of rl4seg3d")
    return {
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "filters": list(network.filters),
        "kernels": [list(kernel) for kernel in network.kernels],
        "strides": [list(stride) for stride in network.strides],
    }


def reward_name(number: int) -> str:
    """Return the part of the original's reward net of that number."""
    return f"reward_{REWARD_NAMES[number] if number < len(REWARD_NAMES) else number}"


def part_of(words: Sequence[str]) -> str:
    """Return the part of a prefix; an empty string for networks that are of no use here."""
    last = words[-1] if words else ""
    owner = words[-2] if len(words) > 1 else ""
    if "correctorAE" in words:
        return ""
    if last == "old_net" or last == "reference":
        return "reference"
    for word in (last, owner):
        numbered = re.fullmatch(r"rewardnet(?:_(\d+))?", word)
        if numbered:
            return reward_name(int(numbered[1] or 0))
        if word.startswith("reward_"):
            return word
        if word in ("critic", "actor"):
            return word
    return _ONLY if last in ("", "net") else ""


def _count(weights: Mapping[str, Tensor], name: str) -> int:
    numbers = {int(key.split(".")[1]) for key in weights if key.startswith(f"{name}.")}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"{name} are numbered {sorted(numbers)}")
    return len(numbers)


def _triple(values: Sequence[int]) -> Triple:
    x, y, t = (int(value) for value in values)
    return x, y, t
