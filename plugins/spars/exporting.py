"""The networks of a checkpoint, for `medrl model export`: the classifier, and the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medrl.core.export import Network

from .agent import CompactAgent
from .mil.maps import CellNetwork
from .observer import GLIMPSE, STATE
from .restoring import restore
from .scoring import CompactScorer, FaithfulScorer, FractionScorer

if TYPE_CHECKING:
    from medrl.core.checkpoint import Checkpoint
    from medrl.core.manager import PluginManager


def networks(checkpoint: Checkpoint, manager: PluginManager) -> dict[str, Network]:
    """Rebuild what is there, the classifier first.

    Cluster maps are lookups of nearest centres and no network; of a fraction scorer its head is exported.
    """
    run = restore(checkpoint, manager, torch.device("cpu"))
    scorer, window = run.scorer, run.cfg.score.window
    channels = tuple(run.meta.get("channel_names") or ("image",))
    found: dict[str, Network] = {}
    if isinstance(scorer, FractionScorer):
        found["classifier"] = Network(
            module=_Fraction(scorer.head),
            weights=scorer.head,
            inputs={"features": (int(scorer.head.mean.numel()),)},
            outputs=("fraction",),
            activation="none",
            preparation="features of cells, in the order of medrl.plugins.spars.mil.features",
            axes="C",
            channel_names=channels,
        )
    elif isinstance(scorer, (CompactScorer, FaithfulScorer)):
        size = scorer.enlarge if isinstance(scorer, FaithfulScorer) else window
        found["classifier"] = Network(
            module=scorer.network,
            inputs={"window": (1, *size)},
            outputs=("logits",),
            activation="softmax",
            preparation="window in [0, 1], values scaled as in training",
            axes="XYZ",
            channel_names=channels,
        )
    if isinstance(run.agent, CompactAgent):
        found["policy"] = Network(
            module=_Policy(run.agent),
            weights=run.agent,
            inputs={"glimpse": (GLIMPSE,), "state": (STATE,)},
            outputs=("logits", "value"),
            activation="none",
            preparation="what medrl.plugins.spars.observer sees of a window",
            axes="C",
        )
    return found


class _Fraction(nn.Module):
    def __init__(self, head: CellNetwork) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return torch.sigmoid(self.head.logits(features))


class _Policy(nn.Module):
    def __init__(self, agent: CompactAgent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, glimpse: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.agent.logits_and_values({"glimpse": glimpse, "state": state})
