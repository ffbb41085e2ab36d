"""The networks of a checkpoint, for `medrl model export`: segmentation, reconstruction, policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import load_into
from medrl.core.export import Network

from . import parts
from .agent import ColumnAgent, FaithfulAgent, LineAgent
from .imaging import logits_of
from .restoring import restore

if TYPE_CHECKING:
    from medrl.core.checkpoint import Checkpoint
    from medrl.core.manager import PluginManager

_PREPARED = "magnitude of the reconstruction, scaled as in training; axes rows, columns"


def networks(checkpoint: Checkpoint, manager: PluginManager) -> dict[str, Network]:
    """Rebuild what is there, the policy first; the networks take whole slices ``(N, 1, H, W)``."""
    run = restore(checkpoint, manager, torch.device("cpu"))
    rows, columns = (int(size) for size in checkpoint.meta["matrix"])
    deep = run.cfg.acquisition.geometry == "volume3d"
    size = (int(checkpoint.meta["depth"]), rows, columns) if deep else (rows, columns)
    found: dict[str, Network] = {}
    policy = None if run.agent is None else policy_network(run.agent)
    if policy is not None:
        found["policy"] = policy
    if "segmenter" in checkpoint.states:
        network = parts.segmenter(run.cfg, manager, classes=run.classes)
        load_into(network, checkpoint.states["segmenter"])
        found["segmenter"] = Network(
            module=_Logits(network),
            weights=network,
            inputs={"image": (1, *size)},
            preparation=_PREPARED,
            axes="ZYX" if deep else "YX",
            channel_names=("MR",),
            label_names=run.plan.label_names,
        )
    if "recon" in checkpoint.states:
        recon = parts.recon_network(run.cfg, manager)
        load_into(recon, checkpoint.states["recon"])
        found["recon"] = Network(
            module=recon,
            inputs={"image": (1, *size)},
            outputs=("image_improved",),
            activation="none",
            preparation=f"zero-filled {_PREPARED}",
            axes="ZYX" if deep else "YX",
            channel_names=("MR",),
        )
    return found


def policy_network(agent: LineAgent) -> Network | None:
    """The policy; None for an agent of another plugin, whose inputs are not known here."""
    if isinstance(agent, FaithfulAgent):
        return Network(
            module=_OnImages(agent),
            weights=agent,
            inputs={"image": (2, *agent.actor.image_shape), "remaining": (1,)},
            outputs=("logits", "value"),
            preparation="real and imaginary part of the reconstruction; lines that remain",
            axes="YX",
        )
    if isinstance(agent, ColumnAgent):
        columns, pooled = agent.column_scale.mean.numel(), agent.pooled_scale.mean.numel()
        return Network(
            module=_OnFeatures(agent),
            weights=agent,
            inputs={"columns": (columns, agent.actions), **({"pooled": (pooled,)} if pooled else {})},
            outputs=("logits", "value"),
            preparation="features of every column and of the whole image, in the order of ColumnFeatures",
            axes="X",
        )
    return None


class _OnImages(nn.Module):
    def __init__(self, agent: FaithfulAgent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, image: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor]:
        seen = {"image": torch.complex(image[:, 0], image[:, 1]), "remaining": remaining}
        return self.agent.logits_and_values(seen)


class _OnFeatures(nn.Module):
    def __init__(self, agent: ColumnAgent) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, columns: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        known = columns.new_zeros(columns.shape[0], 0) if pooled is None else pooled
        return self.agent.logits_and_values({"columns": columns, "pooled": known})


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return logits_of(self.network(image))
