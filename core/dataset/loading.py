"""Reading one case: channels stacked on one grid, labels checked against their names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medrl.core.errors import DataError
from medrl.core.types import Case, Volume
from medrl.core.volume import (
    grid_difference,
    overlap_fraction,
    present_labels,
    read_volume,
    resample_like,
    turn_like,
)

from .model import Dataset, some

_log = logging.getLogger("medrl.dataset")

MIN_OVERLAP = 0.25
"""A channel that covers less than this part of the first one is taken for another examination."""


def load_case(dataset: Dataset, case: Case, *, with_label: bool) -> tuple[Volume, Volume | None]:
    """Read the channels of a case, stacked, and its label map.

    Channels on another grid than the first are interpolated linearly onto it, which is logged. Label
    maps are never resampled: they must lie on the voxels of the first channel;
    axes stored in another order or direction are turned, which is exact.

    Returns:
        The image `(C, X, Y, Z)` float32, and the label map `(1, X, Y, Z)` or None.

    Raises:
        DataError: A file is damaged, a grid does not fit, or a label value is unknown; the case is named.
    """
    image = stack_channels(case, dataset.channel_names, dataset.root)
    if not with_label:
        return image, None
    if case.label is None:
        raise DataError(f"case {case.id}", why="it has no reference segmentation", case=case.id)
    label = load_label(case, case.label, image, dataset.root)
    if dataset.declared_labels is not None:
        unknown = sorted(set(present_labels(label.data)) - set(dataset.declared_labels.values()))
        if unknown:
            raise DataError(
                f"case {case.id}: {_relative(case.label, dataset.root)}",
                why=f"label values {some(map(str, unknown))} are unknown; "
                f"known are {some(map(str, sorted(dataset.declared_labels.values())), 20)}",
                do="name them in dataset.json, or " + _advice(case),
                case=case.id,
            )
    return image, label


def load_label(case: Case, path: Path, image: Volume, root: Path | None = None) -> Volume:
    """Read a label map and bring it into the voxel order of its image, without interpolation.

    Raises:
        DataError: It is damaged, or does not lie on the voxels of the image; the case is named.
    """
    label = read_of_case(case, path, root, kind="label")
    difference = grid_difference(label, image)
    turned = turn_like(label, image) if difference else label
    if turned is None:
        raise DataError(
            f"case {case.id}: {_relative(path, root)}",
            why=f"the segmentation does not lie on its image: {difference}",
            do=_advice(case),
            case=case.id,
        )
    return turned


def stack_channels(case: Case, channel_names: Sequence[str] = (), root: Path | None = None) -> Volume:
    """Read the image files of a case and stack their channels on the grid of the first.

    Raises:
        DataError: A file is damaged, hardly overlaps the first, or the number of channels is not that
            of `channel_names` (if any are given).
    """
    volumes = [read_of_case(case, path, root) for path in case.images]
    if not volumes:
        raise DataError(f"case {case.id}", why="it has no image", case=case.id)
    channels = sum(volume.data.shape[0] for volume in volumes)
    if channel_names and channels != len(channel_names):
        raise DataError(
            f"case {case.id}",
            why=f"{channels} channels, expected {len(channel_names)} ({', '.join(channel_names)})",
            do="name all channels in dataset.json, or give the missing files",
            case=case.id,
        )
    first = volumes[0]
    if len(volumes) == 1:
        return first
    stacked = [first.data]
    for path, volume in zip(case.images[1:], volumes[1:], strict=True):
        difference = grid_difference(volume, first)
        if difference:
            covered = overlap_fraction(volume, first)
            if covered < MIN_OVERLAP:
                raise DataError(
                    f"case {case.id}: {_relative(path, root)}",
                    why=f"covers only {covered:.0%} of the first channel; is it of another examination?",
                    do=_advice(case),
                    case=case.id,
                )
            turned = turn_like(volume, first)
            if turned is None:
                _log.info("case %s: %s resampled onto the first channel (%s)", case.id, path.name, difference)
            volume = turned if turned is not None else resample_like(volume, first)
        stacked.append(volume.data)
    return Volume(
        data=np.concatenate(stacked, axis=0),
        affine=first.affine,
        spacing=first.spacing,
        header=first.header,
        source=first.source,
    )


def read_of_case(case: Case, path: Path, root: Path | None = None, *, kind: str = "image") -> Volume:
    """Read one file of a case; an error names the case and says how to leave it out."""
    try:
        return read_volume(path, kind="label" if kind == "label" else "image")
    except DataError as error:
        raise DataError(
            f"case {case.id}: {_relative(path, root)}",
            why=error.why,
            do=f"{error.do}, or leave the case out with --exclude {case.id}" if error.do else _advice(case),
            case=case.id,
        ) from error


def find_labels(cases: Sequence[Case]) -> dict[str, int]:
    """Read all label files and name what is there: ``background``, ``label_1`` and so on."""
    values = {0}
    for case in cases:
        if case.label is not None:
            values |= set(present_labels(read_of_case(case, case.label, kind="label").data))
    return {"background" if value == 0 else f"label_{value}": value for value in sorted(values)}


def _relative(path: Path, root: Path | None) -> str:
    return str(path.relative_to(root)) if root is not None and path.is_relative_to(root) else str(path)


def _advice(case: Case) -> str:
    return f"leave the case out with --exclude {case.id}"
