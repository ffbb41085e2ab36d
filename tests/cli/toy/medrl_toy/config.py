"""Settings of the toy method."""

from typing import Literal

from medrl.core.config import Block, MethodConfig, ModelConfig


class PolicyConfig(Block):
    """How the toy decides."""

    mode: Literal["fair", "greedy"] = "fair"
    """What it prefers."""
    clip: float = 0.2
    """Limit of the ratio."""


class ToyConfig(MethodConfig):
    """Settings of the toy method."""

    method: Literal["toy"] = "toy"
    """Method name."""
    model: ModelConfig = ModelConfig(name="toy.line")
    """The network."""
    policy: PolicyConfig = PolicyConfig()
    """The policy."""
