"""Sequences of a beating heart as a synthetic echo dataset, and the dataset as files ``(x, y, t)``."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError
from medrl.core.phantoms._files import write_nifti, write_record, write_whole
from medrl.core.validity import Rules, is_valid, load_rules
from medrl.core.validity.temporal import check_sequence

from .anatomy import ATRIUM, LABELS, Anatomy, draw_heart, rasterise
from .beating import Beat, CoherentNormals, draw_beat, heart_at
from .painting import Look, Style, draw_look, paint
from .writing import CHANNELS, DEPTH_MM, case_name, check_settings

_VERSION = 1
_TRIES = 200
_BEAT_S = 0.85
"""Time of one beat."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SequencePhantom:
    """One synthetic sequence.

    Attributes:
        image: ``(X, Y, T)`` uint8; across, depth, time.
        label: ``(X, Y, T)`` uint8 with the values of `LABELS`, and of `ATRIUM` if asked for.
        affine: ``(4, 4)`` voxel index to millimetres; 1 along time.
        beat: How the heart moves.
        glitches: Frames whose image was taken badly.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]
    beat: Beat
    glitches: tuple[int, ...] = ()

    @property
    def frame_time_s(self) -> float:
        """Time from frame to frame."""
        return _BEAT_S / self.beat.period


def make_sequence(
    seed: int,
    index: int,
    *,
    test: bool = False,
    size: tuple[int, int] = (64, 64),
    frames: int = 24,
    period: tuple[float, float] = (18.0, 26.0),
    shift: float = 0.0,
    shape_shift: float = 0.0,
    style: Style = "haze",
    atrium: bool = False,
    coherence: float = 0.8,
    glitches: float = 0.0,
) -> SequencePhantom:
    """Draw sequence `index` of a set; the same arguments give the same bytes.

    Every frame of the labels keeps the anatomical rules, and the sequence the temporal ones.

    Args:
        seed: Seed of the set.
        index: Number of the sequence, from 0.
        test: Draw from the test stream, which shares no heart with the training stream.
        size: ``(X, Y)`` pixels, at least 32 each.
        frames: T.
        period: Least and greatest number of frames of one beat.
        shift: Distance in [0, 1.25] from the look of the source, as in `make_case`.
        shape_shift: Distance in [0, 1] from its shapes.
        style: Kind of shift, as in `make_case`.
        atrium: Label the left atrium (3).
        coherence: Correlation of the speckle of one frame with that of the next, in [0, 1].
        glitches: Part of the frames that are taken with little gain and behind a broad shadow; the labels do
            not know of it.

    Raises:
        ConfigError: An argument is out of its range, or no sequence on this grid keeps the rules.
    """
    _check(size, frames, period, shift, shape_shift, style, coherence, glitches)
    domain = json.dumps([shift, shape_shift, style if shift else ""])
    entropy = [seed, int(test), index, _VERSION, zlib.crc32(f"sequence {domain}".encode())]
    shape_rng, look_rng, noise_rng, glitch_rng = (
        np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(entropy).spawn(4)
    )
    spacing = DEPTH_MM / max(size)
    beat, stack, label = _valid_beat(
        shape_rng, size, frames, period, shape_shift, spacing=spacing, atrium=atrium
    )
    look = draw_look(look_rng, stack[0], shift=shift, style=style)
    wrong = tuple(int(t) for t in np.flatnonzero(glitch_rng.random(frames) < glitches))
    normals = CoherentNormals(noise_rng, coherence)
    painted = []
    for number, anatomy in enumerate(stack):
        normals.next_frame()
        own = _spoiled(glitch_rng, look) if number in wrong else look
        painted.append(paint(normals, anatomy, own))
    return SequencePhantom(
        image=np.rint(np.stack(painted, axis=-1) * 255.0).astype(np.uint8),
        label=label,
        affine=np.diag((spacing, spacing, 1.0, 1.0)),
        beat=beat,
        glitches=wrong,
    )


def write_echo_sequences(
    root: Path,
    *,
    cases: int = 20,
    test_cases: int = 5,
    seed: int = 0,
    size: tuple[int, int] = (64, 64),
    frames: int = 24,
    period: tuple[float, float] = (18.0, 26.0),
    shift: float = 0.0,
    shape_shift: float = 0.0,
    style: Style = "haze",
    atrium: bool = False,
    coherence: float = 0.8,
    glitches: float = 0.0,
) -> Path:
    """Write sequences of beating hearts in nnU-Net raw layout and return the folder.

    Files and splits are those of `write_echo`, with time as the third axis; ``sequences.json`` has the time
    from frame to frame and the spoiled frames of every case. The folder appears whole or not at all. The
    arguments are those of `make_sequence`.

    Args:
        root: Folder to make; one that already holds this very dataset is left as it is.
        cases: Number of training sequences.
        test_cases: Number of test sequences, drawn from another stream of random numbers.
        seed: Seed of everything.
        size: ``(X, Y)`` pixels; the image is 154 mm deep or wide.
        frames: Of each sequence.
        period: Least and greatest number of frames of one beat.
        shift: Distance in [0, 1.25] from the look of the source.
        shape_shift: Distance in [0, 1] from its shapes.
        style: `haze` or `outside`.
        atrium: Label the left atrium.
        coherence: Of the speckle from frame to frame.
        glitches: Part of the frames that are spoiled.

    Raises:
        ConfigError: The arguments make no dataset.
        DataError: `root` holds something else, or cannot be written.
    """
    settings: dict[str, Any] = {
        "size": (int(size[0]), int(size[1])) if len(size) == 2 else tuple(size),
        "frames": int(frames),
        "period": (float(period[0]), float(period[1])),
        "shift": float(shift),
        "shape_shift": float(shape_shift),
        "style": style,
        "atrium": bool(atrium),
        "coherence": float(coherence),
        "glitches": float(glitches),
    }
    _check(**{name: value for name, value in settings.items() if name != "atrium"})
    if cases < 1 or test_cases < 0 or seed < 0:
        raise ConfigError(
            "echo phantom",
            why=f"cases={cases}, test_cases={test_cases}, seed={seed}",
            do="ask for at least one case; counts and seeds are not negative",
        )
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    description = {
        "name": "echo_sequences", "version": _VERSION, "cases": cases, "test_cases": test_cases,
        "seed": seed, **plain,
    }  # fmt: skip

    def write(draft: Path) -> None:
        facts: dict[str, Any] = {}
        for suffix, test, count in (("Tr", False, cases), ("Ts", True, test_cases)):
            images, labels = (draft / f"{kind}{suffix}" for kind in ("images", "labels"))
            for folder in (images, labels) if count else ():
                folder.mkdir(parents=True)
            for index in range(count):
                case = make_sequence(seed, index, test=test, **settings)
                name = case_name(index, test=test)
                write_nifti(images / f"{name}_0000.nii.gz", case.image, case.affine)
                write_nifti(labels / f"{name}.nii.gz", case.label, case.affine)
                facts[name] = {
                    "frame_time_s": round(case.frame_time_s, 6),
                    "frames_per_beat": round(case.beat.period, 3),
                    "glitches": list(case.glitches),
                }
        (draft / "sequences.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        record = {
            "name": "EchoSequencePhantom",
            "description": "synthetic apical echocardiography of medrl, beating; no patient data",
            "channel_names": {str(number): name for number, name in enumerate(CHANNELS)},
            "labels": {**LABELS, **(ATRIUM if atrium else {})},
            "numTraining": cases,
            "numTest": test_cases,
            "file_ending": ".nii.gz",
            "phantom": description,
        }
        write_record(draft, record)

    return write_whole(Path(root), description, write)


def _valid_beat(
    rng: np.random.Generator,
    size: tuple[int, int],
    frames: int,
    period: tuple[float, float],
    shape_shift: float,
    *,
    spacing: float,
    atrium: bool,
) -> tuple[Beat, list[Anatomy], NDArray[np.uint8]]:
    """Draw hearts and beats until the sequence of one keeps the anatomical and the temporal rules."""
    rules = _rules("echo_atrium" if atrium else "echo")
    for _ in range(_TRIES):
        heart = draw_heart(rng, shape_shift=shape_shift)
        beat = draw_beat(rng, period=period)
        stack = []
        for number in range(frames):
            anatomy = rasterise(heart_at(heart, beat, number), size)
            if not is_valid(_shown(anatomy, atrium=atrium), rules):
                break
            stack.append(anatomy)
        if len(stack) < frames:
            continue
        label = np.stack([_shown(anatomy, atrium=atrium) for anatomy in stack], axis=-1)
        if check_sequence(label, (spacing, spacing)).valid:
            return beat, stack, label
    raise ConfigError(
        "echo phantom",
        why=f"no beating heart on a grid of {size} pixels keeps the anatomical and temporal rules",
        do="choose a finer grid, or more frames for a beat",
    )


def _shown(anatomy: Anatomy, *, atrium: bool) -> NDArray[np.uint8]:
    label = anatomy.label if atrium else np.where(anatomy.label == ATRIUM["LA"], 0, anatomy.label)
    return np.asarray(label, dtype=np.uint8)


def _spoiled(rng: np.random.Generator, look: Look) -> Look:
    """The same view with little gain and a broad shadow."""
    direction = rng.uniform(-0.7, 0.7) * look.half_angle
    shadow = (float(direction), float(rng.uniform(0.12, 0.22)), 0.05, float(rng.uniform(20.0, 32.0)))
    return replace(look, gain=look.gain - float(rng.uniform(6.0, 14.0)), shadows=(*look.shadows, shadow))


@cache
def _rules(name: str) -> Rules:
    return load_rules(name)


def _check(
    size: tuple[int, ...],
    frames: int,
    period: tuple[float, float],
    shift: float,
    shape_shift: float,
    style: str,
    coherence: float,
    glitches: float,
) -> None:
    check_settings(size, shift, shape_shift, style)
    wrong = [
        f"frames is {frames}, expected 1 or more" if frames < 1 else "",
        "" if 4.0 <= period[0] <= period[1] else f"period is {list(period)}, expected two numbers from 4 up",
        *(
            "" if 0.0 <= value <= 1.0 else f"{name} is {value}, expected a number in [0, 1]"
            for name, value in (("coherence", coherence), ("glitches", glitches))
        ),
    ]
    problems = [text for text in wrong if text]
    if problems:
        raise ConfigError("echo phantom", why="settings that make no sequence", problems=problems)
