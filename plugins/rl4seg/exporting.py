"""The actor of a checkpoint, for `medrl model export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from medrl.core.adaptation.actors import logits_of
from medrl.core.export import Network

from .parts import actor_kind
from .predict import restore

if TYPE_CHECKING:
    from medrl.core.checkpoint import Checkpoint
    from medrl.core.manager import PluginManager


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return logits_of(self.network(image))


def networks(checkpoint: Checkpoint, manager: PluginManager) -> dict[str, Network]:
    """Rebuild the actor; it takes whole images ``(N, C, H, W)`` on the grid of the network."""
    cfg, plan, actor = restore(checkpoint, manager)
    steps = [
        "intensities to [0, 1]" + (" by percentiles" if plan.intensity == "percentile" else ""),
        f"resized to {plan.size[0]} × {plan.size[1]}"
        + (", filled up with black" if plan.keep_aspect else ""),
        *([f"CLAHE with clip limit {plan.clahe:g}"] if plan.clahe > 0 else []),
    ]
    return {
        "actor": Network(
            module=_Logits(actor.network),
            weights=actor.network,
            inputs={"image": (len(plan.channel_names), *plan.size)},
            activation="softmax" if actor_kind(cfg) == "categorical" else "sigmoid",
            preparation="axes X, Y; " + "; ".join(steps),
            axes="XY",
            channel_names=plan.channel_names,
            label_names=plan.label_names,
        )
    }
