"""The demonstration: two synthetic hospitals, teachers from one, a student with few labels in the other.

Hospital A trains teachers and keeps its images. Hospital B has many images and few labels. Some teachers are
spoilt on purpose, as happens when models of unknown quality are collected; the method has to find out which.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.checkpoint import find_checkpoint
from medrl.core.config import Layer, resolve_method
from medrl.core.dataset import load_case, open_dataset
from medrl.core.evaluation import Evaluation, evaluate_folders
from medrl.core.jobs import DemoJob, DemoResult, PredictJob, build_train_job
from medrl.core.phantoms.prostate import write_prostate
from medrl.core.report import (
    Section,
    curves,
    evaluation_sections,
    gallery,
    overlay_panel,
    paragraphs,
    result_table,
    simple_table,
    write_page,
)
from medrl.core.runlog import RunFolder
from medrl.core.volume import read_volume, write_volume

from . import data, predict, teachers, train
from .features import LOGITS

REGIONS = {"prostate": (1, 2, 3), "cancer": (2, 3)}
"""What is evaluated: the whole gland, and both kinds of cancer together."""

TUNED = {
    "train": {"lr": 1.0e-2},
    "distill": {"feature_weight": 0.1, "logit_weight": 3.0, "temperature": 2.0},
}
"""What suits the phantoms, laid over the preset."""

SWAPPED = "learned from labels that had cancer and healthy gland swapped"
UNTRAINED = "was never trained"


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        shape: ``(X, Y, Z)`` voxels of the phantoms.
        teacher_cases: Cases of hospital A.
        student_cases: Cases of hospital B; one fifth validates.
        test_cases: Cases that no stage sees.
        labelled: Cases of hospital B that have labels.
        good: Teachers trained properly, each without one fold.
        swapped: Teachers that learn from labels in which healthy gland and cancer are swapped.
        untrained: Teachers that were never trained.
        teacher_steps: Training steps of a teacher.
        random_reward: Whether to run the agent on noise too.
        panels: Test cases shown in the report.
    """

    shape: tuple[int, int, int]
    teacher_cases: int
    student_cases: int
    test_cases: int
    labelled: int
    good: int
    swapped: int
    untrained: int
    teacher_steps: int
    random_reward: bool
    panels: int


SCALES = {
    "smoke": Scale(
        shape=(40, 40, 10),
        teacher_cases=16,
        student_cases=12,
        test_cases=8,
        labelled=5,
        good=2,
        swapped=1,
        untrained=0,
        teacher_steps=200,
        random_reward=False,
        panels=3,
    ),
    "small": Scale(
        shape=(48, 48, 12),
        teacher_cases=30,
        student_cases=20,
        test_cases=12,
        labelled=5,
        good=3,
        swapped=1,
        untrained=1,
        teacher_steps=400,
        random_reward=True,
        panels=6,
    ),
}


def run(job: DemoJob) -> DemoResult:
    """Make the data, train everything, predict the test cases, evaluate, write the report."""
    demo = Demo(job, SCALES[job.preset])
    demo.write_data()
    demo.train_teachers()
    demo.extract()
    demo.train_students()
    demo.evaluate()
    return demo.result()


@dataclass(frozen=True)
class Student:
    """One row of students: its config beside the shared one, and what it stands for."""

    key: str
    name: str
    role: str
    values: Mapping[str, Any]


