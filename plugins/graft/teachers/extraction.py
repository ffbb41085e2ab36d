"""Reading teachers out into feature files, on exactly the windows that the student will see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medrl.core.cache import Cache, cache_root
from medrl.core.errors import MedrlError
from medrl.core.runtime.session import choose_device
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.duties import open_split, training_cases
from medrl.plugins.graft.features import LOGITS, Expected, FeatureWriter
from medrl.plugins.graft.planning import divisor_of, resolve_plan
from medrl.plugins.graft.plans import SamplePlan
from medrl.plugins.graft.samples import CaseStore

from .networks import Teacher, open_network

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.types import Case

Say = Callable[[str], None]

POOL = (1, 2, 2)
"""Voxels of depth, height and width that `pooled` storage averages."""


@dataclass(frozen=True)
class Extracted:
    """What an extraction did.

    Attributes:
        folders: The feature folder of each teacher.
        written: Cases written now.
        kept: Cases that were already there and fit.
        bytes: Size of all files.
    """

    folders: tuple[Path, ...]
    written: int
    kept: int
    bytes: int


def extract(
    manager: PluginManager,
    cfg: GraftConfig,
    teachers: Sequence[Path],
    out: Path,
    *,
    taps: Sequence[str] = ("neg1",),
    dtype: str = "bf16",
    pooled: bool = False,
    every_case: bool = False,
    trust: bool = False,
    device: torch.device | None = None,
    say: Say = lambda _line: None,
) -> Extracted:
    """Write the features of every teacher on exactly the windows that the student of `cfg` will see.

    Each teacher gets the image in its own normalisation. Cases whose files are there and fit are kept, so
    that an interrupted extraction goes on where it stopped.

    Args:
        manager: Source of models.
        cfg: The student's config: dataset, fold, window.
        teachers: Checkpoints of graft, or of nnU-Net v2.
        out: Folder of the feature folders ``teacher_0``, ``teacher_1``, ….
        taps: Layers to store beside the logits.
        dtype: `bf16`, `fp16` or `fp32`.
        pooled: Store the taps at half the height and width, a quarter of the space; the logits stay whole.
        every_case: Also the validation cases, not only those of the student's training fold.
        trust: See `open_network`.
        device: Where the teachers run; `train.device` of the config if left out.
        say: Shows a line of progress.

    Raises:
        ConfigError: The student's window does not suit a teacher.
        CheckpointError: A teacher cannot be loaded or predicts something else than the student.
    """
    place = device or choose_device(cfg.train.device)
    if cfg.train.threads > 0:
        torch.set_num_threads(cfg.train.threads)
    dataset, split = open_split(cfg)
    cache = Cache(cache_root(dataset.root))
    student = resolve_plan(cfg, dataset, split.train, divisor_of(cfg, manager, dataset), cache)
    cases: Sequence[Case] = training_cases(cfg, dataset, split)
    if every_case:
        chosen = {case.id: case for case in (*dataset.cases, *cases)}
        cases = list(chosen.values())
    windows = CaseStore(dataset, student, cache)
    written = kept = 0
    folders = []
    for number, path in enumerate(teachers):
        teacher = open_network(path, manager, place, trust=trust)
        teacher.check_fits(student)
        images = CaseStore(dataset, teacher.plan, cache)
        folder = out / f"teacher_{number}"
        say(f"teacher {number + 1} of {len(teachers)}: {len(cases)} cases to {folder}")
        writer = FeatureWriter(
            folder,
            teacher=teacher.digest,
            source=str(path),
            channels={**teacher.tap_channels(taps), LOGITS: student.target.channels},
            target=student.target_kind,
            labels=student.labels,
            dtype=dtype,
            pooled=pooled,
            trained_on=teacher.trained_on.to_record(),
        )
        for case in cases:
            expected = windows.expected(windows.get(case))
            teacher.check_spacing(case.id, expected.spacing)
            if writer.has(expected):
                kept += 1
                continue
            found = _read_case(teacher, images, case, expected, taps, student)
            writer.write(expected, _pooled(found) if pooled else found)
            written += 1
        folders.append(folder)
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return Extracted(tuple(folders), written, kept, size)


def _read_case(
    teacher: Teacher,
    images: CaseStore,
    case: Case,
    expected: Expected,
    taps: Sequence[str],
    student: SamplePlan,
) -> dict[str, Tensor]:
    box = torch.from_numpy(expected.window.cut(images.get(case).image))
    try:
        return teacher.read(box, taps, student.target)
    except MedrlError as error:
        raise type(error)(
            f"case {case.id}, teacher {teacher.path}: {error.what}", why=error.why, do=error.do
        ) from error


def _pooled(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average the taps over `POOL`; a last row or column that is left over counts for itself."""
    return {
        name: array if name == LOGITS else F.avg_pool3d(array[None].float(), POOL, ceil_mode=True)[0]
        for name, array in arrays.items()
    }
