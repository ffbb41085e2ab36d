"""How much each teacher counts at every step, and what is learned about that on the way."""

from __future__ import annotations

from torch import nn

from medrl.plugins.graft.agent import FreePolicy, TeacherPolicy, state_channels, state_scalars
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.data import GraftData, agent_acts
from medrl.plugins.graft.features import LOGITS

from .aligned import AlignedSteering
from .learner import Learner
from .meta import MetaSteering
from .published import PublishedSteering
from .scene import Scene, Steering, by_teacher, described, in_force

__all__ = [
    "AlignedSteering",
    "Learner",
    "MetaSteering",
    "PublishedSteering",
    "Scene",
    "Steering",
    "build_policy",
    "by_teacher",
    "described",
    "in_force",
    "steer",
    "weighed_kinds",
]


def steer(scene: Scene, policy: nn.Module | None) -> Steering:
    """The weighting of a run. Without teachers, or with the agent switched off, nothing is decided."""
    mode = scene.cfg.weighting.mode
    if not scene.priors.kinds:
        return Steering(scene)
    if mode == "meta":
        return MetaSteering(scene)
    if mode == "align" and agent_acts(scene.cfg):
        return AlignedSteering(scene)
    if policy is None:
        return Steering(scene)
    return PublishedSteering(scene, policy) if mode == "legacy" else Learner(scene, policy)


def build_policy(cfg: GraftConfig, data: GraftData, kinds: tuple[str, ...]) -> nn.Module | None:
    """The agent's network, or None where nothing is left to decide."""
    mode = cfg.weighting.mode
    if not kinds or mode not in ("legacy", "reinforce") or not agent_acts(cfg):
        return None
    if mode == "reinforce" and cfg.agent.policy == "free":
        return FreePolicy(len(data.teachers), heads=kinds)
    return TeacherPolicy(
        [state_channels(teacher.channels, data.taps) for teacher in data.teachers],
        state_scalars(data.taps, disagreement=cfg.agent.disagreement, in_sample=cfg.teachers.oof == "flag"),
        heads=kinds,
        residual=mode == "reinforce",
        factors=mode == "legacy" and cfg.agent.dynamic,
    )


def weighed_kinds(cfg: GraftConfig, data: GraftData) -> tuple[str, ...]:
    """What teachers are weighed for: each tap, and the logits."""
    if not data.teachers:
        return ()
    return (*data.taps, *((LOGITS,) if cfg.distill.logit_weight > 0 else ()))
