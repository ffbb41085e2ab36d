"""Readers of magnitude images: ACDC as NIfTI or HDF5, and every layout of `medrl.core.dataset`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medrl.core.dataset import Dataset, load_case, open_dataset, safe_case_id
from medrl.core.errors import DataError
from medrl.core.phantoms.cardiac import SIDECAR
from medrl.core.types import Case, Volume
from medrl.core.volume import grid_difference, read_hdf5, read_volume, turn_like

from .scans import UNKNOWN, Listing, RawScan, ScanDataset, files_below, frames_of, slices_first
from .splits import PUBLIC, acdc_group, acdc_number

_PATIENT = re.compile(r"patient\d+")
_SUFFIXES = (".nii.gz", ".nii")
_INFO_LIMIT = 64 * 2**10
_SLICE = re.compile(r"^(?P<scan>.+?)_slice_(?P<number>\d+)$")


def open_acdc_nifti(
    root: Path | str, *, frames: Literal["gt", "all"] = "gt", exclude: Sequence[str] = ()
) -> ScanDataset:
    """Open ACDC as it is published: ``patientNNN/patientNNN_frameFF.nii.gz`` with ``…_gt.nii.gz``.

    ``Info.cfg`` beside them names the frames and the diagnosis, by which folds are stratified. The folders of
    patients may lie in `root`, or in ``training`` and ``testing`` below it. Patients from 101 on, and those
    of ``testing``, are set aside for testing.

    Args:
        root: Folder.
        frames: `gt` takes the frames at end-diastole and end-systole; `all` the whole ``…_4d.nii.gz``, which
            has no labels.
        exclude: Cases to leave out, such as ``patient001_frame01``.

    Raises:
        ConfigError: A case to leave out does not exist.
        DataError: There is no patient.
    """
    root = Path(root)
    found = Listing()
    names: dict[str, str] = {}
    for folder in _patient_folders(root):
        info = _info(folder / "Info.cfg")
        cases = _frames_in(folder) if frames == "gt" else _sequence_in(folder)
        patient = folder.name
        known = {int(info[key]): key for key in ("ED", "ES") if info.get(key, "").isdigit()}
        names |= frames_of([case.id for case in cases], known)
        found.scans += cases
        found.groups[patient] = info.get("Group", "") or acdc_group(patient)
        if (acdc_number(patient) or 0) > PUBLIC or folder.parent.name == "testing":
            found.apart += [case.id for case in cases]
    return ScanDataset(
        root=root,
        layout="acdc-nifti",
        scans=found.scans,
        read=partial(_read_nifti, names),
        apart=found.apart,
        groups=found.groups,
        exclude=exclude,
    )


def open_acdc_h5(
    root: Path | str, *, spacing: Sequence[float] = (), exclude: Sequence[str] = ()
) -> ScanDataset:
    """Open ACDC as HDF5: ``patientNNN_frameFF.h5`` with ``image`` and ``label``, slice first.

    Files of single slices, ``patientNNN_frameFF_slice_S.h5``, are read as well. Patients from 101 on are set
    aside for testing.

    Args:
        root: Folder, or one file.
        spacing: Between rows, columns and slices in mm, which the files do not store; empty is unknown.
        exclude: Cases to leave out.

    Raises:
        ConfigError: A case to leave out does not exist.
        DataError: There is no file, or a label is asked for that is not there.
    """
    root = Path(root)
    known = _known_spacing(spacing)
    found = Listing()
    by_patient: dict[str, list[str]] = {}
    for path in files_below(root, (".h5", ".hdf5")):
        case = safe_case_id(path.stem)
        match = _PATIENT.match(case)
        patient = match.group(0) if match else case
        found.scans.append(Case(id=case, images=(path,), label=path, patient=patient))
        by_patient.setdefault(patient, []).append(case)
        found.groups[patient] = acdc_group(patient)
        if (acdc_number(patient) or 0) > PUBLIC:
            found.apart.append(case)
    names = {case: frame for cases in by_patient.values() for case, frame in frames_of(cases).items()}
    return ScanDataset(
        root=root,
        layout="acdc-h5",
        scans=found.scans,
        read=partial(_read_h5, names, known),
        apart=found.apart,
        groups=found.groups,
        exclude=exclude,
    )


def open_folder(root: Path | str, *, layout: str = "auto", exclude: Sequence[str] = ()) -> ScanDataset:
    """Open a dataset in a layout of `medrl.core.dataset`, such as nnU-Net raw; one channel.

    Test cases are set aside. Frames are read off names that end in ``_ED``, ``_ES`` or ``_frame12``. A file
    ``kspace.json`` beside the images, as cardiac phantoms write it, displaces k-space centres.

    Raises:
        ConfigError: Unknown layout, or a case to leave out does not exist.
        DataError: Files are missing or ambiguous.
    """
    root = Path(root)
    dataset = open_dataset(root, layout=layout, exclude=exclude)
    scans = [*dataset.cases, *dataset.test_cases]
    by_patient: dict[str, list[str]] = {}
    for case in scans:
        by_patient.setdefault(case.patient or case.id, []).append(case.id)
    names = {case: frame for cases in by_patient.values() for case, frame in frames_of(cases).items()}
    side = dataset.root / SIDECAR
    opened = ScanDataset(
        root=dataset.root,
        layout="core",
        scans=scans,
        read=partial(_read_case, dataset, names, _shifts(side)),
        apart=[case.id for case in dataset.test_cases],
        labels=dataset.labels,
        beside={case.id: (side,) for case in scans} if side.is_file() else {},
        name=dataset.name,
    )
    opened.info["excluded"] = sorted(exclude)
    return opened


def read_image_file(path: Path) -> RawScan:
    """Read one image file of any format of `medrl.core.volume`, without labels."""
    volume = read_volume(path)
    name = path.name.split(".")[0]
    return of_volume(volume, frame=frames_of([name])[name])


def of_volume(
    volume: Volume, labels: Volume | None = None, *, frame: str = "", shift_k: float = 0.0
) -> RawScan:
    """Take the voxels ``(C, X, Y, Z)`` of a file as slices; several channels are frames in time.

    Raises:
        DataError: Labels for several channels.
    """
    times, depth = int(volume.data.shape[0]), int(volume.data.shape[3])
    if times > 1 and labels is not None:
        raise DataError(str(volume.source or "image"), why="a sequence with the labels of one frame")
    x, y, z = volume.spacing
    numbers = [(time, number) for time in range(times) for number in range(depth)]
    return RawScan(
        names=tuple(f"t{t:02d}_z{k:03d}" if times > 1 else f"z{k:03d}" for t, k in numbers),
        frames=tuple(f"t{t:02d}" if times > 1 else frame for t, _ in numbers),
        slices=tuple(number for _, number in numbers),
        spacing_mm=(y, x, z),
        images=np.concatenate([slices_first(one) for one in volume.data]),
        labels=None if labels is None else _as_labels(slices_first(labels.data[0])),
        shift_k=shift_k,
        volume=volume,
    )


def _patient_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(str(root), why="no such folder")
    for depth in ("*", "*/*", "*/*/*"):
        found = sorted(path for path in root.glob(depth) if path.is_dir() and _PATIENT.fullmatch(path.name))
        if found:
            return found
    return []


def _frames_in(folder: Path) -> list[Case]:
    pattern = re.compile(rf"({re.escape(folder.name)}_frame\d+)\.nii(\.gz)?")
    cases = []
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        label = next(
            (item for end in _SUFFIXES if (item := folder / f"{match.group(1)}_gt{end}").is_file()), None
        )
        cases.append(Case(id=match.group(1), images=(path,), label=label, patient=folder.name))
    return cases


def _sequence_in(folder: Path) -> list[Case]:
    """The whole sequence; it has no labels, whatever lies beside it."""
    name = f"{folder.name}_4d"
    path = next((item for end in _SUFFIXES if (item := folder / f"{name}{end}").is_file()), None)
    return [] if path is None else [Case(id=name, images=(path,), label=None, patient=folder.name)]


def _info(path: Path) -> dict[str, str]:
    """Lines ``key: value`` of ``Info.cfg``; nothing where there is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _INFO_LIMIT:
        raise DataError(str(path), why="larger than 64 KiB")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, sign, value in pairs if sign}


