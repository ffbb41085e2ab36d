"""The demonstration: which lines of k-space does a heart need, and who knows best?

Synthetic hearts whose k-space centre is displaced at random, so that no fixed mask fits all. A reward model,
a policy and its blind twin are trained and compared with fixed rules and with an oracle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medrl.core.jobs import DemoJob, DemoResult, build_train_job
from medrl.core.phantoms.cardiac import write_cardiac

from . import running, study
from .evaluate import FULL

METHOD = "policy"
BLIND = "blind"


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        cases: Patients to train on.
        test_cases: Patients to test on.
        shape: Pixels.
        slices: Of a frame.
        shift: Columns up to which the k-space centre is displaced.
        against: Rivals.
        values: Config laid over the preset.
    """

    cases: int
    test_cases: int
    shape: tuple[int, int]
    slices: int
    shift: float
    against: tuple[str, ...]
    values: dict[str, Any] = field(default_factory=dict)


UPRIGHT = {"seg": {"augment": {"flip": 0.0}}}
"""The synthetic hearts all lie alike."""
SCALES = {
    "smoke": Scale(
        cases=12,
        test_cases=6,
        shape=(32, 32),
        slices=3,
        shift=3.0,
        against=("random", "low-to-high", "fixed", "greedy-oracle"),
        values=UPRIGHT,
    ),
    "small": Scale(
        cases=40,
        test_cases=16,
        shape=(64, 64),
        slices=4,
        shift=4.0,
        against=("random", "equispaced", "low-to-high", "variable-density", "fixed", "greedy-oracle"),
        values=UPRIGHT,
    ),
}
ROLES = {METHOD: "method", BLIND: "control", "greedy-oracle": "control", FULL: "control"}
NAMES = {METHOD: "kspace: policy", BLIND: "blind twin, trained likewise"}


def run(job: DemoJob) -> DemoResult:
    """Write hearts, train everything, measure it on test patients, write the report."""
    scale = SCALES[job.preset]
    job.say(f"data: {scale.cases} patients to train on, {scale.test_cases} for the test")
    root = job.folder / "data"
    write_cardiac(
        root,
        cases=scale.cases,
        test_cases=scale.test_cases,
        seed=job.seed,
        shape=scale.shape,
        slices=scale.slices,
        shift_k=scale.shift,
    )
    reward = job.folder / "reward"
    job.say("reward model: segmentation from few lines")
    train(job, scale, root, reward, {"stage": "reward"})
    for name, title in ((METHOD, "policy: warm start, then PPO"), (BLIND, "blind twin")):
        job.say(title)
        values = {"inputs": {"reward": str(reward)}, "blind": name == BLIND}
        train(job, scale, root, job.folder / name, values)
    job.say("evaluation on test patients")
    found = study.run(
        job.manager,
        [job.folder / METHOD, job.folder / BLIND],
        job.folder / "evaluation",
        against=scale.against,
        device="cpu",
        threads=job.threads,
        seed=job.seed,
    )
    columns, rows = table(found.summary)
    return DemoResult(columns=columns, rows=rows, report=found.report, notes=notes(found.summary))


def train(job: DemoJob, scale: Scale, root: Path, folder: Path, values: Mapping[str, Any]) -> None:
    """Train one run of the demonstration."""
    base: dict[str, Any] = {
        **scale.values,
        "data": {"root": str(root)},
        "train": {"seed": job.seed, "threads": job.threads, "device": "cpu"},
    }
    running.run(
        build_train_job(
            job.manager, "kspace", {**base, **values}, folder, preset=job.preset, command=job.command
        )
    )


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, str, Sequence[float]]]]:
    """Dice and SSIM of slices at the fewest and at the most lines."""
    policies = summary["policies"]
    budgets = sorted(int(budget) for budget in policies[METHOD]["budgets"])
    shown = [str(budgets[0]), str(budgets[-1])]
    lines = [policies[METHOD]["budgets"][budget]["lines"] for budget in shown]
    columns = [f"{name}, {count:g} lines" for count in lines for name in ("Dice", "SSIM")]
    rows: list[tuple[str, str, Sequence[float]]] = []
    for name, entry in policies.items():
        values = [
            entry["budgets"].get(budget, entry["budgets"].get("0"))[key]["mean"]
            for budget in shown
            for key in ("slice_dice", "slice_ssim")
        ]
        rows.append((NAMES.get(name, entry["title"]), ROLES.get(name, "baseline"), values))
    return columns, rows


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Say what the numbers mean, and what they do not."""
    policies = summary["policies"]
    fewest = str(min(int(budget) for budget in policies[METHOD]["budgets"]))
    full = policies[FULL]["budgets"]["0"]["slice_dice"]["mean"]
    own = policies[METHOD]["budgets"][fewest]
    lines = policies[FULL]["budgets"]["0"]["lines"]
    return [
        f"With {own['lines']:g} of {lines:g} lines the policy has a Dice of "
        f"{own['slice_dice']['mean']:.3f}; all "
        f"lines give {full:.3f}.",
        "The blind twin is trained likewise but sees no measurement, and so is a fixed mask: what the policy "
        "has beyond it comes from looking. The oracle knows the labels.",
        *summary["notes"],
        "These are synthetic hearts and one seed: the table shows that every part works, not how well the "
        "method does on patients.",
    ]
