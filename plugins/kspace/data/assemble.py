"""What an environment plays, made of slices: one by one, as stacks, or as volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from medrl.core.errors import DataError

from ..cases import Cases, Geometry, initial_lines, possible_lines
from ..coils import combine, estimate_sensitivities
from ..fourier import fftc, ifft2c
from .sets import SliceSet, Stacked


def as_cases(
    slices: SliceSet,
    *,
    geometry: Geometry = "slice",
    initial: int = 0,
    indices: tuple[int, int] | None = None,
    points: bool = False,
    sensitivity_lines: int = 0,
    mapped: bool = False,
) -> Cases:
    """Make cases of slices.

    Volumes of fewer slices than others are filled up with empty ones, which `Cases.slices` marks.

    Args:
        slices: The slices.
        geometry: `slice`, `stack` or `volume3d`.
        initial: Centre columns that are acquired before the first action.
        indices: First and last column that may be acquired; None is all.
        points: Actions are points (kz, ky) of `volume3d`.
        sensitivity_lines: Several coils: estimate sensitivities from so many centre columns, where the scans
            bring none; 0 combines coils by their root sum of squares. The target becomes the image that all
            columns give with them.
        mapped: Geometry `slice` without estimates: leave k-space, target and labels on the disk.

    Raises:
        ConfigError: No column is left to choose.
        DataError: Volumes are asked for and unknown.
    """
    if geometry == "slice":
        groups: Sequence[Sequence[int]] = [(index,) for index in range(len(slices))]
        ids = slices.ids
    else:
        groups = slices.volumes
        ids = tuple(slices.volume_name(volume) for volume in groups)
    depth = max(len(group) for group in groups)
    index = torch.full((len(groups), depth), -1, dtype=torch.int64)
    for row, group in enumerate(groups):
        index[row, : len(group)] = torch.tensor(group)
    there = index >= 0
    width = slices.shape[1]
    padding = (slices.padding[index.clamp_min(0)] & there.unsqueeze(-1)).any(dim=1)
    deep = depth if points else 1
    values = _arrays(slices, index, geometry, sensitivity_lines, mapped=mapped)
    return Cases(
        ids=ids,
        possible=possible_lines(len(groups), width, indices=indices, padding=padding, depth=deep),
        initial=initial_lines(len(groups), width, initial, padding=padding, depth=deep),
        geometry=geometry,
        coils=slices.multi_coil,
        points=points,
        slices=None if geometry == "slice" or bool(there.all()) else there,
        **values,
    )


def _arrays(
    slices: SliceSet, index: Tensor, geometry: Geometry, sensitivity_lines: int, *, mapped: bool
) -> dict[str, Any]:
    """k-space, target, labels and sensitivities in the shape of the geometry."""
    given = slices.sensitivities
    estimate = slices.multi_coil and given is None and sensitivity_lines > 0
    if mapped and geometry == "slice" and not estimate:
        # `Stacked` is indexed and moved as a tensor is, and read where it lies.
        parts = {
            "kspace": slices.kspace,
            "target": slices.target,
            "labels": slices.labels,
            "sensitivities": given,
        }
        return {name: cast(Tensor, part) for name, part in parts.items()}
    kspace = _gathered(slices.kspace, index)
    target = _gathered(slices.target, index)
    labels = None if slices.labels is None else _gathered(slices.labels, index)
    sensitivities = None if given is None else _gathered(given, index)
    if estimate:
        flat = kspace.flatten(0, 1)
        found = estimate_sensitivities(flat, sensitivity_lines)
        target = combine(ifft2c(flat), found).abs().view(target.shape)
        sensitivities = found.view(kspace.shape)
    if geometry == "slice":
        kspace, target = kspace[:, 0], target[:, 0]
        labels = None if labels is None else labels[:, 0]
        sensitivities = None if sensitivities is None else sensitivities[:, 0]
    elif slices.multi_coil:
        # Coils come before slices.
        kspace = kspace.transpose(1, 2).contiguous()
        sensitivities = None if sensitivities is None else sensitivities.transpose(1, 2).contiguous()
    if geometry == "volume3d":
        if (
            slices.simulation is not None
            and slices.simulation.scope != "scan"
            and slices.simulation.phase != "none"
        ):
            raise DataError(
                "geometry volume3d",
                why="each slice has a phase of its own, which no volume has",
                do="--set sample.phase_scope=scan",
            )
        kspace = fftc(kspace, (-3,))
    return {"kspace": kspace, "target": target, "labels": labels, "sensitivities": sensitivities}


def _gathered(stacked: Stacked, index: Tensor) -> Tensor:
    """Rows ``(N, D, ...)``; zeros where the index is -1."""
    found = stacked[index.clamp_min(0)]
    empty = index < 0
    if bool(empty.any()):
        found[empty] = 0
    return found
