"""What a move earns the first of two windows.

A reward is chosen by its registry key, ``env.reward``; a plugin registers one as a factory that gives a
`Reward`. Of `tie`, `shaping` and `scales` it is given what it has a parameter for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.isolation import plugin_code

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager
    from medrl.plugins.spars.play_config import EnvConfig

Tie: TypeAlias = Literal["zero", "win"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What E episodes have after both windows moved; the first window is that of the learner.

    Attributes:
        scores: ``(E, 2)`` of the windows after the move.
        before: ``(E, 2)`` of the windows before it; equal to `scores` where the reward does not need them.
        wide: ``(E, 2)`` mean scores in windows of several sizes about the same centres, after the move.
        wide_before: ``(E, 2)`` the same before it.
        fresh: ``(E, 2)`` bool, whether nobody was at the place in this episode.
    """

    scores: Tensor
    before: Tensor
    wide: Tensor
    wide_before: Tensor
    fresh: Tensor


class Reward(Protocol):
    """Pays the first window.

    Attributes:
        scales: Relative sizes of the windows of `Outcome.wide`; empty where it is not needed.
        needs_before: Whether `Outcome.before` is needed; it costs a score at the start of an episode.
    """

    scales: tuple[float, ...]
    needs_before: bool

    def __call__(self, outcome: Outcome) -> Tensor:
        """Rewards ``(E,)`` float32."""
        ...


class SignReward:
    """+1 for the higher score, -1 for the lower one.

    Args:
        tie: Equal scores earn 0, or count as a win (original). With 0, swapping the windows negates it.

    Source: SPARS best_RL.py, ``step``; specification §4.

    >>> SignReward().of(torch.tensor([[0.2, 0.1], [0.1, 0.2], [0.1, 0.1]])).tolist()
    [1.0, -1.0, 0.0]
    """

    scales: tuple[float, ...] = ()
    needs_before = False

    def __init__(self, tie: Tie = "zero") -> None:
        if tie not in ("zero", "win"):
            raise ConfigError("env.tie", why=f"unknown: {tie!r}", do="zero, win")
        self.tie: Tie = tie

    def __call__(self, outcome: Outcome) -> Tensor:
        """See `Reward`."""
        return self.of(outcome.scores)

    def of(self, scores: Tensor) -> Tensor:
        """Rewards ``(...)`` of pairs of scores ``(..., 2)``."""
        paid = torch.sign(scores[..., 0] - scores[..., 1])
        return torch.where(paid == 0.0, 1.0, paid) if self.tie == "win" else paid


class DifferenceReward:
    """The difference of the scores, which tells more than its sign; zero-sum.

    Args:
        scale: Factor.
    """

    scales: tuple[float, ...] = ()
    needs_before = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = float(scale)

    def __call__(self, outcome: Outcome) -> Tensor:
        """See `Reward`."""
        return self.scale * (outcome.scores[..., 0] - outcome.scores[..., 1])


class MultiscaleReward:
    """The sign of the difference of mean scores in windows of several sizes: far places tie less often.

    Args:
        scales: Relative sizes.
        tie: As in `SignReward`.
    """

    needs_before = False

    def __init__(self, scales: Sequence[float] = (1.0, 2.0, 4.0), tie: Tie = "zero") -> None:
        self.scales = _sizes(scales)
        self._sign = SignReward(tie)

    def __call__(self, outcome: Outcome) -> Tensor:
        """See `Reward`."""
        return self._sign.of(outcome.wide)


