"""The demonstration: a network meets beating hearts of another scanner, without labels.

The source is a synthetic scanner with labels. The target is another one, with haze, shadows and coarser
speckle, and no labels in training. The control is the same PPO on a reward of noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.jobs import DemoJob, DemoResult, build_train_job
from medrl.core.phantoms.echo import write_echo_sequences
from medrl.core.report import Section, gallery, overlay_panel, paragraphs, result_table, write_page

from . import loop, parts, testing
from .config import Rl4seg3dConfig
from .domains import load_domains, test_sequences
from .scoring import segment

SHIFT = 1.0
"""Distance of the target from the source."""
COLUMNS = {
    "dice": "Dice",
    "anat_valid_frames": "valid frames",
    "temporal_errors": "frames that jump",
    "hd": "HD (mm)",
}


@dataclass(frozen=True)
class Scale:
    """Size of a demonstration.

    Attributes:
        source: Labelled source sequences.
        target: Unlabelled target sequences.
        test: Target test sequences.
        frames: Of each sequence.
        size: Pixels of the frames.
        values: Config laid over the preset.
    """

    source: int
    target: int
    test: int
    frames: int
    size: tuple[int, int] = (64, 64)
    values: Mapping[str, Any] = field(default_factory=dict)


SCALES = {
    "smoke": Scale(source=16, target=16, test=4, frames=12),
    "small": Scale(source=40, target=60, test=12, frames=24),
}


def run(job: DemoJob, scale: Scale | None = None) -> DemoResult:
    """Write two scanners, train everything, score it on target test sequences, write the report.

    Args:
        job: The job.
        scale: Another size than that of the job's preset.
    """
    scale = scale or SCALES[job.preset]
    source, target = write_data(job, scale)
    values = {
        **scale.values,
        "data": {**scale.values.get("data", {}), "root": str(source)},
        "target": {"root": str(target)},
        "train": {
            **scale.values.get("train", {}),
            "seed": job.seed,
            "threads": job.threads,
            "device": "cpu",
        },
    }
    job.say("training: source actor, style-tuned actor, corrector, pairs, reward nets, PPO")
    adapted = _train(job, values, job.folder / "runs" / "adapted")
    job.say("control: the same PPO on a reward of noise")
    (style,) = (adapted / "stages").glob("*_style")
    (first,) = (adapted / "stages").glob("*_source")
    noise = {"reward": {"name": "rl4seg3d.random"}, "inputs": {"source": str(first), "style": str(style)}}
    control = _train(job, {**values, **noise}, job.folder / "runs" / "control")
    found, other = (_summary(place) for place in (adapted, control))
    rows = [
        ("source actor", "baseline", _row(found["source"])),
        ("style-tuned actor", "baseline", _row(found["style"])),
        ("rl4seg3d, from the style-tuned actor", "method", _row(found["iteration_1"])),
        ("the same on a reward of noise", "control", _row(other["iteration_1"])),
    ]
    notes = notes_of(scale, rows)
    columns = list(COLUMNS.values())
    report = write_page(
        job.folder / "report.html",
        "rl4seg3d: another scanner, no labels",
        [
            Section("Test sequences of the new scanner", result_table(columns, rows)),
            Section("What this shows", paragraphs(notes)),
            Section("Sequences", _panels(job, values, adapted), "Scroll through the frames."),
            Section("Do it yourself", paragraphs(_COMMANDS)),
        ],
        subtitle=_SUBTITLE,
    )
    return DemoResult(columns=columns, rows=rows, report=report, notes=notes)


def write_data(job: DemoJob, scale: Scale) -> tuple[Path, Path]:
    """Write the labelled source and the target, whose training labels nobody reads."""
    job.say(
        f"data: {scale.source} labelled sequences of one scanner, {scale.target} without labels and "
        f"{scale.test} for the test of another"
    )
    source, target = job.folder / "source", job.folder / "target"
    shared: dict[str, Any] = {"frames": scale.frames, "size": scale.size}
    write_echo_sequences(source, cases=scale.source, test_cases=0, seed=10 * job.seed + 1, **shared)
    write_echo_sequences(
        target,
        cases=scale.target,
        test_cases=scale.test,
        seed=10 * job.seed + 2,
        shift=SHIFT,
        **shared,
    )
    return source, target


def notes_of(scale: Scale, rows: list[tuple[str, str, list[float]]]) -> list[str]:
    """Say what the numbers mean, and what they do not."""
    before, _, after, noise = (numbers for _, _, numbers in rows)
    return [
        f"On {scale.test} test sequences that no stage has seen: without adaptation Dice {before[0]:.3f} and "
        f"{before[1]:.0%} valid frames, with rl4seg3d {after[0]:.3f} and {after[1]:.0%}. A valid frame keeps "
        "every anatomical rule; a frame jumps where an attribute does not fit its neighbours.",
        f"The same PPO on a reward of noise ends at Dice {noise[0]:.3f} and {noise[1]:.0%} valid frames: "
        f"beyond the style-tuned start, the learned rewards taught {after[0] - noise[0]:+.3f} Dice and "
        f"{100 * (after[1] - noise[1]):+.0f} points of valid frames.",
        "These are synthetic sequences and one seed: the table shows that every part works, not how well the "
        "method does on patients.",
    ]


def _train(job: DemoJob, values: Mapping[str, Any], run_dir: Path) -> Path:
    loop.run(
        build_train_job(
            job.manager, "rl4seg3d", values, run_dir, preset=job.preset, command=tuple(job.command)
        )
    )
    return run_dir


def _summary(run_dir: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((run_dir / testing.FILE).read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = content["summary"]
    return found


def _row(numbers: Mapping[str, Any]) -> list[float]:
    return [float(numbers[name]) for name in COLUMNS]


def _panels(job: DemoJob, values: Mapping[str, Any], run_dir: Path) -> str:
    """The first test sequences, with the labels of the actor before and after."""
    made = build_train_job(job.manager, "rl4seg3d", values, run_dir, preset=job.preset)
    cfg: Rl4seg3dConfig = made.config
    data = load_domains(cfg, job.manager)
    sequences = test_sequences(cfg, data)
    (first,) = (run_dir / "stages").glob("*_source")
    actors = {}
    for name, place in (("source actor", first), ("rl4seg3d", run_dir)):
        network = parts.actor_network(cfg, job.manager, channels=data.channels, classes=data.classes)
        parts.load_part(place, "actor", network, name)
        actors[name] = parts.as_actor(network, data.classes).eval()
    panels = {}
    for number in range(min(2, len(sequences))):
        frames = sequences.images[number].float() / 255.0
        labels = {name: segment(actor.logits, frames) for name, actor in actors.items()}
        if sequences.labels is not None:
            labels = {"reference": np.asarray(sequences.labels[number]), **labels}
        # Panels have the last row of the second axis on top, echo images the first.
        panels[sequences.ids[number]] = overlay_panel(
            frames[0].numpy()[:, ::-1],
            {name: mask[:, ::-1] for name, mask in labels.items()},
            title=sequences.ids[number],
            spacing=(*(float(step) for step in sequences.spacing_mm[number]), 1.0),
            names=data.label_names,
            axis=2,
        )
    return gallery(panels)


_SUBTITLE = (
    "A network for sequences was trained on one synthetic scanner. Sequences of another scanner have no "
    "labels. Reward nets, trained on the source, judge label maps on the new sequences, and PPO improves "
    "the network against that judgement."
)
_COMMANDS = (
    "medrl train rl4seg3d --data SOURCE --target TARGET --preset small -o runs/adapted",
    "medrl train rl4seg3d --data SOURCE --target TARGET -o runs/adapted --slurm slurm does one job a stage.",
    "medrl predict rl4seg3d -i SEQUENCES -o OUT --model runs/adapted",
)
