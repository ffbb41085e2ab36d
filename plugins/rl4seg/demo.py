"""The demonstration: a network meets images of another scanner, without labels, and learns from a reward.

The source is a synthetic scanner with labels. The target is another one, with haze, shadows and coarser
speckle, and no labels in training. Controls show what of the gain is due to reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medrl.core.config import Layer, resolve_method
from medrl.core.jobs import DemoJob, DemoResult
from medrl.core.phantoms.echo import write_echo
from medrl.core.report import Section, paragraphs

from .compare import catalogue
from .compare.outcome import Outcome
from .compare.running import Study
from .compare.work import merged
from .scoring import VALID

SHIFT = 1.0
"""Distance of the target from the source; the phantoms go from 0 to 1."""

COLUMNS = {"dice": "Dice", VALID: "valid masks", "hd95": "HD95 (mm)"}


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        source: Labelled source images.
        target: Unlabelled target images.
        test: Target test images.
        methods: Keys of the rows.
        seeds: Number of seeds.
        judge: Whether to measure rewards and confidences.
        shape: Pixels of the images.
        values: Config laid over the preset.
    """

    source: int
    target: int
    test: int
    methods: tuple[str, ...]
    seeds: int
    judge: bool
    values: dict[str, Any]
    shape: tuple[int, int] = (64, 64)


SCALES = {
    "smoke": Scale(
        source=80,
        target=80,
        test=32,
        methods=("source", "style", "style-posthoc-both", "style-ppo", "style-ppo-random"),
        seeds=1,
        judge=False,
        values={
            "source": {"steps": 150},
            "style": {"steps": 120},
            "corrector": {"steps": 260},
            "pairs": {"count": 640},
            "reward": {"steps": 100},
            "ppo": {"steps": 24, "inner_steps": 3, "warmup": 4},
        },
    ),
    "small": Scale(
        source=160,
        target=320,
        test=64,
        methods=(
            "source",
            "bn",
            "style",
            "style-steps",
            "style-self-refined",
            "style-posthoc-both",
            "style-ppo",
            "style-ppo-random",
        ),
        seeds=1,
        judge=True,
        values={},
    ),
}


def run(job: DemoJob, scale: Scale | None = None) -> DemoResult:
    """Write two scanners, train everything, score it on target test images, write the report.

    Args:
        job: The job.
        scale: Another size than that of the job's preset.
    """
    scale = scale or SCALES[job.preset]
    source, target = write_data(job, scale)
    base = merged(
        {
            "data": {"root": str(source)},
            "target": {"root": str(target)},
            "train": {"seed": job.seed, "threads": job.threads, "device": "cpu"},
        },
        scale.values,
    )

    def resolve(more: Sequence[Layer]) -> Any:
        return resolve_method(job.manager, "rl4seg", preset=job.preset, layers=[Layer("demo", base), *more])

    study = Study(
        job.manager,
        resolve,
        job.folder / "study",
        catalogue.chosen(scale.methods),
        seeds=scale.seeds,
        say=job.say,
        command=job.command,
        judge=scale.judge,
    )
    for one in study.seeds.values():
        study.work(one)
    outcome = study.collect()
    outcome.write(job.folder / "study" / "results.json")
    notes = notes_of(outcome, scale)
    report = study.write_report(
        outcome,
        title="rl4seg: another scanner, no labels",
        subtitle=_SUBTITLE,
        more=[
            Section("What this shows", paragraphs(notes)),
            Section("Do it yourself", paragraphs(_COMMANDS)),
        ],
    )
    rows = [
        (
            row.title + (f", from the {row.start} actor" if row.role == "method" else ""),
            "baseline" if row.role == "bound" else row.role,
            [row.numbers[name].mean for name in COLUMNS],
        )
        for row in outcome.rows()
        if "@" not in row.key
    ]
    return DemoResult(columns=list(COLUMNS.values()), rows=rows, report=report, notes=notes)


def write_data(job: DemoJob, scale: Scale) -> tuple[Path, Path]:
    """Write the labelled source and the target, whose training labels nobody reads."""
    job.say(
        f"data: {scale.source} labelled images of one scanner, {scale.target} without labels and "
        f"{scale.test} for the test of another"
    )
    source, target = job.folder / "source", job.folder / "target"
    write_echo(source, cases=scale.source, test_cases=0, seed=10 * job.seed + 1, shape=scale.shape)
    write_echo(
        target,
        cases=scale.target,
        test_cases=scale.test,
        seed=10 * job.seed + 2,
        shape=scale.shape,
        shift=SHIFT,
    )
    return source, target


def notes_of(outcome: Outcome, scale: Scale) -> list[str]:
    """Say what the numbers mean, and what they do not."""
    found = {key: next(iter(by.values())) for key, by in outcome.scores.items()}

    def words(key: str) -> str:
        return f"Dice {found[key].mean():.3f}, {found[key].mean(VALID):.0%} plausible"

    notes = [
        f"On {scale.test} test images that no stage has seen: without adaptation {words('source')}; with "
        f"rl4seg {words('style-ppo')}. Plausible masks keep every anatomical rule.",
        f"rl4seg starts from the style-tuned actor ({words('style')}). The same PPO on a reward of noise "
        f"ends at {words('style-ppo-random')}: the difference is what the reward taught.",
    ]
    if "style-posthoc-both" in found:
        notes.append(
            f"Reward net and corrector as post-processing, without training a policy: "
            f"{words('style-posthoc-both')}. rl4seg puts what they know into one network."
        )
    notes.append(
        "These are synthetic images and one seed: the table shows that every part works, not how well the "
        "method does on patients."
    )
    return notes


_SUBTITLE = (
    "A segmentation network was trained on one synthetic scanner. Images of another scanner have no labels. "
    "A reward net, trained on the source, judges label maps on the new images, and PPO improves the network "
    "against that judgement."
)
_COMMANDS = (
    "medrl data synth echo SOURCE; medrl data synth echo TARGET --set shift=1.0 writes such images.",
    "medrl train rl4seg --data SOURCE --target TARGET --preset small -o runs/adapted",
    "medrl predict rl4seg -i IMAGES -o OUT --model runs/adapted",
    "medrl rl4seg compare --data SOURCE --target TARGET --preset small -o study --methods core --seeds 3",
    "medrl rl4seg check-masks OUT",
)
