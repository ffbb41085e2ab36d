"""The threshold of score maps, chosen on validation volumes: from image labels, or masks if asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import SparsConfig
from .hunting import hunt, make_table, map_of, plan_of, policy_named
from .measuring import Threshold, choose_by_images, choose_by_masks

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

    from .data import Loaded
    from .scoring import ScorerModule

FALLBACK = 0.5
"""Where validation can choose nothing (original)."""


def chosen(rt: Runtime, cfg: SparsConfig, data: Loaded, scorer: ScorerModule) -> dict[str, Any]:
    """What a checkpoint says of the threshold; the main rank chooses, all ranks get the same."""
    found = choose(cfg, data, scorer).as_dict() if rt.is_main else None
    return {"threshold": rt.ranks.exchange("the threshold", found)[0]}


def describe(rt: Runtime, cfg: SparsConfig, data: Loaded) -> None:
    """Choose the threshold of a classifier that is trained, and save it with its last checkpoint."""
    scorer = dict(rt.checkpoint.registered())["scorer"]
    rt.checkpoint.describe(**chosen(rt, cfg, data, scorer))
    rt.checkpoint.save(rt.completed)


def choose(cfg: SparsConfig, data: Loaded, scorer: ScorerModule) -> Threshold:
    """Choose on the maps of the exhaustive scan of validation volumes.

    The exhaustive scan needs no policy, so that policies do not differ by their threshold.
    """
    val = data.val
    if cfg.map.threshold is not None:
        return Threshold(value=cfg.map.threshold, by="none")
    if not scorer.has_dense or not len(val) or (cfg.map.choose == "image" and val.presence is None):
        return Threshold(value=FALLBACK, by="none")
    table = make_table(cfg, scorer, val.volumes, val.ids, content=val.keys)
    policy, plan = policy_named("scan", cfg, table), plan_of(cfg)
    maps = [
        map_of(table, at, hunt(table, at, policy, plan, seed=cfg.train.seed), cfg.map)
        for at in range(len(val))
    ]
    if cfg.map.choose == "mask":
        return choose_by_masks(maps, val.open_masks(), cfg.map, cfg.map.thresholds)
    return choose_by_images(maps, [bool(label) for label in val.labels()], cfg.map, cfg.map.thresholds)
