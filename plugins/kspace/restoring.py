"""A trained policy with the networks that it sees with, rebuilt from its checkpoint alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_into
from medrl.core.errors import CheckpointError

from . import parts
from .agent import LineAgent
from .cases import Cases, initial_lines, possible_lines
from .config import KspaceConfig
from .crossing import CrossedObserver, parts_of_cases
from .data import SamplePlan
from .domain import SliceInfo
from .imaging import Imaging
from .models import CompactNet, ReconUNet, folded
from .observer import CaseObserver

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager


@dataclass(frozen=True, eq=False)
class Restored:
    """What a checkpoint of a policy run holds.

    Attributes:
        agent: None in the run of a reward model.
        crossed: With the crossed reward models, if it has any; see `crossing`.
        dealt: Their part of each training patient.
    """

    cfg: KspaceConfig
    plan: SamplePlan
    classes: int
    imaging: Imaging
    agent: LineAgent | None
    path: Path
    patients: frozenset[str]
    manager: PluginManager
    crossed: tuple[Imaging, ...] = ()
    dealt: Mapping[str, int] = field(default_factory=dict)

    def observer(self, cases: Cases) -> CaseObserver:
        """What the agent sees of some cases."""
        return parts.observer(self.cfg, self.manager, cases, self.imaging, classes=self.classes)

    def training(self, cases: Cases, info: Sequence[Sequence[SliceInfo]]) -> CaseObserver:
        """The same for training cases, each judged with a reward model that does not know its patient.

        Without crossed reward models it is the reward model of all.
        """
        plain = self.observer(cases)
        if not self.crossed:
            return plain
        part = parts_of_cases(info, self.dealt)
        return CrossedObserver(cases, self.imaging, plain.features, crossed=self.crossed, part=part)

    def policy(self) -> LineAgent:
        """The agent.

        Raises:
            CheckpointError: There is none.
        """
        if self.agent is None:
            raise CheckpointError(
                f"checkpoint {self.path}",
                why="it holds no policy",
                do="use a run of `medrl train kspace`",
            )
        return self.agent


def open_run(
    path: Path, manager: PluginManager, device: torch.device, *, precision: str = "fp32"
) -> Restored:
    """Restore the best checkpoint of a run folder, or the one that is named."""
    which = "best" if path.is_dir() and (path / "checkpoints" / "best.pt").is_file() else "last"
    found = load_checkpoint(find_checkpoint(path, which), method="kspace")
    return restore(found, manager, device, precision=precision)


def restore(
    checkpoint: Checkpoint, manager: PluginManager, device: torch.device, *, precision: str = "fp32"
) -> Restored:
    """Rebuild config, plan and networks.

    Raises:
        CheckpointError: The checkpoint lacks them, or the weights do not fit, or nothing is trained yet.
    """
    try:
        cfg = KspaceConfig.model_validate(checkpoint.meta["config"])
        plan = SamplePlan.from_meta(checkpoint.meta["plan"])
        classes, matrix = int(checkpoint.meta["classes"]), checkpoint.meta["matrix"]
        depth, known = int(checkpoint.meta["depth"]), checkpoint.meta["patients"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why=f"it is of no run of kspace ({type(error).__name__}: {error})",
            do="use a run of `medrl train kspace`",
        ) from error
    if checkpoint.meta.get("ready") is False:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why="its reward model is not trained yet",
            do="medrl resume RUN",
        )
    network: nn.Module | None = None
    if "segmenter" in checkpoint.states:
        network = parts.segmenter(cfg, manager, classes=classes)
        load_into(network, _weights(checkpoint, "segmenter"))
        network = _settled(network, device)
    recon: ReconUNet | None = None
    if "recon" in checkpoint.states:
        recon = parts.recon_network(cfg, manager)
        load_into(recon, _weights(checkpoint, "recon"))
        recon = recon.to(device)
    elif cfg.acquisition.recon == "unet":
        recon = parts.trained_recon(cfg, manager).to(device)
    seen = parts.imaging(cfg, network, recon, precision=precision)
    agent = None
    if "agent" in checkpoint.states:
        stand_in = blank_cases(cfg, (int(matrix[0]), int(matrix[1])), depth)
        eyes = parts.observer(cfg, manager, stand_in, seen, classes=classes)
        agent = parts.agent(cfg, manager, stand_in, eyes.features)
        load_into(agent, _weights(checkpoint, "agent"))
        agent = agent.to(device).eval().requires_grad_(requires_grad=False)
    crossed: tuple[Imaging, ...] = ()
    if "crossed" in checkpoint.states:
        networks = nn.ModuleList(
            parts.segmenter(cfg, manager, classes=classes) for _ in range(cfg.seg.crossed)
        )
        load_into(networks, _weights(checkpoint, "crossed"))
        crossed = tuple(
            parts.imaging(cfg, _settled(each, device), recon, precision=precision) for each in networks
        )
    dealt = {str(name): int(part) for name, part in checkpoint.meta.get("dealt", {}).items()}
    patients = frozenset(str(name) for names in known.values() for name in names)
    return Restored(cfg, plan, classes, seen, agent, checkpoint.path, patients, manager, crossed, dealt)


def _settled(network: nn.Module, device: torch.device) -> nn.Module:
    """A trained reward model, ready to segment."""
    network.eval()
    network = folded(network) if isinstance(network, CompactNet) else network
    return network.to(device)


def blank_cases(cfg: KspaceConfig, matrix: tuple[int, int], depth: int) -> Cases:
    """One empty case of the geometry of a config, to build an agent for."""
    play = cfg.acquisition
    shape = matrix if play.geometry == "slice" else (depth, *matrix)
    deep = depth if play.points else 1
    indices = play.sampled_indices
    return Cases(
        ids=("none",),
        kspace=torch.zeros(1, *shape, dtype=torch.complex64),
        target=torch.zeros(1, *shape),
        labels=None,
        possible=possible_lines(1, matrix[1], indices=indices, depth=deep),
        initial=initial_lines(1, matrix[1], play.init_center, depth=deep),
        geometry=play.geometry,
        points=play.points,
    )


def _weights(checkpoint: Checkpoint, name: str) -> Mapping[str, Tensor]:
    return cast("Mapping[str, Tensor]", checkpoint.states[name])
