"""Converting MSD datasets, plain folders and DICOM series to nnU-Net raw, checked and rewritten."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case, Volume
from medrl.core.volume import present_labels, smallest_integer, write_volume

from .inputs import list_inputs
from .layouts import open_dataset
from .listing import folder_entries, holds_dicom
from .loading import find_labels, load_label, stack_channels
from .model import Dataset, some
from .names import safe_case_id

SOURCES = ("dicom", "msd", "folder")


def convert(
    src: Path | str,
    dst: Path | str,
    source: str,
    *,
    labels: Mapping[str, int] | None = None,
    channel_names: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Dataset:
    """Convert a dataset to nnU-Net raw and return it.

    Every image is read, checked and written again: channels in files of their own on the grid of the
    first, whole-numbered label maps (float files are turned, fractions refused) with values 0, 1, 2, …
    without gaps, no free text in headers. Cases without segmentation go to ``imagesTs``. The folder
    appears only when it is complete.

    Args:
        src: ``msd``: folder with ``dataset.json``; ``folder``: ``images/`` and ``labels/``;
            ``dicom``: one series, a folder of series (one a case), or a folder of cases with a folder
            for each channel; a file ``label.nii.gz`` in the folder of a case is its segmentation.
        dst: New folder, such as ``Dataset001_Name``.
        source: ``dicom``, ``msd`` or ``folder``.
        labels: Names for the label values of the source, where it gives none.
        channel_names: Names of the channels, where the source gives none.
        progress: Called with ``(done, total, case)`` before each case.

    Raises:
        ConfigError: Unknown source, or the target holds files already.
        DataError: A case is damaged or does not fit; nothing is left behind.
    """
    src, dst = Path(src), Path(dst)
    if source not in SOURCES:
        raise ConfigError("--from", why=f"unknown source '{source}'", do=did_you_mean(source, SOURCES))
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(str(dst), why="exists and is not empty", do="choose a new folder")
    if dst.resolve().is_relative_to(src.resolve()) and source != "msd":
        raise ConfigError(str(dst), why="lies inside the source folder", do="choose a folder elsewhere")
    dataset = _open_dicom(src, channel_names) if source == "dicom" else open_dataset(src, layout=source)
    if not dataset.cases and not dataset.test_cases:
        raise DataError(str(src), why="no case was found")
    partial = dst.parent / f".{dst.name}.{secrets.token_hex(4)}.partial"
    try:
        _write(dataset, partial, labels, tuple(channel_names), progress)
        if dst.exists():
            dst.rmdir()
        partial.replace(dst)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    return open_dataset(dst, layout="nnunet")


def _open_dicom(src: Path, channel_names: Sequence[str]) -> Dataset:
    if not src.is_dir():
        raise DataError(str(src), why="no such folder")
    folders = [src] if holds_dicom(src) else sorted(item for item in src.iterdir() if item.is_dir())
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    names = tuple(channel_names)
    cases = []
    for folder in folders:
        inner = (
            [folder]
            if holds_dicom(folder)
            else [e.path for e in folder_entries(folder, dicom=True) if e.path.is_dir()]
        )
        if not inner:
            continue
        if not names:
            names = ("image",) if len(inner) == 1 else tuple(path.name for path in inner)
        if len(names) > 1:
            case = next(iter(list_inputs_of(folder, names)))
        else:
            if len(inner) > 1:
                raise DataError(
                    f"case {folder.name}",
                    why=f"{len(inner)} series, the first case has one: {some(path.name for path in inner)}",
                    case=folder.name,
                )
            case = Case(id=safe_case_id(folder.resolve().name), images=(inner[0],))
        label = next(
            (path for name in ("label.nii.gz", "label.nii") if (path := folder / name).is_file()), None
        )
        cases.append(replace(case, label=label, patient=case.id))
    return Dataset(
        root=src, layout="dicom", channel_names=names or ("image",),
        cases=[case for case in cases if case.label], test_cases=[case for case in cases if not case.label],
    )  # fmt: skip


def list_inputs_of(folder: Path, names: tuple[str, ...]) -> list[Case]:
    """Return the one case of a folder that holds a file or DICOM folder for each channel."""
    from .inputs import _of_case_folder

    case = _of_case_folder(folder, names)
    return [case] if case is not None else list_inputs(folder, names)


def _write(
    dataset: Dataset,
    root: Path,
    labels: Mapping[str, int] | None,
    channel_names: tuple[str, ...],
    progress: Callable[[int, int, str], None] | None,
) -> None:
    named = dict(labels) if labels else (dataset.declared_labels or find_labels(dataset.cases))
    named = named if 0 in named.values() else {"background": 0, **named}
    ordered = sorted(named.items(), key=lambda item: item[1])
    numbers = {value: new for new, (_, value) in enumerate(ordered)}
    names = channel_names or dataset.channel_names
    channels = 0
    total = len(dataset.cases) + len(dataset.test_cases)
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for done, case in enumerate((*dataset.cases, *dataset.test_cases)):
        if progress is not None:
            progress(done, total, case.id)
        image = stack_channels(case, root=dataset.root)
        channels = channels or image.data.shape[0]
        if image.data.shape[0] != channels:
            raise DataError(
                f"case {case.id}",
                why=f"{image.data.shape[0]} channels, the others have {channels}",
                case=case.id,
            )
        folder = root / ("imagesTr" if case.label else "imagesTs")
        for channel, voxels in enumerate(image.data):
            write_volume(folder / f"{case.id}_{channel:04d}.nii.gz", _compact(voxels), image, kind="image")
        if case.label is not None:
            target = root / "labelsTr" / f"{case.id}.nii.gz"
            write_volume(target, _renumber(dataset, case, image, numbers), image, kind="label")
    if len(names) != channels:
        if channel_names or dataset.info.get("channels_named", True):
            raise DataError(
                str(dataset.root),
                why=f"{channels} channels in the images, names for {len(names)}: {', '.join(names)}",
            )
        names = tuple(f"channel_{k}" for k in range(channels))
    meta: dict[str, Any] = {
        "name": dataset.name,
        "channel_names": {str(k): name for k, name in enumerate(names)},
        "labels": {name: numbers[value] for name, value in ordered},
        "numTraining": len(dataset.cases),
        "file_ending": ".nii.gz",
        "patients": {case.id: case.patient or case.id for case in (*dataset.cases, *dataset.test_cases)},
    }
    if any(new != old for old, new in numbers.items()):
        meta["source_labels"] = dict(ordered)
    (root / "dataset.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _renumber(dataset: Dataset, case: Case, image: Volume, numbers: Mapping[int, int]) -> NDArray[Any]:
    """Read the label map of a case and give its values new numbers without gaps."""
    path = case.label or case.images[0]
    label = load_label(case, path, image, dataset.root)
    present = present_labels(label.data)
    unknown = sorted(set(present) - set(numbers))
    if unknown:
        raise DataError(
            f"case {case.id}: {path.name}",
            why=f"label values {some(map(str, unknown))} are unknown; "
            f"known are {some(map(str, numbers), 20)}",
            do="name all label values",
            case=case.id,
        )
    table = np.zeros(max(present) + 1, dtype=np.uint16)
    for value in present:
        table[value] = numbers[value]
    renumbered: NDArray[Any] = table[label.data]
    return renumbered


def _compact(voxels: NDArray[np.float32]) -> NDArray[Any]:
    """Return whole-numbered images in the smallest integer type up to 16 bits, others unchanged."""
    low, high = float(voxels.min()), float(voxels.max())
    if low < -32768 or high > 65535 or (np.rint(voxels) != voxels).any():
        return voxels
    dtype = np.dtype(smallest_integer(int(low), int(high)))
    return voxels.astype(dtype) if dtype.itemsize <= 2 else voxels
