"""The stages of a demonstration, each in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.checkpoint import find_checkpoint
from medrl.core.config import Layer, resolve_method
from medrl.core.evaluation import Evaluation, evaluate_folders
from medrl.core.jobs import DemoJob, PredictJob, build_train_job
from medrl.core.phantoms.prostate import write_prostate
from medrl.core.runlog import RunFolder
from medrl.core.volume import read_volume, write_volume
from medrl.plugins.graft import data, predict, teachers, train

from .scales import REGIONS, SWAPPED, TUNED, UNTRAINED, Scale, Student


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

    def records(self, key: str) -> list[dict[str, Any]]:
        """Records of a student's run."""
        return list(RunFolder.open(self.folder / "students" / key, lock=False).records())

    def scores(self, key: str) -> list[float]:
        """Mean Dice of gland and cancer over the test cases, and the mean of both."""
        summary = self.evaluations[key].summary
        values = [float(summary[name]["dice"].mean) for name in REGIONS]
        return [*values, sum(values) / len(values)]
