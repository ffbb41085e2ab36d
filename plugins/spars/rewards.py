"""What a move earns the first of two windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

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
