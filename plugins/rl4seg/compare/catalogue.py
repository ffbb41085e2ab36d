"""Every method that `medrl rl4seg compare` knows: what it is, what it starts from, what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from medrl.core.errors import ConfigError, did_you_mean

Role = Literal["baseline", "method", "control", "bound"]
Start = Literal["source", "style", ""]
Kind = Literal[
    "start", "batch_norm", "entropy", "confident", "refined", "post_hoc", "tsit", "more", "loop", "supervised"
]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        key: Its name on the command line.
        title: Its name in tables.
        role: ``bound`` looks at target labels in training; everything else does not.
        start: The actor it starts from.
        kind: How it is made.
        way: For labels that are refined: ``corrector``, ``reward``, ``both`` or ``mixed``.
        values: For the loop: what differs from the config.
        may_fail: Whether it may find nothing to learn from, which is a result and ends no comparison.
    """

    key: str
    title: str
    role: Role
    start: Start
    kind: Kind
    way: str = ""
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)
    may_fail: bool = False

    @property
    def needs_reward(self) -> bool:
        """Whether it takes the class reward net that all methods share."""
        if self.kind == "loop":
            return not self.values
        return self.way in ("reward", "both", "mixed")

    @property
    def needs_corrector(self) -> bool:
        """Whether it takes the corrector."""
        return self.way in ("corrector", "both", "mixed") or (self.kind == "loop" and self.role != "bound")


_ORIGINAL = {
    "pairs": {"kind": "prediction", "keep": True},
    "reward": {"name": "rl4seg.reward_unet", "head": "binary", "init": "random"},
    "loop": {"iterations": 2},
}
"""The reward of the original: a binary head, from scratch, on pairs of predictions, renewed once."""
_TWICE = {"loop": {"iterations": 2}}
"""The reward net is trained anew for the adapted actor, and PPO goes on."""
_ORACLE = {"reward": {"name": "rl4seg.pixelwise_accuracy"}, "target": {"allow_labels": True}}
_RANDOM = {"reward": {"name": "rl4seg.random"}}


def _from(start: Start, prefix: str) -> list[Method]:
    """Rows that exist for both starts."""
    return [
        Method(
            f"{prefix}self-refined", "self-training, refined labels", "baseline", start, "refined", "mixed"
        ),
        Method(f"{prefix}posthoc-denoiser", "post-hoc corrector", "baseline", start, "post_hoc", "corrector"),
        Method(f"{prefix}posthoc-reward", "post-hoc reward net", "baseline", start, "post_hoc", "reward"),
        Method(
            f"{prefix}posthoc-both", "post-hoc reward net + corrector", "baseline", start, "post_hoc", "both"
        ),
        Method(f"{prefix}ppo", "rl4seg", "method", start, "loop"),
        Method(f"{prefix}ppo-twice", "rl4seg, two iterations", "method", start, "loop", values=_TWICE),
        Method(f"{prefix}ppo-random", "PPO, reward of noise", "control", start, "loop", values=_RANDOM),
        Method(f"{prefix}ppo-oracle", "PPO, oracle reward", "bound", start, "loop", values=_ORACLE),
    ]


METHODS: tuple[Method, ...] = (
    Method("source", "source-only", "baseline", "source", "start"),
    Method("bn", "batch-norm adaptation", "baseline", "source", "batch_norm"),
    Method("entropy", "entropy minimisation", "baseline", "source", "entropy"),
    Method("self-confident", "self-training, confidence > .9", "baseline", "source", "confident"),
    Method("self-denoiser", "self-training, corrected labels", "baseline", "source", "refined", "corrector"),
    Method("tsit", "TS-IT", "baseline", "", "tsit"),
    Method(
        "ppo-original",
        "rl4seg, reward of the original",
        "control",
        "source",
        "loop",
        values=_ORIGINAL,
        may_fail=True,
    ),
    *_from("source", ""),
    Method("style", "style tuning", "baseline", "style", "start"),
    Method("style-steps", "style tuning, more steps", "baseline", "style", "more"),
    *_from("style", "style-"),
    Method("target", "target-supervised", "bound", "", "supervised"),
)
"""In the order of the tables."""

CORE = ("source", "style", "style-steps", "style-self-refined", "style-posthoc-both", "style-ppo")
"""The least that a claim about the method needs."""
RIVALS = ("source", "style-steps", "style-self-refined", "style-posthoc-both")
"""What the method is compared with: no adaptation, and the three that use the same knowledge without RL."""
OUTER = ("source", "style-steps", "style-self-refined", "style-posthoc-both", "ppo", "style", "style-ppo")
BY_KEY = {method.key: method for method in METHODS}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "all": tuple(BY_KEY),
    "core": CORE,
    "unlabelled": tuple(method.key for method in METHODS if method.role != "bound"),
}


def chosen(words: Sequence[str]) -> list[Method]:
    """Return the methods of names and groups, in the order of the tables.

    Raises:
        ConfigError: A name is unknown, or none is given.
    """
    keys = {key for word in words for key in GROUPS.get(word, (word,))}
    unknown = sorted(keys - set(BY_KEY))
    if unknown or not keys:
        why = f"'{unknown[0]}' is unknown: {did_you_mean(unknown[0], [*BY_KEY, *GROUPS])}" if unknown else ""
        raise ConfigError("methods", why=why or "none is named", do=f"choose from {', '.join(BY_KEY)}")
    return [method for method in METHODS if method.key in keys]