class Demo:
    """The stages of one demonstration, each in a folder of its own."""

    def __init__(self, job: DemoJob, scale: Scale) -> None:
        self.job, self.scale, self.folder = job, scale, job.folder
        self.evaluations: dict[str, Evaluation] = {}
        self.predictions: dict[str, Path] = {}
        self.teacher_names = [f"teacher_{k}" for k in range(scale.good)]
        self.spoilt: dict[str, str] = {}
        for _ in range(scale.swapped):
            self._spoil(SWAPPED)
        for _ in range(scale.untrained):
            self._spoil(UNTRAINED)
        self.students = self._students()

    def _spoil(self, how: str) -> None:
        name = f"teacher_{len(self.teacher_names)}"
        self.teacher_names.append(name)
        self.spoilt[name] = how

    def _students(self) -> list[Student]:
        uniform = {"weighting": {"mode": "reinforce", "prior": "uniform"}}
        found = [
            Student("supervised", "student, labels only", "baseline", {}),
            Student("method", "student, graft", "method", {"weighting": {"mode": "reinforce"}}),
            Student("uniform", "student, all teachers equal", "control", {"weighting": {"mode": "uniform"}}),
        ]
        if self.scale.random_reward:
            values = {**uniform, "agent": {"random_reward": True}}
            found.append(Student("random", "student, agent on noise", "control", values))
        return found

    # -- stages -------------------------------------------------------------------------------------

    def write_data(self) -> None:
        """Write the two hospitals; hospital B brings the test cases."""
        scale, say = self.scale, self.job.say
        say(
            f"data: {scale.teacher_cases} cases in hospital A, {scale.student_cases} in hospital B "
            f"({scale.labelled} with labels), {scale.test_cases} for the test"
        )
        sizes: dict[str, Any] = {"shape": scale.shape, "spacing": (0.7, 0.7, 3.0)}
        a, b = self.folder / "hospital_a", self.folder / "hospital_b"
        write_prostate(a, cases=scale.teacher_cases, test_cases=0, seed=10 * self.job.seed + 1, **sizes)
        write_prostate(
            b, cases=scale.student_cases, test_cases=scale.test_cases, seed=10 * self.job.seed + 2, **sizes
        )
        if scale.swapped:
            swapped = self.folder / "hospital_a_swapped"
            shutil.copytree(a, swapped)
            for path in sorted((swapped / "labelsTr").iterdir()):
                label = read_volume(path, kind="label")
                write_volume(path, np.array([0, 2, 1, 1], dtype=np.uint8)[label.data], label, kind="label")

    def train_teachers(self) -> None:
        """Train the teachers, spoilt ones included; each is an ordinary run."""
        for number, name in enumerate(self.teacher_names):
            how = self.spoilt.get(name, "")
            self.job.say(f"teacher {number + 1} of {len(self.teacher_names)}" + (f": {how}" if how else ""))
            root = "hospital_a_swapped" if how == SWAPPED else "hospital_a"
            steps = 1 if how == UNTRAINED else self.scale.teacher_steps
            values = {
                "data": {"root": str(self.folder / root), "fold": number},
                "train": {
                    **TUNED["train"],
                    "max_steps": steps,
                    "seed": self.job.seed + number,
                    "validate_every": steps,
                },
            }
            self._fit(values, self.folder / "teachers" / name)

    def extract(self) -> None:
        """Write what every teacher says about the images of hospital B."""
        self.job.say("features of the teachers on the images of hospital B")
        layers = [Layer("demo", self._student_values({}))]
        resolved = resolve_method(self.job.manager, "graft", preset=self.job.preset, layers=layers)
        found = teachers.find_teachers(self.folder / "teachers")
        teachers.extract(self.job.manager, resolved.config, found, self.folder / "features")

    def train_students(self) -> None:
        """Train the baseline, the method and its controls on the same cases with the same seed."""
        for student in self.students:
            self.job.say(student.name)
            values = dict(student.values)
            if student.key != "supervised":
                values["teachers"] = {"features": [str(self.folder / "features")]}
            self._fit(self._student_values(values), self._run_of(student))

    def evaluate(self) -> None:
        """Predict the test cases with everything and compare with their references."""
        self.job.say("prediction and evaluation of the test cases")
        for student in self.students:
            self._predict(student.key, [self._run_of(student)])
        runs = [self.folder / "teachers" / name for name in self.teacher_names]
        self._predict("ensemble", runs)
        for name, path in zip(self.teacher_names, runs, strict=True):
            self._predict(name, [path])
        baseline = self.predictions["supervised"]
        reference = self.folder / "hospital_b" / "labelsTs"
        for key, folder in self.predictions.items():
            self.evaluations[key] = evaluate_folders(
                folder,
                reference,
                labels=REGIONS,
                metrics=("dice", "hd95"),
                ci=key == "method",
                compare=baseline if key == "method" else None,
                resamples=2000,
            )

    # -- the outcome ---------------------------------------------------------------------------------

    def result(self) -> DemoResult:
        """Build the table and the report."""
        columns = ["Dice prostate", "Dice cancer", "mean Dice"]
        rows: list[tuple[str, str, Sequence[float]]] = [
            (student.name, student.role, self._scores(student.key)) for student in self.students
        ]
        good = [name for name in self.teacher_names if name not in self.spoilt]
        best = max(good, key=lambda name: self._scores(name)[2])
        rows.append(("mean of all teachers", "baseline", self._scores("ensemble")))
        rows.append(("best single teacher", "baseline", self._scores(best)))
        notes = self._notes()
        report = self._report(columns, rows, notes)
        return DemoResult(columns=columns, rows=rows, report=report, notes=notes)

    def _notes(self) -> list[str]:
        spoilt = "; ".join(f"{name} {how}" for name, how in self.spoilt.items())
        weights = self.last_weights("method", LOGITS)
        share = sum(weights.get(name, 0.0) for name in self.spoilt)
        equal = len(self.spoilt) / len(self.teacher_names)
        return [
            f"Every student saw the same {self.scale.labelled} labelled cases for the same number of steps; "
            f"all numbers are means over {self.scale.test_cases} test cases that no stage has seen.",
            f"Spoilt on purpose: {spoilt}. With equal weights they would have {equal:.0%} of the weight; "
            f"the method left them {share:.0%} on the logits.",
            "These are synthetic images and one seed: the table shows that every part works, "
            "not how well the method does on patients.",
        ]

    def last_weights(self, key: str, kind: str) -> dict[str, float]:
        """Mean weight of each teacher over the last quarter of a student's run."""
        rows = [row for row in self._records(key) if f"weights_{kind}/teacher_0" in row]
        rows = rows[-max(1, len(rows) // 4) :]
        return {
            name: sum(float(row[f"weights_{kind}/{name}"]) for row in rows) / len(rows)
            for name in (self.teacher_names if rows else ())
        }

    def _report(
        self, columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[float]]], notes: Sequence[str]
    ) -> Path:
        sections = [
            Section("Result", result_table(columns, rows) + paragraphs(notes), _RESULT),
            Section("The teachers", self._teacher_table(), _TEACHERS),
            Section("Which teachers the student listened to", self._weight_curves(), _WEIGHTS),
            Section("How training went", self._training_curves(), _TRAINING),
            *evaluation_sections(self.evaluations["method"]),
            Section("Test cases", self._panels(), _PANELS),
            Section("Do it yourself", paragraphs(_COMMANDS)),
        ]
        facts = {
            "teachers": f"{len(self.teacher_names)}, {len(self.spoilt)} of them spoilt",
            "labelled cases": self.scale.labelled,
            "test cases": self.scale.test_cases,
            "preset": self.job.preset,
            "seed": self.job.seed,
        }
        title = "graft: one student from many teachers"
        return write_page(self.folder / "report.html", title, sections, subtitle=_SUBTITLE, facts=facts)

    def _teacher_table(self) -> str:
        weights = {kind: self.last_weights("method", kind) for kind in ("neg1", LOGITS)}
        table = []
        for name in self.teacher_names:
            scores = self._scores(name)
            shares = [weights[kind].get(name, math.nan) for kind in weights]
            table.append([name, self.spoilt.get(name, "trained properly"), *scores[:2], *shares])
        heads = [
            "teacher",
            "history",
            "Dice prostate",
            "Dice cancer",
            "weight on features",
            "weight on logits",
        ]
        return simple_table(heads, table)

    def _weight_curves(self) -> str:
        shown = []
        for student in self.students:
            for row in self._records(student.key):
                found = {
                    f"{student.key}: {_KINDS[kind]}/{name}": row[f"weights_{kind}/{name}"]
                    for kind in _KINDS
                    for name in self.teacher_names
                    if student.key in ("method", "random") and f"weights_{kind}/{name}" in row
                }
                if found:
                    shown.append({"step": row["step"], **found})
        return curves(shown)

    def _training_curves(self) -> str:
        wanted = {
            "loss_supervised": "loss against labels",
            "loss_features": "loss against features",
            "loss_logits": "loss against logits",
            "val_dice": "validation Dice",
            "reward": "reward",
            "entropy_neg1": "entropy of the weights",
        }
        shown = []
        for student in self.students:
            for row in self._records(student.key):
                found = {
                    f"{wanted[key]}/{student.key}": row[key] for key in wanted if row.get(key) is not None
                }
                if found:
                    shown.append({"step": row["step"], **found})
        return curves(shown)

    def _panels(self) -> str:
        dataset = open_dataset(self.folder / "hospital_b")
        panels = {}
        for case in dataset.test_cases[: self.scale.panels]:
            image, label = load_case(dataset, case, with_label=True)
            if label is None:
                continue
            maps = {"reference": label.data[0]}
            for name, key in (("graft", "method"), ("labels only", "supervised")):
                maps[name] = read_volume(self.predictions[key] / f"{case.id}.nii.gz", kind="label").data[0]
            panels[case.id] = overlay_panel(
                dict(zip(dataset.channel_names, image.data, strict=True)),
                maps,
                title=case.id,
                affine=image.affine,
                names={"prostate": 1, "cancer": 2, "significant cancer": 3},
            )
        return gallery(panels)

    # -- helpers --------------------------------------------------------------------------------------

    def _student_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "data": {"root": str(self.folder / "hospital_b"), "fold": 0},
            "split": {"labelled": self.scale.labelled},
            "train": {"seed": self.job.seed, **TUNED["train"]},
            "distill": TUNED["distill"],
            **values,
        }

    def _fit(self, values: Mapping[str, Any], run_dir: Path) -> None:
        merged = {**values, "train": {**values["train"], "threads": self.job.threads}}
        job = build_train_job(
            self.job.manager, "graft", merged, run_dir, preset=self.job.preset, command=self.job.command
        )
        with job.runtime() as rt:
            train.fit(rt, job.config, data.load(rt, job.config))

    def _predict(self, key: str, runs: Sequence[Path]) -> None:
        folder = self.folder / "predictions" / key
        predict.run(
            PredictJob(
                method="graft",
                inputs=self.folder / "hospital_b",
                output=folder,
                checkpoints=[find_checkpoint(path) for path in runs],
                manager=self.job.manager,
                overlap=0.25,
                threads=self.job.threads,
                precision="bf16",
                command=self.job.command,
            )
        )
        self.predictions[key] = folder

    def _run_of(self, student: Student) -> Path:
        return self.folder / "students" / student.key

    def _records(self, key: str) -> list[dict[str, Any]]:
        return list(RunFolder.open(self.folder / "students" / key, lock=False).records())

    def _scores(self, key: str) -> list[float]:
        """Mean Dice of gland and cancer over the test cases, and the mean of both."""
        summary = self.evaluations[key].summary
        values = [float(summary[name]["dice"].mean) for name in REGIONS]
        return [*values, sum(values) / len(values)]