class ShapedReward:
    """The sign, and beside it what the learner's own move gained: dense, and no longer zero-sum.

    Args:
        sign: Weight of the sign of the difference of scores.
        shaping: Weight of what the mean score in windows of several sizes gained by the move. A potential: a
            path that comes back has gained nothing, so that the best paths stay the best (for discount 1).
        found: Weight of the score at places where nobody was in this episode.
        scales: Relative sizes of the potential's windows; ``(1.0,)`` takes the score itself, which any scorer
            gives.
        tie: As in `SignReward`.

    Source: Ng, Harada and Russell 1999 for the potential.
    """

    def __init__(
        self,
        *,
        sign: float = 1.0,
        shaping: float = 10.0,
        found: float = 0.0,
        scales: Sequence[float] = (1.0, 2.0, 4.0),
        tie: Tie = "zero",
    ) -> None:
        sizes = _sizes(scales)
        self.sign, self.shaping, self.found = float(sign), float(shaping), float(found)
        self.scales = () if sizes == (1.0,) or self.shaping == 0.0 else sizes
        self.needs_before = sizes == (1.0,) and self.shaping != 0.0
        self._sign = SignReward(tie)

    def __call__(self, outcome: Outcome) -> Tensor:
        """See `Reward`."""
        after, before = (
            (outcome.wide, outcome.wide_before) if self.scales else (outcome.scores, outcome.before)
        )
        paid = self.sign * self._sign.of(outcome.scores)
        paid = paid + self.shaping * (after[..., 0] - before[..., 0])
        return paid + self.found * outcome.scores[..., 0] * outcome.fresh[..., 0]


def _sizes(scales: Sequence[float]) -> tuple[float, ...]:
    found = tuple(float(scale) for scale in scales)
    if not found or min(found) <= 0.0:
        raise ConfigError("scales of the reward", why=f"{list(scales)}", do="give positive numbers")
    return found


def sign(tie: Tie = "zero") -> Reward:
    """See `SignReward`."""
    return SignReward(tie)


def difference(scale: float = 1.0) -> Reward:
    """See `DifferenceReward`."""
    return DifferenceReward(scale)


def multiscale(scales: Sequence[float] = (1.0, 2.0, 4.0), tie: Tie = "zero") -> Reward:
    """See `MultiscaleReward`."""
    return MultiscaleReward(scales, tie)


def shaped(
    sign: float = 1.0,
    shaping: float = 10.0,
    found: float = 0.0,
    scales: Sequence[float] = (1.0, 2.0, 4.0),
    tie: Tie = "zero",
) -> Reward:
    """See `ShapedReward`."""
    return ShapedReward(sign=sign, shaping=shaping, found=found, scales=scales, tie=tie)


# -- by registry key -----------------------------------------------------------------------------------

_TRIED = 3
"""Episodes of the outcome that a reward is tried on."""


def build_reward(env: EnvConfig, manager: PluginManager, *, dense: bool) -> Reward:
    """Build the reward of a config, and try it on an outcome.

    Args:
        env: Key, parameters, and what is offered to all rewards: `tie` and `shaping`.
        manager: Rewards by key.
        dense: Whether the scorer has a dense form; without one, scales are ``(1.0,)`` unless
            `env.reward_params` says something else.

    Raises:
        ConfigError: There is no such reward, it refuses its parameters, or it pays something else than moves
            of windows.
        PluginError: It breaks.
    """
    what = f"env.reward '{env.reward}'"
    offered: dict[str, Any] = {"tie": env.tie, "shaping": env.shaping}
    if not dense:
        offered["scales"] = (1.0,)
    reward: Any = manager.registry("rewards").fit(env.reward, offered, **env.reward_params)
    missing = [name for name in ("scales", "needs_before") if not hasattr(reward, name)]
    if missing or not callable(reward):
        raise ConfigError(
            what,
            why=f"it does not pay moves of windows, it has no {' and no '.join(missing or ['__call__'])}",
            do="give one whose summary in `medrl plugins info spars` fits",
        )
    none = torch.zeros(_TRIED, 2)
    outcome = Outcome(
        scores=none, before=none, wide=none, wide_before=none, fresh=torch.ones(_TRIED, 2, dtype=torch.bool)
    )
    with plugin_code(what, "paying a move"):
        paid = reward(outcome)
    if not isinstance(paid, Tensor) or paid.shape != (_TRIED,):
        found = list(paid.shape) if isinstance(paid, Tensor) else type(paid).__name__
        raise ConfigError(what, why=f"of {_TRIED} episodes it gave {found}, expected [{_TRIED}]")
    built: Reward = reward
    return built
