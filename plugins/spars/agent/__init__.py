"""Networks that move windows: on glimpses, on a low-resolution view, and that of the original."""

from medrl.plugins.spars.agent.compact import CompactAgent
from medrl.plugins.spars.agent.conv import ConvAgent
from medrl.plugins.spars.agent.faithful import FaithfulAgent
from medrl.plugins.spars.agent.policy import HuntAgent, Sighted, build_agent

__all__ = ["CompactAgent", "ConvAgent", "FaithfulAgent", "HuntAgent", "Sighted", "build_agent"]
