"""Pictures of paths: where windows went in a volume, over its slices."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
_COLOURS = ("#e69f00", "#56b4e9")
"""Of the two windows of an episode (Okabe and Ito 2008)."""
_MASK, _TRUTH, _VISIT = "#f0e442", "#cc79a7", "#009e73"


@dataclass(frozen=True, eq=False, kw_only=True)
class Walk:
    """Where windows were in one volume, and what became of it.

    Attributes:
        centres: ``(M, 3)`` centres of visited windows in voxels.
        episode: ``(M,)`` number of the episode.
        agent: ``(M,)`` 0 or 1.
        mask: ``(X, Y, Z)`` bool, whose outline is drawn.
        episodes: At most so many episodes are drawn as lines; the visits of all are shown as points.
    """

    centres: NDArray[np.float32]
    episode: NDArray[np.int64]
    agent: NDArray[np.int64]
    mask: NDArray[np.bool_] | None = None
    episodes: int = 4


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
        centres: As of `Walk`, and so are the next two.
        episode: See there.
        agent: See there.
        mask: See there.
        spacing_mm: Voxel size.
        title: Above the picture.
        episodes: See `Walk`.
    """
    walk = Walk(centres=centres, episode=episode, agent=agent, mask=mask, episodes=episodes)
    return draw_walks(volume, {"": walk}, spacing_mm=spacing_mm, title=title)


def draw_walks(
    volume: NDArray[np.float32],
    walks: Mapping[str, Walk],
    *,
    truth: NDArray[np.bool_] | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    title: str = "",
) -> bytes:
    """Draw several walks in one volume as PNG, one below the other, all in the same three planes.

    Args:
        volume: ``(X, Y, Z)`` in [0, 1], axes in RAS order.
        walks: By the name that stands above each.
        truth: ``(X, Y, Z)`` bool, whose outline is drawn too; planes go through it.
        spacing_mm: Voxel size.
        title: Above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (10.8, 0.4 + 3.8 * len(walks))
    figure = Figure(figsize=size, dpi=100, facecolor="black", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    place = 0
    shown = truth if truth is not None and truth.any() else None
    for name, walk in walks.items():
        for plane, axis in _PLANES:
            place += 1
            axes = figure.add_subplot(len(walks), 3, place)
            through = shown if shown is not None else walk.mask
            index = _slice(volume.shape[axis], axis, through, walk.centres)
            _plane(axes, volume, walk, shown, axis, index, spacing_mm)
            label = f"{name}: {plane}" if name else plane
            axes.set_title(f"{label}, slice {index + 1} of {volume.shape[axis]}", color="white", fontsize=9)
            axes.set_axis_off()
    figure.suptitle(title, color="white", fontsize=10)
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _plane(
    axes: Any,
    volume: NDArray[np.float32],
    walk: Walk,
    truth: NDArray[np.bool_] | None,
    axis: int,
    index: int,
    spacing_mm: Sequence[float],
) -> None:
    """One slice with outlines, points and lines."""
    across, up = (other for other in range(3) if other != axis)
    axes.imshow(
        np.take(volume, index, axis=axis).T,
        cmap="gray",
        vmin=0.0,
        vmax=1.0,
        origin="lower",
        aspect=spacing_mm[up] / spacing_mm[across],
        interpolation="nearest",
    )
    if across == 0:
        axes.invert_xaxis()  # the patient's right is on the left, as in the panels of reports
    centres, episode = walk.centres, walk.episode
    if len(centres):
        axes.scatter(centres[:, across], centres[:, up], s=3, c=_VISIT, alpha=0.5, linewidths=0)
    for which in range(min(walk.episodes, int(episode.max()) + 1 if len(episode) else 0)):
        for one in (0, 1):
            path = centres[(episode == which) & (walk.agent == one)]
            if len(path):
                axes.plot(path[:, across], path[:, up], color=_COLOURS[one], linewidth=0.9)
                axes.plot(path[-1, across], path[-1, up], marker="o", markersize=3, color=_COLOURS[one])
    for mask, colour in ((truth, _TRUTH), (walk.mask, _MASK)):
        if mask is None:
            continue
        outline = np.take(mask, index, axis=axis).T.astype(float)
        if outline.any() and min(outline.shape) > 1:
            axes.contour(outline, levels=[0.5], colors=[colour], linewidths=1.4)


def _slice(size: int, axis: int, mask: NDArray[np.bool_] | None, centres: NDArray[np.float32]) -> int:
    if mask is not None and mask.any():
        others = tuple(other for other in range(3) if other != axis)
        return int(np.count_nonzero(mask, axis=others).argmax())
    if len(centres):
        return int(np.clip(centres[-1, axis], 0, size - 1))
    return size // 2
