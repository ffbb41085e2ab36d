"""The actor of a checkpoint, for `medrl model export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from medrl.core.errors import CheckpointError
from medrl.core.export import Network

from .data import FRAMES
from .predicting.trained import load_trained

if TYPE_CHECKING:
    from medrl.core.checkpoint import Checkpoint
    from medrl.core.manager import PluginManager

_SIDE = 64
"""Pixels of a frame on which the network is tried."""
_EQUALISE = {"on": "; CLAHE of each frame", "auto": "; CLAHE of each frame, unless that was done"}


def networks(checkpoint: Checkpoint, manager: PluginManager) -> dict[str, Network]:
    """Rebuild the actor; it takes windows ``(N, 1, X, Y, 4)`` on the grid of the network.

    Raises:
        CheckpointError: It holds no actor.
    """
    model = load_trained(checkpoint, manager)
    network = model.network
    if not isinstance(network, nn.Module):
        raise CheckpointError(f"checkpoint {checkpoint.path}", why="it holds no actor")
    plan = model.plan
    grid = (
        "" if plan.spacing_mm is None else f"; pixels of {plan.spacing_mm[0]:g} × {plan.spacing_mm[1]:g} mm"
    )
    side = -(-_SIDE // plan.multiple) * plan.multiple
    return {
        "actor": Network(
            module=network,
            inputs={"image": (1, side, side, FRAMES)},
            preparation=f"axes X, Y (apex at small y), time; divided by the largest value{grid}"
            f"{_EQUALISE.get(plan.equalise, '')}; zeros up to multiples of {plan.multiple} pixels",
            axes="XYT",
            channel_names=("echo",),
            label_names=model.label_names,
            windows=True,
        )
    }
