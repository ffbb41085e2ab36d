"""The demonstration: tumours in synthetic CT, found from image labels alone; who finds them best?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from medrl.core.jobs import DemoJob, DemoResult, build_train_job
from medrl.core.phantoms.abdomen import write_abdomen

from . import evaluate, running
from .hunting import TITLES


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        cases: Volumes to learn on, half of them without a tumour.
        test_cases: Volumes to test on, a quarter of them without.
        shape: Voxels.
        radius: Of tumours and distractors, in voxels.
        distractors: Lowest and highest number of look-alikes outside the liver.
        folds: One of so many watches over training.
        values: Config laid over the preset.
    """

    cases: int
    test_cases: int
    shape: tuple[int, int, int]
    radius: tuple[float, float]
    distractors: tuple[int, int]
    folds: int
    values: Mapping[str, Any] = field(default_factory=dict)


SCALES = {
    "smoke": Scale(
        cases=80, test_cases=12, shape=(48, 48, 32), radius=(4.0, 7.0), distractors=(1, 1), folds=5
    ),
    "small": Scale(
        cases=96, test_cases=16, shape=(64, 64, 48), radius=(3.0, 8.0), distractors=(1, 3), folds=5
    ),
}
ROLES = {
    "scan": "method",
    "self-play": "method",
    "greedy": "baseline",
    "tiles": "control",
    "random": "control",
}


def run(job: DemoJob) -> DemoResult:
    """Write volumes, train, measure every policy on test volumes, write the report."""
    scale = SCALES[job.preset]
    job.say(f"data: {scale.cases} volumes with presence labels to learn on, {scale.test_cases} to test on")
    root = write_abdomen(
        job.folder / "data",
        cases=scale.cases,
        test_cases=scale.test_cases,
        seed=job.seed,
        shape=scale.shape,
        radius=scale.radius,
        distractors=scale.distractors,
    )
    job.say("classifier from image labels, then self-play")
    values = {
        **scale.values,
        "data": {"root": str(root), "folds": scale.folds},
        "train": {"seed": job.seed, "threads": job.threads, "device": "cpu"},
    }
    trained = job.folder / "run"
    running.run(
        build_train_job(job.manager, "spars", values, trained, preset=job.preset, command=job.command)
    )
    job.say("evaluation on test volumes")
    found = evaluate.run(
        job.manager, [trained], job.folder / "evaluation", device="cpu", threads=job.threads, seed=job.seed
    )
    columns, rows = table(found.summary)
    return DemoResult(columns=columns, rows=rows, report=found.report, notes=notes(found.summary))


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str, Sequence[float]]]]:
    """Dice, lesion recall, false positives and windows scored of every policy."""
    columns = ["Dice", "lesions found", "false positives", "windows scored"]
    rows: list[tuple[str, str, Sequence[float]]] = []
    for name, values in summary["policies"].items():
        numbers = [values[key]["mean"] for key in ("dice", "recall", "false_positive", "windows")]
        rows.append((TITLES.get(name, name), ROLES.get(name, "baseline"), numbers))
    return columns, rows


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Say what the numbers mean, and what they do not."""
    return [
        *summary["notes"],
        "All policies share scores, threshold and post-processing; they differ in where they look. A scan "
        "that looks everywhere is the one to beat, and is what `medrl predict` does unless told otherwise.",
        "These are synthetic volumes and one seed: the table shows that every part works, not how well the "
        "method does on patients.",
    ]