def _read_nifti(names: Mapping[str, str], case: Case, with_label: bool) -> RawScan:
    image = read_volume(case.images[0])
    frame = names[case.id]
    if case.id.endswith("_4d"):
        return of_volume(image)
    if image.data.shape[0] != 1:
        raise DataError(case.images[0].name, why=f"{image.data.shape[0]} volumes, expected one frame")
    label = None
    if with_label and case.label is not None:
        stored = read_volume(case.label, kind="label")
        difference = grid_difference(stored, image)
        label = turn_like(stored, image) if difference else stored
        if label is None:
            raise DataError(case.label.name, why=f"does not lie on its image: {difference}")
    return of_volume(image, label, frame=frame)


def _read_h5(
    names: Mapping[str, str], spacing: tuple[float, float, float], case: Case, with_label: bool
) -> RawScan:
    sizes = (spacing[1], spacing[0], spacing[2]) if math.isfinite(spacing[0]) else (1.0, 1.0, 1.0)
    image = read_hdf5(case.images[0], "image", spacing=sizes)
    label = read_hdf5(case.images[0], "label", spacing=sizes, kind="label") if with_label else None
    if label is not None and label.data.shape != image.data.shape:
        raise DataError(
            case.images[0].name, why=f"labels of shape {label.data.shape[1:]} on {image.data.shape[1:]}"
        )
    images = slices_first(image.data[0])
    single = _SLICE.match(case.id)
    numbers = [int(single.group("number"))] if single and len(images) == 1 else list(range(len(images)))
    return RawScan(
        names=tuple(f"z{number:03d}" for number in numbers),
        frames=(names[case.id],) * len(images),
        slices=tuple(numbers),
        spacing_mm=spacing,
        images=images,
        labels=None if label is None else _as_labels(slices_first(label.data[0])),
    )


def _read_case(
    dataset: Dataset, names: Mapping[str, str], shifts: Mapping[str, float], case: Case, with_label: bool
) -> RawScan:
    image, label = load_case(dataset, case, with_label=with_label)
    return of_volume(image, label, frame=names[case.id], shift_k=shifts.get(case.id, 0.0))


def _shifts(path: Path) -> dict[str, float]:
    """Displacements by case."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {str(case): float(item["shift_k"]) for case, item in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(str(path), why=f"no list of shift_k by case ({error})") from error
    if not all(map(math.isfinite, found.values())):
        raise DataError(str(path), why="a shift_k is not finite")
    return found


def _as_labels(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.size and int(values.max()) > 255:
        raise DataError("labels", why=f"value {int(values.max())} is above 255")
    return values.astype(np.uint8)


def _known_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    if not spacing:
        return UNKNOWN
    sizes = tuple(float(size) for size in spacing)
    if len(sizes) != 3 or not all(math.isfinite(size) and size > 0 for size in sizes):
        raise DataError("spacing", why=f"{list(spacing)}, expected three positive numbers in mm")
    return sizes[0], sizes[1], sizes[2]
