"""What the report of an evaluation shows of some cases: masks slice by slice, and the paths of policies."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.report import Section, escape, gallery, overlay_panel

from .drawing import Walk, draw_walks
from .hunting import TITLES
from .policies import Visits

PATHS = ("greedy", "self-play", "random")
"""Policies whose paths are drawn; those of a scan and of tiles are no paths."""
_WIDTH = "max-width:100%;height:auto"


@dataclass(frozen=True, eq=False, kw_only=True)
class Shown:
    """One case.

    Attributes:
        volume: ``(X, Y, Z)`` in [0, 1].
        truth: ``(X, Y, Z)`` bool.
        spacing_mm: Voxel size.
        walks: By policy.
    """

    volume: NDArray[np.float32]
    truth: NDArray[np.bool_]
    spacing_mm: Sequence[float]
    walks: dict[str, Walk] = field(default_factory=dict)


class Album:
    """Keeps what is shown of the first cases with and without a lesion.

    Args:
        window: Voxels of a window.
        target: What is looked for.
        present: Cases with a lesion.
        free: Cases without one.
    """

    def __init__(
        self, window: Sequence[int], *, target: str = "lesion", present: int = 3, free: int = 1
    ) -> None:
        self.window, self.target, self.left = tuple(window), target, {True: present, False: free}
        self.cases: dict[str, Shown] = {}

    def add(
        self,
        case: str,
        policy: str,
        *,
        volume: Tensor,
        truth: Tensor,
        mask: Tensor,
        visits: Visits,
        spacing_mm: Sequence[float],
    ) -> None:
        """Keep what a policy did in a case, where the case is one that is shown."""
        if case not in self.cases:
            present = bool(truth.any())
            if not self.left[present]:
                return
            self.left[present] -= 1
            self.cases[case] = Shown(
                volume=volume.cpu().float().clamp(0.0, 1.0).numpy(),
                truth=truth.cpu().numpy(),
                spacing_mm=[float(size) for size in spacing_mm],
            )
        centres = visits.corners.cpu().float() + torch.tensor(self.window) / 2.0
        self.cases[case].walks[policy] = Walk(
            centres=centres.numpy() if policy in PATHS else np.zeros((0, 3), dtype=np.float32),
            episode=visits.episode.cpu().numpy() if policy in PATHS else np.zeros(0, dtype=np.int64),
            agent=visits.agent.cpu().numpy() if policy in PATHS else np.zeros(0, dtype=np.int64),
            mask=mask.cpu().numpy(),
        )

    def sections(self) -> list[Section]:
        """Masks slice by slice, and paths; nothing where no case was kept."""
        if not self.cases:
            return []
        panels = {name: _panel(name, case, self.target) for name, case in self.cases.items()}
        paths = "".join(_paths(name, case) for name, case in self.cases.items())
        return [Section("Masks", gallery(panels), _MASKS), Section("Paths", paths, _PATHS)]


def _panel(name: str, case: Shown, target: str) -> str:
    maps: dict[str, NDArray[Any]] = {"reference": case.truth.astype(np.uint8)}
    for policy in ("scan", "self-play"):
        if policy in case.walks:
            maps[TITLES[policy]] = np.asarray(case.walks[policy].mask, dtype=np.uint8)
    return overlay_panel(case.volume, maps, title=name, spacing=case.spacing_mm, names={target: 1}, axis=2)


def _paths(name: str, case: Shown) -> str:
    walks: Mapping[str, Walk] = {
        TITLES[policy]: case.walks[policy] for policy in PATHS if policy in case.walks
    }
    if not walks:
        return ""
    picture = draw_walks(case.volume, walks, truth=case.truth, spacing_mm=case.spacing_mm)
    address = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    words = name if case.truth.any() else f"{name}, without a lesion"
    return (
        f"<figure><h3>{escape(words)}</h3>"
        f'<img src="{address}" alt="paths in {escape(name)}" style="{_WIDTH}"></figure>'
    )


_MASKS = "Masks on the grid of the prepared volume, with the threshold that validation chose."
_PATHS = (
    "Three planes through the reference. Orange and blue: the first and the second window of some episodes, "
    "their centres projected to the plane, a dot where they end; green: all visited windows. Yellow: the "
    "mask that visits give; pink: the reference."
)
