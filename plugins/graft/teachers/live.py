"""Teachers that are asked while the student trains, about every batch as it is after augmentation.

Each network gets the same voxels as the student, in its own normalisation, and answers without gradients in
the precision of the run. Nothing of it is trained or saved; the checkpoint only remembers which they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core.errors import CheckpointError
from medrl.plugins.graft.features import LOGITS, Expected
from medrl.plugins.graft.plans import SamplePlan
from medrl.plugins.graft.samples import Batch

from .networks import Teacher, find_teachers, open_network

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.plugins.graft.config import GraftConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class LiveTeacher:
    """One network with the attributes that a feature folder has (`features.TeacherFolder`).

    Attributes:
        channels: Channels of each tap and of the logits by name.
        view: Which image of a sample it sees: 0 is the student's, k the k-th of `Batch.views`.
    """

    family = "nnunet"

    def __init__(self, teacher: Teacher, taps: Sequence[str], student: SamplePlan, view: int) -> None:
        self.network = teacher
        self.channels = {**teacher.tap_channels(taps), LOGITS: student.target.channels}
        self.view = view

    @property
    def name(self) -> str:
        """Short name for logs."""
        return self.network.name

    @property
    def path(self) -> Path:
        """Its checkpoint."""
        return self.network.path

    @property
    def teacher(self) -> str:
        """Digest of its checkpoint."""
        return self.network.digest

    @property
    def trained_on(self) -> dict[str, Any]:
        """Which cases it has seen, as `TrainedOn` writes it."""
        return self.network.trained_on.to_record()

    def __contains__(self, case_id: str) -> bool:
        """Any case can be shown to it."""
        return True

    def check(self, expected: Expected) -> None:
        """Refuse a case with voxels of another size than it was trained for."""
        self.network.check_spacing(expected.case_id, expected.spacing)


class LiveTeachers:
    """All networks of a run.

    Args:
        teachers: Frozen, on their device.
        taps: Layers that are compared.
        student: How the student's cases are prepared.
        precision: `fp32`, or autocast to `bf16` or `fp16`.

    Attributes:
        teachers: As `GraftData.teachers` holds them.
        views: How cases are prepared for those who want them otherwise than the student.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        taps: Sequence[str],
        student: SamplePlan,
        precision: str = "fp32",
    ) -> None:
        self.target, self.precision = student.target, precision
        views: dict[tuple[str, ...], SamplePlan] = {}
        found = []
        for teacher in teachers:
            teacher.check_fits(student)
            key = _preparation(teacher.plan)
            if key == _preparation(student):
                found.append(LiveTeacher(teacher, taps, student, 0))
                continue
            views.setdefault(key, teacher.plan)
            found.append(LiveTeacher(teacher, taps, student, 1 + list(views).index(key)))
        self.teachers = tuple(found)
        self.views = tuple(views.values())

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.teachers[0].network.device

    def answer(self, batch: Batch, taps: Sequence[str]) -> Batch:
        """Return the batch with what every teacher says about it: features of `taps`, and logits."""
        said = [self.ask(number, batch, taps) for number in range(len(self.teachers))]
        everywhere = torch.ones(len(batch.case_ids), 1, 1, 1, 1, device=self.device)
        return replace(
            batch,
            features={name: [found[name] for found in said] for name in taps},
            logits=[found[LOGITS] for found in said],
            valid=[everywhere] * len(said),
        )

    def ask(self, number: int, batch: Batch, taps: Sequence[str]) -> dict[str, Tensor]:
        """What one teacher says about a batch: each tap and the logits, ``(B, F, D, H, W)``."""
        teacher = self.teachers[number]
        image = batch.image if teacher.view == 0 else batch.views[teacher.view - 1]
        with self._autocast():
            return teacher.network.run(image, taps, self.target)

    def state_dict(self) -> dict[str, Any]:
        """Which networks these are; their weights are not the run's."""
        return {"teachers": [teacher.teacher for teacher in self.teachers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the run goes on with the teachers that it began with.

        Raises:
            CheckpointError: One of them is another network now.
        """
        for before, teacher in zip(state["teachers"], self.teachers, strict=True):
            if before != teacher.teacher:
                raise CheckpointError(
                    f"teacher {teacher.path}",
                    why="it is another network than the one that this run began with",
                    do="bring its checkpoint back, or start a new run with -o",
                )

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = DTYPES.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.precision in DTYPES)


def open_live(
    cfg: GraftConfig,
    manager: PluginManager,
    student: SamplePlan,
    device: torch.device,
) -> LiveTeachers | None:
    """Open the networks that the config names; None if it names none.

    Args:
        cfg: `teachers.features` are run folders or checkpoints.
        manager: Source of models.
        student: How the student's cases are prepared.
        device: Where the networks run.

    Raises:
        CheckpointError: A checkpoint is missing, damaged, or predicts something else than the student.
        ConfigError: The student's window does not suit a teacher, or a tap is missing.
    """
    paths = [path for given in cfg.teachers.features for path in find_teachers(given)]
    if not paths:
        return None
    taps = cfg.distill.taps if cfg.distill.feature_weight > 0 else ()
    try:
        teachers = [open_network(path, manager, device, trust=cfg.teachers.trust) for path in paths]
    except CheckpointError as error:
        error.do = error.do.replace("--trust-checkpoint", "--trust-teachers")
        raise
    if cfg.train.channels_last:
        for teacher in teachers:
            teacher.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return LiveTeachers(teachers, taps=taps, student=student, precision=cfg.train.precision)


def _preparation(plan: SamplePlan) -> tuple[str, ...]:
    """What decides the intensities of a prepared case."""
    mask = plan.mask if plan.normalization == "mask" else ""
    statistics = repr(sorted(plan.statistics.items())) if plan.normalization == "stats" else ""
    return plan.normalization, mask, statistics