_KINDS = {"neg1": "weights on features", LOGITS: "weights on logits"}
_SUBTITLE = (
    "Hospital A trained several networks and shares only them. Hospital B has few labelled images. One new "
    "network, the student, learns from both, and at the end works alone, at the cost of one network."
)
_RESULT = (
    "Dice is the overlap with the reference, from 0 to 1. The baselines are what one has without the method; "
    "the controls are distilled by the same code, but without knowing which teachers are good."
)
_TEACHERS = (
    "Test Dice of each teacher, which the method never sees, beside the weight that the method gave it at "
    "the end. Answers (logits) and features are judged apart: a teacher that learned swapped names answers "
    "wrongly, so its logits should get little weight, but it still sees well, so its features may be used."
)
_WEIGHTS = (
    "Share of each teacher over the steps of training. The agent draws the weights at random around a mean "
    "that begins at what a quick measurement on the labelled cases says, and moves with the rewards."
)
_TRAINING = (
    "The reward is how much the student improved on the labelled images of a step through the one update "
    "that the agent's weights caused. Validation cases are learned from by nobody."
)
_PANELS = "Scroll through the slices of some test cases: images, reference, and two predictions."
_COMMANDS = (
    "medrl data synth prostate DATA writes such images; medrl train graft --help lists every option.",
    "medrl graft train-teachers --data DATA -o runs/teachers",
    "medrl graft extract-features --data DATA --teachers runs/teachers -o features",
    "medrl train graft --data DATA --teachers features --labelled 5 --weighting reinforce",
    "medrl predict graft -i SCANS -o OUT --model runs/RUN",
)
