"""CAMUS in the HDF5 file of the library `vital`: one group for each patient and view, folds as lists.

``patient0001/4CH/img_proc (T, H, W[, 1])`` and ``gt_proc``, ``gt``; attributes ``instants`` (names), one with
the frame of each instant, and ``voxelspacing`` (time, height, width) of ``gt``; names of patients in
``cross_validation/fold_5/train``, ``val`` and ``test``.

Source: vital, data/camus/dataset_generator.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medrl.core.dataset import safe_case_id
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case, Volume
from medrl.core.volume import read_hdf5

from .readers import EchoDataset

_log = logging.getLogger("medrl.rl4seg")
_FOLDS = "cross_validation"
_IMAGE = "img_proc"
_LABELS = ("gt_proc", "gt")


@dataclass(frozen=True)
class Frame:
    """Where one image lies in the file: arrays, number of the frame, size of its pixels along x and y."""

    image: str
    label: str
    number: int
    spacing: tuple[float, float]


class VitalDataset(EchoDataset):
    """Frames of an HDF5 file; each is a case."""

    frames: dict[str, Frame]

    def read(self, case: Case, *, with_label: bool) -> tuple[Volume, Volume | None]:
        """Read a frame; without `with_label` the array of labels is not opened."""
        frame = self.frames[case.id]
        image = _frame(case.images[0], frame.image, frame, label=False)
        if not with_label:
            return image, None
        if not frame.label:
            raise DataError(f"case {case.id}", why="it has no reference segmentation", case=case.id)
        return image, _frame(case.images[0], frame.label, frame, label=True)


def open_vital(
    root: Path | str, *, exclude: Sequence[str] = (), split_column: str = "", fold: int = 0
) -> VitalDataset:
    """Open an HDF5 file of `vital`.

    Frames at end-diastole and end-systole are taken, or all where the file does not name them. The parts are
    those of ``fold_<fold>``, which the file counts from 1, or of its only fold.

    Args:
        root: The file.
        exclude: Cases to leave out, such as ``patient0001_4CH_ED``.
        split_column: Name of a fold, such as ``fold_5``; empty for that of `fold`.
        fold: Number of the fold.

    Raises:
        ConfigError: There is no such fold or case.
        DataError: The file is damaged or of another kind.
    """
    path = Path(root)
    try:
        import h5py
    except ImportError as error:
        raise DataError(str(path), why="reading HDF5 needs h5py", do="pip install 'medrl[io]'") from error
    try:
        with h5py.File(path, "r") as file:
            cases, frames = _list(path, file, h5py)
            patients = _patients(path, file, split_column or f"fold_{fold}", asked=bool(split_column))
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(str(path), why=f"damaged, or no file of vital ({error})") from error
    unknown = [name for name in exclude if name not in frames]
    if unknown:
        raise ConfigError("exclude", why=f"no case '{unknown[0]}'")
    if not cases:
        raise DataError(str(path), why=f"no patient group with {_IMAGE} in it")
    parts = {part: [case.id for case in cases if case.patient in names] for part, names in patients.items()}
    kept = [case for case in cases if case.id not in exclude]
    dataset = VitalDataset(
        root=path.parent, name=path.stem, layout="vital", cases=kept, parts=parts, excluded=exclude
    )
    dataset.frames = frames
    return dataset


def _list(path: Path, file: Any, h5py: Any) -> tuple[list[Case], dict[str, Frame]]:
    cases: list[Case] = []
    frames: dict[str, Frame] = {}
    for patient in sorted(file):
        views = file[patient]
        if patient == _FOLDS or not isinstance(views, h5py.Group):
            continue
        for view in sorted(views):
            group = views[view]
            if _IMAGE not in group:
                continue
            label = next((name for name in _LABELS if name in group and _fits(group, name)), "")
            for name, number in _instants(group).items():
                case = safe_case_id(f"{patient}_{view}_{name}")
                base = f"{patient}/{view}"
                frames[case] = Frame(
                    f"{base}/{_IMAGE}", f"{base}/{label}" if label else "", number, _spacing(group, path)
                )
                cases.append(Case(id=case, images=(path,), label=path if label else None, patient=patient))
    return cases, frames


def _fits(group: Any, name: str) -> bool:
    return tuple(group[name].shape[1:3]) == tuple(group[_IMAGE].shape[1:3])


def _instants(group: Any) -> dict[str, int]:
    """Frames by name: those that the attributes name, else all."""
    count = int(group[_IMAGE].shape[0])
    names = [
        item.decode() if isinstance(item, bytes) else str(item)
        for item in np.atleast_1d(group.attrs.get("instants", []))
    ]
    found = {name: int(group.attrs.get(name, number)) for number, name in enumerate(names)}
    if not found or any(not 0 <= number < count for number in found.values()):
        return {f"{number:03d}": number for number in range(count)}
    return found


def _spacing(group: Any, path: Path) -> tuple[float, float]:
    """Size of the pixels of the processed image along x and y, from that of the image as recorded."""
    found = np.atleast_1d(np.asarray(group.attrs.get("voxelspacing", []), dtype=np.float64)).ravel()
    if found.size < 2 or not (found[-2:] > 0).all():
        _log.warning("%s: %s says no voxel size; distances are in pixels", path.name, group.name)
        return 1.0, 1.0
    height, width = (float(size) for size in found[-2:])
    if "gt" in group:
        old, new = group["gt"].shape[1:3], group[_IMAGE].shape[1:3]
        height, width = height * old[0] / new[0], width * old[1] / new[1]
    return width, height


def _patients(path: Path, file: Any, name: str, *, asked: bool) -> dict[str, set[str]]:
    folds = file.get(_FOLDS)
    if folds is None or not len(folds):
        return {}
    if name not in folds:
        if asked or len(folds) > 1:
            raise ConfigError(
                "fold", why=f"{path.name} has no {name}", do=f"choose one of {', '.join(sorted(folds))}"
            )
        name = next(iter(folds))
    return {
        part: {item.decode() if isinstance(item, bytes) else str(item) for item in folds[name][part][()]}
        for part in ("train", "val", "test")
        if part in folds[name]
    }


def _frame(path: Path, key: str, frame: Frame, *, label: bool) -> Volume:
    """One frame ``(1, X, Y, 1)`` of an array ``(T, H, W)``."""
    volume = read_hdf5(path, key, spacing=(*frame.spacing, 1.0), kind="label" if label else "image")
    return replace(volume, data=volume.data[..., frame.number : frame.number + 1])
