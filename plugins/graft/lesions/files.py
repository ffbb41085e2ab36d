"""Evaluation of a folder of probabilities, as ``medrl predict graft --save-probabilities`` writes them."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.dataset import Dataset, open_dataset, patient_of
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Volume
from medrl.core.volume import grid_difference, image_stem, is_image_file, read_volume, turn_like
from medrl.plugins.graft.cohorts import LABELS, is_cohort_file, open_cohorts
from medrl.plugins.graft.regions import Target, make_target
from medrl.plugins.graft.samples import mask_path

from .evaluation import (
    PROTOCOLS,
    Lesion,
    Rules,
    evaluate_case,
    find_lesion,
)
from .report import LesionEvaluation, summarise_results

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The label map of a case, and its organ mask if there is one."""

    case: str
    label: Path
    mask: Path | None = None
    patient: str = ""


def evaluate_folders(
    predictions: Path,
    reference: Path,
    *,
    masks: Path | None = None,
    target: str = "auto",
    lesion: str = "",
    protocols: Sequence[str] = (),
    rules: Rules | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    allow_missing: bool = False,
    say: Say = lambda _line: None,
) -> LesionEvaluation:
    """Evaluate every prediction of a folder.

    Args:
        predictions: Output folder of a prediction, or its ``probabilities``.
        reference: A dataset (folder or multi-cohort YAML), or a folder of label maps named after the cases.
        masks: Folder of organ masks; else those of the dataset, else the labelled prostate.
        target: What the channels mean, see `regions.make_target`; ``auto`` tells it from their number.
        lesion: See `find_lesion`.
        protocols: ``picai``, ``sextant``; both by default where they can be measured.
        rules: Thresholds.
        resamples: Of the bootstrap; 0 for no intervals.
        level: Confidence level.
        seed: Of the bootstrap.
        allow_missing: Evaluate although references have no prediction; they are listed.
        say: Shows a line of progress.

    Raises:
        ConfigError: Target, lesion or protocol do not fit the predictions.
        DataError: A prediction has no reference or lies on another grid, a reference has no prediction, or
            a file is damaged; the case is named.
    """
    files = _predictions(predictions)
    references, dataset, labels = _references(reference, masks, files)
    unknown = sorted(set(files) - set(references))
    if unknown:
        raise DataError(
            f"case {unknown[0]}",
            why=f"{len(unknown)} predictions have no reference in {reference}",
            case=unknown[0],
        )
    missing = _missing(files, references, dataset)
    if missing and not allow_missing:
        raise DataError(
            str(predictions),
            why=f"{len(missing)} references have no prediction: {', '.join(missing[:5])}",
            do="predict them, or add --allow-missing",
        )
    rules = rules or Rules()
    chosen: tuple[str, ...] | None = tuple(protocols) or None
    meaning: tuple[Target, Lesion] | None = None
    results = []
    for number, case in enumerate(sorted(files), start=1):
        say(f"case {number} of {len(files)}: {case}")
        entry = references[case]
        label = _read_label(case, entry.label)
        found = _read_probabilities(case, files[case], label)
        if meaning is None:
            aim = make_target(_kind(target, found.data, labels), labels)
            meaning = aim, find_lesion(aim, lesion)
        organ = _organ(case, entry, label, meaning[0])
        if chosen is None:
            chosen = PROTOCOLS if organ is not None else ("picai",)
        results.append(
            evaluate_case(
                case,
                found.data,
                label.data[0],
                *meaning,
                spacing=label.spacing,
                affine=label.affine,
                organ=organ,
                patient=entry.patient,
                protocols=chosen,
                rules=rules,
            )
        )
    if meaning is None or chosen is None:
        raise DataError(
            str(predictions), why="it holds no probabilities", do="medrl predict graft --save-probabilities"
        )
    facts: dict[str, Any] = {
        "target": meaning[0].kind,
        "lesion": asdict(meaning[1]),
        "rules": asdict(rules),
        "missing": missing,
    }
    facts |= {"resamples": resamples, "level": level, "seed": seed}
    return LesionEvaluation(tuple(results), summarise_results(results, chosen, rules, facts))


def _predictions(folder: Path) -> dict[str, Path]:
    """Probability files by case."""
    inner = folder / "probabilities"
    place = inner if inner.is_dir() else folder
    files = {path.stem: path for path in sorted(place.glob("*.npz"))} if place.is_dir() else {}
    if not files:
        raise DataError(
            str(place), why="no probabilities (.npz) here", do="medrl predict graft --save-probabilities …"
        )
    return files


