"""One picture of one case: slices of three planes in true proportions, with contours of its labels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.dataset import Dataset, list_inputs, load_case, open_dataset, stack_channels
from medrl.core.dataset.loading import load_label
from medrl.core.errors import DataError, MedrlError
from medrl.core.types import Case, Volume
from medrl.core.volume import to_ras, turn_like

# Plane, axis that is cut, names of the ends of the horizontal and the vertical axis (left end first).
_PLANES = (("axial", 2, "R L", "P A"), ("coronal", 1, "R L", "I S"), ("sagittal", 0, "P A", "I S"))
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2", "#ffffff")
"""Colours that people with colour-vision deficiency tell apart (Okabe and Ito 2008), then white."""


def preview_case(
    source: Dataset | Path | str,
    case: Case | str | None = None,
    *,
    label: Path | Volume | None = None,
    channel: int = 0,
) -> bytes:
    """Draw one case as PNG.

    Args:
        source: A dataset, its folder, or an image file or folder as `predict` takes it.
        case: Case or its identifier; the first one if left out.
        label: Label map to draw instead of the reference of the case, such as a prediction.
        channel: Channel of the image to draw.

    Returns:
        The bytes of a PNG file.

    Raises:
        DataError: The case does not exist, is damaged, or the label does not lie on its image.
    """
    dataset, found = _find(source, case)
    reference: Volume | None
    if label is None and dataset is not None:
        image, reference = load_case(dataset, found, with_label=found.label is not None)
    else:
        image = stack_channels(
            found, dataset.channel_names if dataset else (), dataset.root if dataset else None
        )
        path = label or found.label
        if isinstance(path, Volume):
            reference = turn_like(path, image)
            if reference is None:
                raise DataError(f"case {found.id}", why="the segmentation does not lie on its image")
        else:
            reference = load_label(found, path, image) if path is not None else None
    if not 0 <= channel < image.data.shape[0]:
        raise DataError(
            f"case {found.id}", why=f"no channel {channel}, it has {image.data.shape[0]}", case=found.id
        )
    names = dataset.declared_labels if dataset is not None else None
    return render(
        image.data[channel],
        image.affine,
        labels=reference.data[0] if reference is not None else None,
        names=names,
        title=found.id,
    )


def render(
    image: NDArray[Any],
    affine: NDArray[np.float64],
    *,
    labels: NDArray[Any] | None = None,
    names: Mapping[str, int] | None = None,
    title: str = "",
) -> bytes:
    """Draw an image `(X, Y, Z)` and the contours of its label map as PNG.

    The three planes are cut where most of the rarest label lies, such as a lesion, or through the middle.
    They are turned so that anterior and superior are up and the right side of the patient is on the left, as
    radiologists look at images; voxel edges keep their true proportions. An image that is one voxel
    thick gives one panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    ras, spacing = to_ras(image, affine)
    mask = to_ras(labels, affine)[0] if labels is not None else None
    values = [int(value) for value in np.unique(mask) if value != 0] if mask is not None else []
    low, high = _window(ras)
    thin = [axis for axis in range(3) if ras.shape[axis] == 1]
    planes = [plane for plane in _PLANES if not thin or plane[1] == thin[0]]
    figure = Figure(figsize=(3.6 * len(planes), 4.2), dpi=100, facecolor="black", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, (name, axis, across, up) in enumerate(planes, start=1):
        axes = figure.add_subplot(1, len(planes), number)
        index = _best_slice(mask, axis, ras.shape[axis])
        horizontal, vertical = (other for other in range(3) if other != axis)
        flip = across == "R L"  # the array runs from left to right of the patient: turn it round
        picture = _cut(ras, axis, index, flip)
        axes.imshow(
            picture,
            cmap="gray",
            vmin=low,
            vmax=high,
            origin="lower",
            aspect=spacing[vertical] / spacing[horizontal],
            interpolation="nearest",
        )
        for value in values:
            outline = (_cut(mask, axis, index, flip) == value).astype(float) if mask is not None else picture
            if outline.any() and min(outline.shape) > 1:
                axes.contour(outline, levels=[0.5], colors=[_colour(value)], linewidths=1.2)
        axes.set_title(f"{name}, slice {index + 1} of {ras.shape[axis]}", color="white", fontsize=9)
        axes.set_axis_off()
        _ends(axes, across, up)
    caption = title + ("" if mask is None else "   no label" if not values else "")
    figure.suptitle(caption, color="white", fontsize=10)
    if values:
        lookup = {number: name for name, number in (names or {}).items()}
        lines = [Line2D([], [], color=_colour(v), label=lookup.get(v, f"label {v}")) for v in values[:12]]
        figure.legend(
            handles=lines,
            loc="outside lower center",
            ncols=6,
            fontsize=8,
            labelcolor="white",
            facecolor="black",
        )
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _find(source: Dataset | Path | str, case: Case | str | None) -> tuple[Dataset | None, Case]:
    """Return the dataset, if the source is one, and the case."""
    if isinstance(case, Case):
        return (source if isinstance(source, Dataset) else None), case
    if isinstance(source, Dataset):
        dataset: Dataset | None = source
    else:
        source = Path(source)
        try:
            dataset = open_dataset(source) if source.is_dir() else None
        except MedrlError:
            # A folder with a dataset.json is meant as a dataset: its own error is the helpful one.
            if (source / "dataset.json").is_file() or (source / "cases.json").is_file():
                raise
            dataset = None
    if dataset is not None:
        cases = [*dataset.cases, *dataset.test_cases]
        if case is not None:
            return dataset, dataset.case(case)
    else:
        cases = list_inputs(Path(str(source)))
        if case is not None:
            cases = [item for item in cases if item.id == case]
    if not cases:
        raise DataError(str(source), why=f"no case '{case}'" if case else "no case was found")
    return dataset, cases[0]


def _window(image: NDArray[Any]) -> tuple[float, float]:
    """Return the grey-value range that shows most of the image: percentiles 1 and 99 of a sample."""
    sample = image.ravel()[:: max(image.size // 200_000, 1)]
    low, high = (float(value) for value in np.percentile(sample, (1, 99)))
    return (low, high) if high > low else (float(image.min()), float(image.min()) + 1.0)


def _best_slice(mask: NDArray[Any] | None, axis: int, size: int) -> int:
    """Return the slice with most voxels of the rarest label, the middle one without a label."""
    if mask is not None and mask.any():
        values, counts = np.unique(mask[mask != 0], return_counts=True)
        others = tuple(other for other in range(3) if other != axis)
        return int(np.count_nonzero(mask == values[counts.argmin()], axis=others).argmax())
    return size // 2


def _cut(volume: NDArray[Any], axis: int, index: int, flip: bool) -> NDArray[Any]:
    """Return one slice as rows (vertical axis, upwards) and columns (horizontal axis)."""
    plane: NDArray[Any] = np.take(volume, index, axis=axis).T
    return plane[:, ::-1] if flip else plane


def _ends(axes: Any, across: str, up: str) -> None:
    """Write the letters of the directions at the four edges."""
    from matplotlib.patheffects import Normal, Stroke

    (left, right), (down, top) = across.split(), up.split()
    places = ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.02, down), (0.5, 0.98, top))
    outline = [Stroke(linewidth=2, foreground="black"), Normal()]
    for x, y, letter in places:
        text = axes.text(
            x, y, letter, color="#ffd75f", fontsize=8, ha="center", va="center", transform=axes.transAxes
        )
        text.set_path_effects(outline)


def _colour(value: int) -> str:
    return _COLOURS[(value - 1) % len(_COLOURS)]
