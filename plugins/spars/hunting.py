"""Policies over score tables: from a name to visits, from visits to a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.cache import Cache, cache_root
from medrl.core.errors import CheckpointError, ConfigError

from .config import SparsConfig
from .lattice import Lattice, Lattices
from .maps import score_map
from .observer import Observer
from .play_config import MapConfig
from .policies import Episodes, GreedyLookAhead, Policy, RandomTiles, RandomWalk, Scan, SelfPlay, Visits, run
from .table import ScoreTable

if TYPE_CHECKING:
    from .agent import HuntAgent
    from .scoring import ScorerModule

NAMES = ("scan", "greedy", "self-play", "random", "tiles")
TITLES = {
    "scan": "exhaustive scan",
    "greedy": "greedy look-ahead",
    "self-play": "self-play",
    "random": "random walk",
    "tiles": "random tiles",
}


def make_table(
    cfg: SparsConfig,
    scorer: ScorerModule,
    volumes: Sequence[Tensor],
    ids: Sequence[str],
    *,
    content: Sequence[str] | None = None,
    cached: bool = True,
) -> ScoreTable:
    """The table of scores of some volumes, on the device of the scorer.

    Args:
        cfg: Window, stride, starts.
        scorer: Frozen.
        volumes: ``(X, Y, Z)`` each.
        ids: Their names.
        content: A hash of each volume as it was prepared; computed if left out.
        cached: Keep scores on disk, if the config says so too.
    """
    cache = Cache(cache_root(cfg.data.root)) if cached and cfg.score.cache else None
    faithful = scorer.kind == "faithful"
    return ScoreTable(
        [volume.to(scorer.device) for volume in volumes],
        scorer,
        window=cfg.score.window,
        stride=cfg.score.stride,
        start=cfg.env.start,
        ids=ids,
        cache=cache,
        content=content,
        interpolation="trilinear" if faithful else "none",
        scales=cfg.score.scales if scorer.has_dense else (1.0,),
        batch=cfg.score.batch,
    )


def policy_named(name: str, cfg: SparsConfig, table: ScoreTable, agent: HuntAgent | None = None) -> Policy:
    """Make a policy.

    Args:
        name: One of `NAMES`.
        cfg: Sizes of what an agent sees.
        table: The volumes.
        agent: For self-play.

    Raises:
        ConfigError: There is no such policy.
        CheckpointError: Self-play needs an agent and there is none.
    """
    if name == "self-play":
        if agent is None:
            raise CheckpointError(
                "policy self-play", why="this run has no trained agent", do="medrl train spars --stage play"
            )
        return SelfPlay(agent, Observer.of(table, **sizes(cfg)))
    simple: dict[str, Callable[[], Policy]] = {
        "scan": Scan,
        "greedy": GreedyLookAhead,
        "random": RandomWalk,
        "tiles": RandomTiles,
    }
    if name not in simple:
        raise ConfigError(f"--policy {name}", why="unknown", do=", ".join(NAMES))
    return simple[name]()


def sizes(cfg: SparsConfig) -> dict[str, Any]:
    """What the config says of the sizes of views and windows that an agent reads."""
    return {name: cfg.agent.params[name] for name in ("view_size", "window_size") if name in cfg.agent.params}


def blank_observer(cfg: SparsConfig) -> Observer:
    """An observer of one empty volume, of which a network takes its sizes."""
    window = cfg.score.window
    lattices = Lattices([Lattice.of(window, window, cfg.score.stride)])
    return Observer([torch.zeros(window)], lattices, **sizes(cfg))


def plan_of(
    cfg: SparsConfig, *, episodes: int | None = None, horizon: int | None = None, budget: int | None = None
) -> Episodes:
    """How long a policy may go on in one volume.

    Args:
        cfg: Defaults and starts.
        episodes: Rollouts.
        horizon: Steps of each.
        budget: Windows that may be scored; None is no limit.
    """
    return Episodes(
        episodes=episodes or cfg.map.episodes,
        steps=horizon or cfg.map.horizon,
        start=cfg.env.start,
        budget=budget,
    )


def hunt(
    table: ScoreTable, index: int, policy: Policy, plan: Episodes, *, seed: int, name: str = ""
) -> Visits:
    """Visits of a policy in a volume; starts and moves follow from the seed and the name of the volume."""
    stream = torch.Generator(device=table.device)
    stream.manual_seed(rng.derive_seed(seed, "spars", "hunt", name or table.ids[index]))
    return run(policy, table, index, plan, stream)


def map_of(table: ScoreTable, index: int, visits: Visits, cfg: MapConfig) -> Tensor:
    """Map ``(X, Y, Z)`` on the CPU of what was visited."""
    return score_map(table, index, visits, cfg).detach().cpu()