def _references(
    path: Path, masks: Path | None, files: Mapping[str, Path]
) -> tuple[dict[str, Reference], Dataset | None, dict[str, int]]:
    """Label maps by case, the dataset if there is one, and the label values."""
    dataset: Dataset | None = None
    if is_cohort_file(path):
        dataset = open_cohorts(path)
    elif path.is_file() or any((path / name).exists() for name in ("dataset.json", "cases.json", "images")):
        dataset = open_dataset(path)
    if dataset is None:
        if not path.is_dir():
            raise DataError(str(path), why="no such folder")
        entries = [
            Reference(image_stem(item), item, patient=patient_of(image_stem(item)))
            for item in sorted(path.iterdir())
            if is_image_file(item)
        ]
        labels = _labels_beside(next(iter(files.values())).parent)
    else:
        entries = [
            Reference(case.id, case.label, mask_path(case, "prostate"), case.patient)
            for case in (*dataset.cases, *dataset.test_cases)
            if case.label is not None
        ]
        labels = dict(dataset.labels)
    found = {}
    for entry in entries:
        mask = _mask_in(masks, entry.case) if masks is not None and entry.case in files else entry.mask
        found[entry.case] = Reference(entry.case, entry.label, mask, entry.patient)
    return found, dataset, labels


def _mask_in(folder: Path, case: str) -> Path:
    found = [
        path for path in sorted(folder.glob(f"{case}.*")) if is_image_file(path) and image_stem(path) == case
    ]
    if len(found) != 1:
        raise DataError(f"case {case}", why=f"{len(found)} organ masks named {case} in {folder}", case=case)
    return found[0]


def _labels_beside(folder: Path) -> dict[str, int]:
    """Label values from ``labels.json`` of the prediction; those of the prostate without one."""
    for path in (folder / "labels.json", folder.parent / "labels.json"):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                content = content.get("labels", content)
                return {str(name): int(value) for name, value in content.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                raise DataError(str(path), why=f"cannot be read ({error})") from error
    return dict(LABELS)


def _missing(
    files: Mapping[str, Path], references: Mapping[str, Reference], dataset: Dataset | None
) -> list[str]:
    """References that should have a prediction: all of a folder, the test cases if only those were predicted.

    Of other selections of a dataset nothing is known, so nothing is missing.
    """
    if dataset is None:
        expected = set(references)
    else:
        tests = {case.id for case in dataset.test_cases} & set(references)
        expected = tests if set(files) <= tests else set()
    return sorted(expected - set(files))


def _read_label(case: str, path: Path) -> Volume:
    try:
        return read_volume(path, kind="label")
    except DataError as error:
        raise DataError(f"case {case}: {path.name}", why=error.why, do=error.do, case=case) from error


def _read_probabilities(case: str, path: Path, label: Volume) -> Volume:
    """The probabilities of a case in the voxel order of its label map."""
    try:
        with np.load(path, allow_pickle=False) as content:
            data, affine = content["probabilities"], np.asarray(content["affine"], dtype=np.float64)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"case {case}: {path.name}", why=f"it cannot be read ({type(error).__name__}: {error})", case=case
        ) from error
    if data.ndim != 4 or affine.shape != (4, 4) or data.dtype.kind != "f" or not np.isfinite(data).all():
        raise DataError(
            f"case {case}: {path.name}",
            why="expected finite probabilities (K, X, Y, Z) and an affine",
            case=case,
        )
    size = np.linalg.norm(affine[:3, :3], axis=0)
    volume = Volume(
        data=data, affine=affine, spacing=(float(size[0]), float(size[1]), float(size[2])), source=path
    )
    difference = grid_difference(volume, label)
    if not difference:
        return volume
    turned = turn_like(volume, label)
    if turned is None:
        raise DataError(
            f"case {case}: {path.name}", why=f"it does not lie on its reference: {difference}", case=case
        )
    return turned


def _organ(case: str, entry: Reference, label: Volume, target: Target) -> Any:
    """The organ mask of a case on the grid of its label map; None if there is none."""
    if entry.mask is None:
        return label.data[0] > 0 if target.prostate else None
    mask = _read_label(case, entry.mask)
    if grid_difference(mask, label):
        turned = turn_like(mask, label)
        if turned is None:
            raise DataError(
                f"case {case}: {entry.mask.name}",
                why="the organ mask does not lie on the reference",
                case=case,
            )
        mask = turned
    return mask.data[0] > 0


def _kind(target: str, probabilities: Any, labels: Mapping[str, int]) -> str:
    """Kind of target that fits the number of channels.

    Raises:
        ConfigError: Several kinds fit, or none.
    """
    if target != "auto":
        return target
    channels = int(probabilities.shape[0])
    exclusive = bool(np.allclose(probabilities.sum(axis=0), 1.0, atol=1e-3))
    prostate = sorted(labels.values()) == [0, 1, 2, 3]
    if exclusive and channels == len(labels):
        return "classes"
    if prostate and channels == 2:
        return "binary"
    if prostate and channels == 3:
        return "binary_classes" if exclusive else "3class"
    if channels == 1 and len(labels) == 2:
        return "separate"
    raise ConfigError(
        "--target",
        why=f"{channels} channels of the labels {dict(labels)} may mean several things",
        do="--target nested, --target separate or --target classes",
    )
