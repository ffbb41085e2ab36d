"""Agents that choose the next line of k-space.

An agent is a network on what has been made of an acquisition (an image, or features of every column); it
does not know where the data lie. `Sighted` joins it to an observer that turns an observation of the
environment (case, mask, counters) into that, and is what PPO updates.
"""

from medrl.plugins.kspace.agent.columns import ColumnAgent, FeatureScale
from medrl.plugins.kspace.agent.faithful import FaithfulAgent, FFTConv
from medrl.plugins.kspace.agent.policy import LineAgent, Sighted

__all__ = ["ColumnAgent", "FFTConv", "FaithfulAgent", "FeatureScale", "LineAgent", "Sighted"]
