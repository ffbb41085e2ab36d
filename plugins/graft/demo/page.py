"""The outcome of a demonstration: its table, its notes and its report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from medrl.core.dataset import load_case, open_dataset
from medrl.core.jobs import DemoResult
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
from medrl.core.volume import read_volume
from medrl.plugins.graft.features import LOGITS

from .stages import Demo


class Page:
    """Reads what the stages left.

    Args:
        demo: Whose stages are done.
    """

    def __init__(self, demo: Demo) -> None:
        self.demo = demo

    def result(self) -> DemoResult:
        """Build the table and the report."""
        columns = ["Dice prostate", "Dice cancer", "mean Dice"]
        rows: list[tuple[str, str, Sequence[float]]] = [
            (student.name, student.role, self.demo.scores(student.key)) for student in self.demo.students
        ]
        good = [name for name in self.demo.teacher_names if name not in self.demo.spoilt]
        best = max(good, key=lambda name: self.demo.scores(name)[2])
        rows.append(("mean of all teachers", "baseline", self.demo.scores("ensemble")))
        rows.append(("best single teacher", "baseline", self.demo.scores(best)))
        notes = self._notes()
        report = self._report(columns, rows, notes)
        return DemoResult(columns=columns, rows=rows, report=report, notes=notes)

    def _notes(self) -> list[str]:
        spoilt = "; ".join(f"{name} {how}" for name, how in self.demo.spoilt.items())
        weights = self.last_weights("method", LOGITS)
        share = sum(weights.get(name, 0.0) for name in self.demo.spoilt)
        scale = self.demo.scale
        equal = len(self.demo.spoilt) / len(self.demo.teacher_names)
        return [
            f"Every student saw the same {scale.labelled} labelled cases for the same number of steps; "
            f"all numbers are means over {scale.test_cases} test cases that no stage has seen.",
            f"Spoilt on purpose: {spoilt}. With equal weights they would have {equal:.0%} of the weight; "
            f"the method left them {share:.0%} on the logits.",
            "These are synthetic images and one seed: the table shows that every part works, "
            "not how well the method does on patients.",
        ]

    def last_weights(self, key: str, kind: str) -> dict[str, float]:
        """Mean weight of each teacher over the last quarter of a student's run."""
        rows = [row for row in self.demo.records(key) if f"weights_{kind}/teacher_0" in row]
        rows = rows[-max(1, len(rows) // 4) :]
        return {
            name: sum(float(row[f"weights_{kind}/{name}"]) for row in rows) / len(rows)
            for name in (self.demo.teacher_names if rows else ())
        }

    def _report(
        self, columns: Sequence[str], rows: Sequence[tuple[str, str, Sequence[float]]], notes: Sequence[str]
    ) -> Path:
        sections = [
            Section("Result", result_table(columns, rows) + paragraphs(notes), _RESULT),
            Section("The teachers", self._teacher_table(), _TEACHERS),
            Section("Which teachers the student listened to", self._weight_curves(), _WEIGHTS),
            Section("How training went", self._training_curves(), _TRAINING),
            *evaluation_sections(self.demo.evaluations["method"]),
            Section("Test cases", self._panels(), _PANELS),
            Section("Do it yourself", paragraphs(_COMMANDS)),
        ]
        facts = {
            "teachers": f"{len(self.demo.teacher_names)}, {len(self.demo.spoilt)} of them spoilt",
            "labelled cases": self.demo.scale.labelled,
            "test cases": self.demo.scale.test_cases,
            "preset": self.demo.job.preset,
            "seed": self.demo.job.seed,
        }
        title = "graft: one student from many teachers"
        return write_page(self.demo.folder / "report.html", title, sections, subtitle=_SUBTITLE, facts=facts)

    def _teacher_table(self) -> str:
        weights = {kind: self.last_weights("method", kind) for kind in ("neg1", LOGITS)}
        table = []
        for name in self.demo.teacher_names:
            scores = self.demo.scores(name)
            shares = [weights[kind].get(name, math.nan) for kind in weights]
            table.append([name, self.demo.spoilt.get(name, "trained properly"), *scores[:2], *shares])
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
        for student in self.demo.students:
            for row in self.demo.records(student.key):
                found = {
                    f"{student.key}: {_KINDS[kind]}/{name}": row[f"weights_{kind}/{name}"]
                    for kind in _KINDS
                    for name in self.demo.teacher_names
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
        for student in self.demo.students:
            for row in self.demo.records(student.key):
                found = {
                    f"{wanted[key]}/{student.key}": row[key] for key in wanted if row.get(key) is not None
                }
                if found:
                    shown.append({"step": row["step"], **found})
        return curves(shown)

    def _panels(self) -> str:
        dataset = open_dataset(self.demo.folder / "hospital_b")
        panels = {}
        for case in dataset.test_cases[: self.demo.scale.panels]:
            image, label = load_case(dataset, case, with_label=True)
            if label is None:
                continue
            maps = {"reference": label.data[0]}
            for name, key in (("graft", "method"), ("labels only", "supervised")):
                maps[name] = read_volume(self.demo.predictions[key] / f"{case.id}.nii.gz", kind="label").data[
                    0
                ]
            panels[case.id] = overlay_panel(
                dict(zip(dataset.channel_names, image.data, strict=True)),
                maps,
                title=case.id,
                affine=image.affine,
                names={"prostate": 1, "cancer": 2, "significant cancer": 3},
            )
        return gallery(panels)


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
