"""Pictures of paths: where windows went in a volume, over its slices."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
_COLOURS = ("#e69f00", "#56b4e9")
"""Of the two windows of an episode (Okabe and Ito 2008)."""


def draw_path(
    volume: NDArray[np.float32],
    centres: NDArray[np.float32],
    episode: NDArray[np.int64],
    agent: NDArray[np.int64],
    *,
    mask: NDArray[np.bool_] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
    episodes: int = 4,
) -> bytes:
    """Draw the paths of some episodes as PNG: three planes through the mask, or through the last window.

    Args:
        volume: ``(X, Y, Z)`` in [0, 1], axes in RAS order.
        centres: ``(M, 3)`` centres of visited windows in voxels.
        episode: ``(M,)`` number of the episode.
        agent: ``(M,)`` 0 or 1.
        mask: ``(X, Y, Z)`` bool, whose outline is drawn.
        spacing_mm: Voxel size.
        title: Above the picture.
        episodes: At most so many episodes are drawn; the visits of all are shown as points.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 4.2), dpi=100, facecolor="black", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, (name, axis) in enumerate(_PLANES, start=1):
        axes = figure.add_subplot(1, 3, number)
        across, up = (other for other in range(3) if other != axis)
        index = _slice(volume.shape[axis], axis, mask, centres)
        axes.imshow(
            np.take(volume, index, axis=axis).T,
            cmap="gray",
            vmin=0.0,
            vmax=1.0,
            origin="lower",
            aspect=spacing_mm[up] / spacing_mm[across],
            interpolation="nearest",
        )
        if mask is not None:
            outline = np.take(mask, index, axis=axis).T.astype(float)
            if outline.any() and min(outline.shape) > 1:
                axes.contour(outline, levels=[0.5], colors=["#f0e442"], linewidths=1.4)
        if len(centres):
            axes.scatter(centres[:, across], centres[:, up], s=3, c="#009e73", alpha=0.5, linewidths=0)
        for which in range(min(episodes, int(episode.max()) + 1 if len(episode) else 0)):
            for one in (0, 1):
                path = centres[(episode == which) & (agent == one)]
                if len(path):
                    axes.plot(path[:, across], path[:, up], color=_COLOURS[one], linewidth=0.9)
                    axes.plot(path[-1, across], path[-1, up], marker="o", markersize=3, color=_COLOURS[one])
        axes.set_title(f"{name}, slice {index + 1} of {volume.shape[axis]}", color="white", fontsize=9)
        axes.set_axis_off()
    figure.suptitle(title, color="white", fontsize=10)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _slice(size: int, axis: int, mask: NDArray[np.bool_] | None, centres: NDArray[np.float32]) -> int:
    if mask is not None and mask.any():
        others = tuple(other for other in range(3) if other != axis)
        return int(np.count_nonzero(mask, axis=others).argmax())
    if len(centres):
        return int(np.clip(centres[-1, axis], 0, size - 1))
    return size // 2
