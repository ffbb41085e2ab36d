"""A trained run, rebuilt from its checkpoint alone: classifier, threshold, and the policy if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_into
from medrl.core.errors import CheckpointError

from .agent import HuntAgent, build_agent
from .config import SparsConfig
from .hunting import blank_observer
from .scoring import ScorerModule, build_scorer

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

_DESCRIBED = (
    "label_names",
    "channel_names",
    "spacing",
    "scorer",
    "label_source",
    "classifier",
    "patients",
    "auc",
)
"""What the checkpoint of a policy says of its classifier."""


@dataclass(frozen=True, eq=False)
class Restored:
    """What a checkpoint holds.

    Attributes:
        agent: None in the run of a classifier.
        threshold: As `medrl.plugins.spars.measuring.Threshold.as_dict` gave it.
    """

    cfg: SparsConfig
    scorer: ScorerModule
    agent: HuntAgent | None
    threshold: Mapping[str, Any]
    meta: Mapping[str, Any]
    path: Path
    manager: PluginManager

    @property
    def label_names(self) -> dict[str, int]:
        """``{"background": 0, <what is looked for>: 1}``."""
        return {str(name): int(value) for name, value in self.meta["label_names"].items()}

    @property
    def target(self) -> str:
        """What is looked for."""
        return next(name for name, value in self.label_names.items() if value)

    @property
    def patients(self) -> frozenset[str]:
        """Patients that were trained on or watched."""
        return frozenset(name for names in self.meta.get("patients", {}).values() for name in names)

    def described(self) -> dict[str, Any]:
        """What the checkpoint of a policy repeats of its classifier."""
        return {name: self.meta[name] for name in _DESCRIBED if name in self.meta}


def open_run(path: Path, manager: PluginManager, device: torch.device) -> Restored:
    """Restore the last checkpoint of a run folder, or the one that is named."""
    return restore(load_checkpoint(find_checkpoint(path, "last"), method="spars"), manager, device)


def restore(checkpoint: Checkpoint, manager: PluginManager, device: torch.device) -> Restored:
    """Rebuild config, classifier and policy.

    Raises:
        CheckpointError: The checkpoint lacks them, the weights do not fit, or the classifier is not trained.
    """
    try:
        cfg = SparsConfig.model_validate(checkpoint.meta["config"])
        settings = checkpoint.meta["scorer"]
        state = checkpoint.states["scorer"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why=f"it is of no run of spars ({type(error).__name__}: {error})",
            do="use a run of `medrl train spars`",
        ) from error
    scorer = build_scorer(settings, state).to(device)
    if not int(scorer.ready):
        raise CheckpointError(
            f"checkpoint {checkpoint.path}", why="its classifier is not trained yet", do="medrl resume RUN"
        )
    scorer.requires_grad_(requires_grad=False)
    agent = None
    if "agent" in checkpoint.states:
        agent = build_agent(cfg.agent, manager, blank_observer(cfg))
        load_into(agent, checkpoint.states["agent"])
        agent = agent.to(device).eval().requires_grad_(requires_grad=False)
    threshold = checkpoint.meta.get("threshold") or {"value": 0.5, "by": "none", "worth": {}}
    return Restored(cfg, scorer, agent, threshold, checkpoint.meta, checkpoint.path, manager)
