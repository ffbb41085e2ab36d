"""A teacher as a network: rebuilt from its checkpoint, frozen, with its own normalisation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_into
from medrl.core.errors import CheckpointError, ConfigError, MedrlError, did_you_mean
from medrl.core.rng import isolated
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.features import LOGITS
from medrl.plugins.graft.models import as_output, tap
from medrl.plugins.graft.planning import build_network
from medrl.plugins.graft.plans import SamplePlan
from medrl.plugins.graft.regions import Target, converted
from medrl.plugins.graft.windows import Size, rounded_up

from .nnunet import CHECKPOINTS, read_teacher
from .seen import TrainedOn

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

SPACING_TOLERANCE = 0.05
"""Relative difference of a voxel size from the one that a network was trained for."""


def find_teachers(path: Path) -> list[Path]:
    """Return the best checkpoint of a run, or of each run ``teacher_*`` in a folder, by number.

    A checkpoint of nnU-Net (``.pth``), a fold folder of it, or a folder of ``fold_*`` is found too.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file():
        return [path if path.suffix == ".pth" else find_checkpoint(path)]
    found = _checkpoint_in(path)
    if found is not None:
        return [found]
    inner = sorted(path.glob("*"), key=_by_number) if path.is_dir() else []
    runs = [run for item in inner if item.is_dir() and (run := _checkpoint_in(item)) is not None]
    if not runs:
        raise CheckpointError(
            f"no teachers in {path}",
            why="it is neither a run folder nor a folder of run folders",
            do="medrl graft train-teachers --data DATA -o " + str(path),
        )
    return runs


def open_network(path: Path, manager: PluginManager, device: torch.device, *, trust: bool = False) -> Teacher:
    """Open a teacher's network: a checkpoint of graft, or of nnU-Net v2.

    Args:
        path: The file.
        manager: Source of models.
        device: Where it runs.
        trust: Read a file of nnU-Net that holds pickled objects beside its weights; none is executed.

    Raises:
        CheckpointError: Damaged, or of another kind of network.
    """
    with isolated(0):  # the draws of a new network are overwritten, and must not move the run's streams
        return _open(path, manager, trust).to(device)


def _open(path: Path, manager: PluginManager, trust: bool) -> Teacher:
    if path.suffix == ".pth":
        found = read_teacher(path, trust=trust)
        return Teacher(
            path=path,
            digest=found.digest,
            network=found.network,
            plan=found.plan,
            target=found.target,
            trained_on=TrainedOn(fold=found.fold),
            order=found.order,
            spacing=found.spacing,
        )
    checkpoint = load_checkpoint(path, method="graft")
    _, plan, network = restore(checkpoint, manager)
    return Teacher(
        path=path,
        digest=checkpoint.digest,
        network=network,
        plan=plan,
        target=plan.target,
        labels=dict(plan.labels),
        trained_on=TrainedOn.from_record(checkpoint.meta.get("trained_on")),
    )


