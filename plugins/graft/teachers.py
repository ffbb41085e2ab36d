"""Teachers: trained one for each fold, then read out into feature files that the student learns from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.cache import Cache, cache_root
from medrl.core.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, load_into
from medrl.core.config import Layer, Resolved
from medrl.core.errors import CheckpointError, ConfigError, MedrlError, did_you_mean
from medrl.core.jobs import TrainJob
from medrl.core.runtime.session import choose_device

from .config import GraftConfig
from .duties import open_split
from .features import DTYPES, LOGITS, Expected, FeatureWriter
from .models import as_output, tap
from .planning import build_network, divisor_of, resolve_plan
from .plans import SamplePlan
from .samples import CaseStore
from .windows import Size, rounded_up

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.core.types import Case

Say = Callable[[str], None]
Resolve = Callable[[Sequence[Layer]], Resolved[Any]]
"""Resolves the config of a run with further layers on top."""


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


def train_teachers(
    manager: PluginManager,
    resolve: Resolve,
    out: Path,
    *,
    count: int,
    only: Sequence[int] = (),
    command: Sequence[str] = (),
    say: Say = lambda _line: None,
) -> list[Path]:
    """Train `count` teachers; teacher k never sees fold k of `count`.

    Each is an ordinary run folder ``out/teacher_k``, made by the code of the student without teachers. One
    that is finished is left as it is, one that was interrupted goes on.

    Args:
        manager: Source of models.
        resolve: Gives the config of a run, with the given layers on top.
        out: Folder of the run folders.
        count: Number of teachers and of folds.
        only: Numbers of the teachers to train now; empty trains all.
        command: The command line, for the record.
        say: Shows a line of progress.

    Returns:
        The run folders.
    """
    from . import data, train

    wrong = [k for k in only if not 0 <= k < count]
    if wrong:
        raise ConfigError("--only", why=f"there is no teacher {wrong[0]}", do=f"choose 0 to {count - 1}")
    runs = []
    for k in only or range(count):
        seed = int(resolve(()).config.train.seed)
        values = {
            "data": {"fold": k, "folds": count},
            "train": {"seed": seed + k},
            "teachers": {"features": []},
            "split": {"labelled": 0},
        }
        job = TrainJob(
            method="graft",
            resolved=resolve([Layer(f"teacher {k}", values)]),
            run_dir=out / f"teacher_{k}",
            manager=manager,
            command=tuple(command),
        )
        say(f"teacher {k + 1} of {count}: {job.run_dir}")
        with job.runtime() as rt:
            train.fit(rt, job.config, data.load(rt, job.config))
        runs.append(job.run_dir)
    return runs


def find_teachers(path: Path) -> list[Path]:
    """Return the best checkpoint of a run, or of each run ``teacher_*`` in a folder, by number.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file() or (path / "checkpoints").is_dir():
        return [find_checkpoint(path)]
    runs = [item for item in path.glob("*") if (item / "checkpoints").is_dir()] if path.is_dir() else []
    if not runs:
        raise CheckpointError(
            f"no teachers in {path}",
            why="it is neither a run folder nor a folder of run folders",
            do="medrl graft train-teachers --data DATA -o " + str(path),
        )
    return [find_checkpoint(run) for run in sorted(runs, key=_by_number)]


class Teacher:
    """A trained network with its own normalisation, ready to be read out.

    Args:
        checkpoint: A checkpoint of graft.
        manager: Source of its model.
        device: Where it runs.

    Raises:
        CheckpointError: The checkpoint does not fit its own config.
    """

    def __init__(self, checkpoint: Checkpoint, manager: PluginManager, device: torch.device) -> None:
        self.path = checkpoint.path
        self.digest = checkpoint.digest
        self.config, self.plan, self.network = restore(checkpoint, manager)
        self.device = device
        self.network.to(device).eval().requires_grad_(False)

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

    @torch.inference_mode()
    def read(self, image: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Return the tapped features and the logits of one window, each ``(F, D, H, W)``."""
        output = as_output(self.network(image[None].to(self.device)))
        found = {name: tap(output, name)[0] for name in taps}
        return {**found, LOGITS: output.main[0]}


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


def extract(
    manager: PluginManager,
    cfg: GraftConfig,
    teachers: Sequence[Path],
    out: Path,
    *,
    taps: Sequence[str] = ("neg1",),
    dtype: str = "bf16",
    every_case: bool = False,
    device: torch.device | None = None,
    say: Say = lambda _line: None,
) -> Extracted:
    """Write the features of every teacher on exactly the windows that the student of `cfg` will see.

    Each teacher gets the image in its own normalisation. Cases whose files are there and fit are kept, so
    that an interrupted extraction goes on where it stopped.

    Args:
        manager: Source of models.
        cfg: The student's config: dataset, fold, window.
        teachers: Checkpoints.
        out: Folder of the feature folders ``teacher_0``, ``teacher_1``, ….
        taps: Layers to store beside the logits.
        dtype: `bf16`, `fp16` or `fp32`.
        every_case: Also the validation cases, not only those of the student's training fold.
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
    cases: Sequence[Case] = dataset.cases if every_case else split.train
    windows = CaseStore(dataset, student, cache)
    written = kept = 0
    folders = []
    for number, path in enumerate(teachers):
        teacher = Teacher(load_checkpoint(path, method="graft"), manager, place)
        _check_fits(teacher, student, dataset.channel_names)
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
        )
        for case in cases:
            expected = windows.expected(windows.get(case))
            if writer.has(expected):
                kept += 1
                continue
            writer.write(expected, _read_case(teacher, images, case, expected, taps))
            written += 1
        folders.append(folder)
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return Extracted(tuple(folders), written, kept, size)


def _read_case(
    teacher: Teacher, images: CaseStore, case: Case, expected: Expected, taps: Sequence[str]
) -> dict[str, Tensor]:
    box = torch.from_numpy(expected.window.cut(images.get(case).image))
    try:
        return teacher.read(box, taps)
    except MedrlError as error:
        raise type(error)(
            f"case {case.id}, teacher {teacher.path}: {error.what}", why=error.why, do=error.do
        ) from error


def _check_fits(teacher: Teacher, student: SamplePlan, channel_names: Sequence[str]) -> None:
    """Refuse a teacher of other images or other targets, or one whose network cannot take the window."""
    plan = teacher.plan
    for what, has, needs in (
        ("channels", tuple(plan.channel_names), tuple(channel_names)),
        ("target", plan.target_kind, student.target_kind),
        ("labels", dict(plan.labels), dict(student.labels)),
    ):
        if has != needs:
            raise CheckpointError(
                f"teacher {teacher.path}",
                why=f"its {what} are {has}, the student has {needs}",
                do="choose other teachers",
            )
    depth, height, width = getattr(teacher.network, "divisor", (1, 1, 1))
    divisor: Size = (int(depth), int(height), int(width))
    if student.size != rounded_up(student.size, divisor):
        raise ConfigError(
            "sample.size",
            why=f"the student's window {list(student.size)} is no multiple of {list(divisor)}, as teacher "
            f"{teacher.path} needs",
            do=f"--set sample.size={list(rounded_up(student.size, divisor))}".replace(" ", ""),
        )


def _by_number(path: Path) -> tuple[str, int, str]:
    match = re.search(r"(\d+)$", path.name)
    return (
        (path.name[: match.start()], int(match.group(1)), path.name) if match else (path.name, -1, path.name)
    )


DTYPE_NAMES = tuple(DTYPES)
