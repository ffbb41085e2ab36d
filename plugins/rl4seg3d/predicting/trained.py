"""Models that `medrl train rl4seg3d` made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core.checkpoint import Checkpoint, load_into
from medrl.core.errors import CheckpointError
from medrl.core.learned_reward import RewardNet

from .. import parts
from ..config import Net, Rl4seg3dConfig
from ..data.plan import SequencePlan
from .model import Model, RewardModel

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

NETS: tuple[Net, ...] = ("anatomical", "landmark")


class LearnedReward:
    """A reward net trained here; its fitted temperature belongs to it."""

    def __init__(self, net: RewardNet) -> None:
        self.net = net.eval().requires_grad_(requires_grad=False)

    def raw(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the calibrated reward of windows."""
        return self.net.reward(labels, images)

    def finish(self, raw: Tensor, *, calibrated: bool) -> Tensor:
        """Return it as it is."""
        del calibrated
        return raw.clamp(0.0, 1.0)

    def to(self, device: torch.device) -> LearnedReward:
        """Move the net."""
        self.net.to(device)
        return self


def load_trained(checkpoint: Checkpoint, manager: PluginManager) -> Model:
    """Rebuild actor and reward nets of a run, or of one of its stages that trains an actor.

    Raises:
        CheckpointError: It holds no actor, or its weights do not fit.
    """
    try:
        cfg = Rl4seg3dConfig.model_validate(checkpoint.meta["config"])
        plan = SequencePlan.from_meta(checkpoint.meta["plan"])
        weights = checkpoint.states["actor"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why=f"it holds no actor of rl4seg3d ({type(error).__name__}: {error})",
            do="use a run of `medrl train rl4seg3d`, or of its stages source, style and ppo",
        ) from error
    if checkpoint.meta.get("stages_done") == 0:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why="no stage of this run is finished yet, so that its actor has learned nothing",
            do="wait for the first stage, or medrl resume RUN",
        )
    sizes: dict[str, Any] = {"channels": len(plan.channel_names), "classes": len(plan.label_names)}
    network = parts.actor_network(cfg, manager, **sizes)
    load_into(network, weights)
    rewards: dict[str, RewardModel] = {}
    for name in NETS:
        state = checkpoint.states.get(f"reward_{name}")
        if state is not None and name in checkpoint.meta.get("rewards_ready", ()):
            net = parts.reward_net(cfg, manager, name, **sizes)
            load_into(net, state)
            rewards[name] = LearnedReward(net)
    return Model(
        path=checkpoint.path,
        digest=checkpoint.digest,
        network=network,
        rewards=rewards,
        plan=plan.frames,
        label_names=plan.label_names,
        facts={
            "kind": "medrl",
            "step": checkpoint.meta.get("step"),
            "rules": cfg.rules,
            "temporal_rules": cfg.temporal_rules,
            "pixel_mm": checkpoint.meta.get("spacing"),
        },
    )