@dataclass(eq=False)
class Teacher:
    """A trained network with its own normalisation, frozen, ready to be read out.

    Attributes:
        path: Its checkpoint.
        digest: Of the checkpoint.
        plan: How it wants a case prepared; the window is the student's.
        target: What its outputs mean.
        trained_on: Which cases it has seen.
        labels: Label values by name that a student must share; None where the label sets of `target` say
            enough.
        order: Axes of ``(D, H, W)`` in the order that the network takes them.
        spacing: Voxel size (X, Y, Z) in mm that it was trained for; None for any.
        device: Where it runs.
    """

    path: Path
    digest: str
    network: nn.Module
    plan: SamplePlan
    target: Target
    trained_on: TrainedOn
    labels: dict[str, int] | None = None
    order: tuple[int, int, int] = (0, 1, 2)
    spacing: tuple[float, float, float] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @property
    def name(self) -> str:
        """A short name: that of the run folder, or of the file."""
        folder = self.path.parent
        if folder.name == "checkpoints":
            return folder.parent.name
        return folder.name if folder.name.startswith("fold_") else self.path.stem

    def to(self, device: torch.device) -> Teacher:
        """Move the network; return the teacher."""
        self.network.to(device)
        self.device = device
        return self

    def tap_channels(self, taps: Sequence[str]) -> dict[str, int]:
        """Return the channels of each tap.

        Raises:
            ConfigError: The network has no such tap.
        """
        known: Mapping[str, int] = getattr(self.network, "feature_channels", {})
        for name in taps:
            if name not in known:
                raise ConfigError(
                    "--taps", why=f"teacher {self.path} has no '{name}', {did_you_mean(name, known)}"
                )
        return {name: int(known[name]) for name in taps}

    @torch.no_grad()
    def run(self, images: Tensor, taps: Sequence[str], target: Target | None = None) -> dict[str, Tensor]:
        """Read out the taps and the logits of windows ``(B, C, D, H, W)``, each ``(B, F, D', H', W')``.

        Args:
            images: In this teacher's normalisation.
            taps: Layers to read.
            target: Turn the logits into the channels of this target; left out, they stay as they are.
        """
        turned = images.to(self.device).permute(0, 1, *(2 + axis for axis in self.order))
        output = as_output(self.network(turned))
        back = [0, 1, *(2 + self.order.index(axis) for axis in range(3))]
        found = {name: tap(output, name).permute(back) for name in taps}
        logits = output.main.permute(back)
        return {**found, LOGITS: logits if target is None else converted(logits, self.target, target)}

    def read(self, image: Tensor, taps: Sequence[str], target: Target | None = None) -> dict[str, Tensor]:
        """As `run`, of one window ``(C, D, H, W)``."""
        return {name: array[0] for name, array in self.run(image[None], taps, target).items()}

    def check_fits(self, student: SamplePlan) -> None:
        """Refuse other images or other targets, and a window that the network cannot take.

        Raises:
            CheckpointError: The network sees or predicts something else than the student.
            ConfigError: The student's window does not suit it.
        """
        names = tuple(self.plan.channel_names)
        compared: list[tuple[str, object, object]] = []
        if self.labels is None:
            compared.append(("number of channels", len(names), len(student.channel_names)))
        else:
            compared += [
                ("channels", names, tuple(student.channel_names)),
                ("target", self.plan.target_kind, student.target_kind),
                ("labels", self.labels, dict(student.labels)),
            ]
        for what, has, needs in compared:
            if has != needs:
                raise CheckpointError(
                    f"teacher {self.path}",
                    why=f"its {what} {'is' if what.startswith(('number', 'target')) else 'are'} {has}, "
                    f"the student has {needs}",
                    do="choose other teachers",
                )
        try:
            converted(torch.zeros(1, self.target.channels, 1, 1, 1), self.target, student.target)
        except MedrlError as error:
            raise CheckpointError(
                f"teacher {self.path}", why=error.why, do="choose other teachers"
            ) from error
        self._check_window(student.size)

    def check_spacing(self, case_id: str, spacing: Sequence[float]) -> None:
        """Refuse a case whose voxels have another size than those that the network was trained on.

        Raises:
            CheckpointError: They differ by more than 5 %; the case is named.
        """
        if self.spacing is None:
            return
        if any(abs(a - b) > SPACING_TOLERANCE * b for a, b in zip(spacing, self.spacing, strict=True)):
            raise CheckpointError(
                f"case {case_id}, teacher {self.path}",
                why=f"voxels of {_millimetres(spacing)}, its plans want {_millimetres(self.spacing)}",
                do="resample the dataset to that spacing, or choose other teachers",
            )

    def _check_window(self, size: Size) -> None:
        turned: Sequence[int] = getattr(self.network, "divisor", (1, 1, 1))
        depth, height, width = (int(turned[self.order.index(axis)]) for axis in range(3))
        divisor: Size = (depth, height, width)
        if size != rounded_up(size, divisor):
            raise ConfigError(
                "sample.size",
                why=f"the student's window {list(size)} is no multiple of {list(divisor)}, as teacher "
                f"{self.path} needs",
                do=f"--set sample.size={list(rounded_up(size, divisor))}".replace(" ", ""),
            )


def restore(checkpoint: Checkpoint, manager: PluginManager) -> tuple[GraftConfig, SamplePlan, nn.Module]:
    """Rebuild the config, the plan and the network of a checkpoint.

    Raises:
        CheckpointError: It lacks them, or the weights do not fit.
    """
    try:
        config = GraftConfig.model_validate(checkpoint.meta["config"])
        plan = SamplePlan.from_meta(checkpoint.meta["plan"])
        weights: Mapping[str, Tensor] = checkpoint.states["student"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why=f"it holds no network of graft ({type(error).__name__}: {error})",
            do="use a checkpoint that `medrl train graft` wrote",
        ) from error
    network = build_network(config, manager, len(plan.channel_names), plan.target.channels)
    load_into(network, dict(weights))
    return config, plan, network


def _checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint of a run folder of graft, or of a fold folder of nnU-Net."""
    if (folder / "checkpoints").is_dir():
        return find_checkpoint(folder)
    return next((folder / name for name in CHECKPOINTS if (folder / name).is_file()), None)


def _by_number(path: Path) -> tuple[str, int, str]:
    match = re.search(r"(\d+)$", path.name)
    return (
        (path.name[: match.start()], int(match.group(1)), path.name) if match else (path.name, -1, path.name)
    )


def _millimetres(spacing: Sequence[float]) -> str:
    return " × ".join(f"{value:g}" for value in spacing) + " mm"
