"""From visits to a map of a volume: what visited windows paint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

from .aggregate import segment
from .lattice import Lattice
from .painting import nested, paint, visit_count
from .policies import Visits
from .table import ScoreTable

if TYPE_CHECKING:
    from .play_config import MapConfig


def score_map(table: ScoreTable, index: int, visits: Visits, cfg: MapConfig) -> Tensor:
    """What visits paint on a volume ``(X, Y, Z)`` float32.

    ``coarse`` paints the scores of the windows; ``nested`` those of finer windows inside them; ``dense`` the
    score of every voxel inside them.

    Args:
        table: Volumes and scores.
        index: Number of the volume.
        visits: Of that volume.
        cfg: What is painted, and what becomes of several visits.

    Raises:
        ConfigError: The scorer has no dense form, and the map needs one.
    """
    lattice = table.lattices[index]
    if cfg.paint == "coarse":
        return paint(lattice.shape, lattice.window, visits.corners, visits.scores).of(cfg.aggregate)
    dense = table.dense(index)
    if dense is None:
        raise ConfigError(
            f"map.paint {cfg.paint}",
            why=f"scores of '{table.scorer.kind}' have no dense form",
            do="--set map.paint=coarse",
        )
    if cfg.paint == "dense":
        return dense * (visit_count(lattice.shape, lattice.window, visits.corners) > 0)
    fine = Lattice.of(lattice.shape, cfg.fine, cfg.fine_stride)
    corners = fine.corners(table.device)
    scores = table.scorer.windows(table.volumes[index], corners, fine.window).to(table.device)
    return nested(lattice, visits.corners, fine, scores.view(fine.counts), cfg.aggregate)


def segment_with(score_map: Tensor, threshold: float, cfg: MapConfig, organ: Tensor | None = None) -> Tensor:
    """Make a mask ``(X, Y, Z)`` bool of a map, as a config says; see `segment`."""
    return segment(
        score_map,
        threshold=threshold,
        normalise=cfg.normalise,
        floor=cfg.floor,
        smallest=cfg.smallest,
        largest=cfg.largest,
        organ=organ,
    )


def as_original(visits: Visits, tau: float | None) -> Visits:
    """What the original would have painted of the visits of two windows.

    Only the first window paints, and with the score of the second; nothing remains of episodes in which a
    score exceeded `tau`.

    Args:
        visits: Of walks of two windows.
        tau: Score that ends an episode; None is never.

    Raises:
        ConfigError: There are no second windows.

    Source: SPARS best_RL.py 142-144; specification §9, defects 1 and 2.
    """
    first, second = visits.agent == 0, visits.agent == 1
    one = torch.stack([visits.episode[first], visits.step[first]])
    if not torch.equal(one, torch.stack([visits.episode[second], visits.step[second]])):
        raise ConfigError("the painting of the original", why="it needs the visits of two windows")
    scores = visits.scores[second]
    keep = torch.ones_like(scores, dtype=torch.bool)
    if tau is not None:
        lost = torch.unique(visits.episode[visits.scores > tau])
        keep = ~torch.isin(visits.episode[first], lost)
    return replace(
        visits,
        corners=visits.corners[first][keep],
        scores=scores[keep],
        episode=visits.episode[first][keep],
        step=visits.step[first][keep],
        agent=visits.agent[first][keep],
    )
