"""The environment: two windows in one volume, each after the higher score; E games at once, on one device.

Observations hold numbers of volumes and places of windows, so that rollouts keep no images; `Observer` makes
of them what a network reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeAlias

import gymnasium
import numpy as np
import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.plugins.spars.lattice import ACTIONS, legal_moves, move, moves
from medrl.plugins.spars.observer import TRAIL, Observer
from medrl.plugins.spars.painting import ScoreMap, paint
from medrl.plugins.spars.rewards import Outcome, Reward
from medrl.plugins.spars.table import ScoreTable

Writers: TypeAlias = Literal["agent", "both"]
Painting: TypeAlias = Literal["own", "original"]
Bounds: TypeAlias = Literal["mask", "noop"]
_LARGEST = 65535.0
"""Absolute value that no voxel of a prepared volume exceeds; raw Hounsfield units included."""
_FIXED = 8
"""Numbers that an episode draws beside its noise: volume, two places, opponent."""


class Opponent(Protocol):
    """Moves the second window."""

    def act(self, env: HuntEnv) -> Tensor:
        """Actions ``(E,)`` on what the second window sees before anybody moves."""
        ...


class RandomOpponent:
    """Legal moves, all alike."""

    def act(self, env: HuntEnv) -> Tensor:
        """See `Opponent`."""
        return env.noise(1).masked_fill(~env.action_masks(1), -torch.inf).argmax(dim=1)


class HuntEnv:
    """E games of two windows; the `BatchedEnv` of medrl, whose actions are those of the first window.

    Both windows move, then both are scored. An episode terminates where a score exceeds `tau`, and is
    truncated after `horizon` steps. Each game has a generator of its own, so that its course depends on its
    seed and its moves, and not on how many are played at once.

    Args:
        table: Volumes and the scores of their windows.
        reward: Pays the first window.
        num_envs: E.
        start: ``random`` places, one for each window; else both at the place that the table's lattice has for
            its own start.
        bounds: ``mask``: moves out of the volume are masked; ``noop``: all moves are offered. Whoever makes
            one all the same stays where it is.
        tau: Score above which an episode terminates, strictly; None is never.
        horizon: Steps after which it is truncated.
        writers: Whose windows are painted: of the first (original), or of both.
        painting: ``own``: each window with its own score; ``original``: the first window with the score of
            the second, and nothing remains of episodes that terminate.
        maps: Give the maps of episodes that end as ``maps`` in the info: a dict by the number of the game.
        observe: ``("view",)`` adds the low-resolution view to observations, for agents of other libraries.
        observer: Makes that view; one of the default size if left out.
        weights: ``(N,)``, how often each volume is played; None is uniform.
        opponent: Moves the second window in `step`.
        seed: Of all games.
        first: Number of the first game, so that ranks play different ones.

    Attributes:
        case: ``(E,)`` volume of each game.
        node: ``(E, 2, 3)`` places of the windows.
        time: ``(E,)`` steps done.
        lead: ``(E,)`` steps that the first window won less those that it lost.
        member: ``(E,)`` float64 in [0, 1), drawn for whoever chooses opponents.

    Raises:
        ConfigError: A number is out of its range.

    Deviation: episodes do not start again by themselves (`BatchedEnv`), so that terminal maps are not lost;
    windows never leave the volume; each window paints its own score.

    Source: SPARS best_RL.py; specification §4.
    """

    def __init__(
        self,
        table: ScoreTable,
        reward: Reward,
        *,
        num_envs: int,
        start: Literal["random", "centre", "corner_center"] = "random",
        bounds: Bounds = "mask",
        tau: float | None = 0.3,
        horizon: int = 32,
        writers: Writers = "both",
        painting: Painting = "own",
        maps: bool = False,
        observe: Sequence[str] = (),
        observer: Observer | None = None,
        weights: Tensor | None = None,
        opponent: Opponent | None = None,
        seed: int = 0,
        first: int = 0,
    ) -> None:
        _check(table, num_envs, horizon, observe, weights, start)
        self.table, self.reward, self.lattices = table, reward, table.lattices
        self.num_envs, self.horizon, self.tau = int(num_envs), int(horizon), tau
        self.start, self.bounds, self.writers, self.painting = start, bounds, writers, painting
        self.maps, self.observe = bool(maps), tuple(observe)
        self.observer = Observer.of(table) if observer is None else observer
        self.opponent: Opponent = opponent if opponent is not None else RandomOpponent()
        self.first = int(first)
        device = self.device = table.device
        counts = torch.ones(len(table)) if weights is None else weights.detach().cpu()
        self._cumulative = (counts.double() / counts.double().sum()).cumsum(0)
        self._wide = self._wide_scores()
        self._moves = moves(device)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(num_envs, *shape, dtype=dtype, device=device)

        self.case = zeros(dtype=torch.int64)
        self.node = zeros(2, 3, dtype=torch.int64)
        self.time = zeros(dtype=torch.int64)
        self.lead = zeros(dtype=torch.int64)
        self.member = zeros(dtype=torch.float64)
        self._visits = zeros(horizon, 2, 3, dtype=torch.int64)
        self._flat = torch.full((num_envs, horizon * 2), -1, dtype=torch.int64, device=device)
        self._scores = zeros(horizon, 2)
        self._noise = zeros(horizon, 2, ACTIONS)
        self._sum = zeros(2, 3)
        self._before = zeros(2)
        self._ended = torch.ones(num_envs, dtype=torch.bool, device=device)
        self._generators = self._seeded(seed)
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self.observation_space = self._space()

    # -- episodes ----------------------------------------------------------------------------------

    def reset(self, seed: int | None = None, indices: Tensor | None = None) -> dict[str, Tensor]:
        """Start new episodes; see `BatchedEnv.reset`."""
        if seed is not None:
            self._generators = self._seeded(seed)
        chosen = torch.arange(self.num_envs) if indices is None else indices.cpu().sort().values
        size = _FIXED + self.horizon * 2 * ACTIONS
        each = [
            torch.rand(size, generator=self._generators[number], dtype=torch.float64)
            for number in chosen.tolist()
        ]
        if not each:
            return self.observation()
        drawn = torch.stack(each).to(self.device)
        case = torch.searchsorted(self._cumulative.to(self.device), drawn[:, 0].contiguous(), right=True)
        case = case.clamp(max=len(self.table) - 1)
        counts = self.lattices.counts[case].unsqueeze(1)
        if self.start == "random":
            node = (drawn[:, 1:7].view(-1, 2, 3) * counts).long().minimum(counts - 1)
        else:
            node = self.lattices.start[case].unsqueeze(1).expand(-1, 2, -1)
        where = chosen.to(self.device)
        uniform = drawn[:, _FIXED:].view(-1, self.horizon, 2, ACTIONS).clamp(min=1e-300)
        self._noise[where] = (-(-uniform.log()).clamp(min=1e-300).log()).float()
        self.member[where] = drawn[:, 7]
        self._begin(where, case, node)
        return self.observation()

    def begin(self, case: Tensor, node: Tensor) -> dict[str, Tensor]:
        """Start all episodes at given nodes ``(E, 2, 3)`` of given volumes ``(E,)``.

        Raises:
            ConfigError: A place is not in its volume.
        """
        counts = self.lattices.counts[case.to(self.device)].unsqueeze(1)
        places = node.to(self.device)
        if places.shape != self.node.shape or bool(((places < 0) | (places >= counts)).any()):
            raise ConfigError("episodes", why=f"{self.num_envs} pairs of places inside are expected")
        self.reset()
        self._begin(torch.arange(self.num_envs, device=self.device), case.to(self.device), places)
        return self.observation()

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Move the first windows ``(E,)``; the opponent moves the second ones. See `BatchedEnv.step`."""
        other = self.opponent.act(self)
        return self.step_both(torch.stack([actions.to(self.device, torch.int64).view(-1), other], dim=1))

    @torch.no_grad()
    def step_both(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Move both windows ``(E, 2)``, then score both, all of them together.

        The info has ``scores`` ``(E, 2)`` and, with `maps`, ``maps``.

        Raises:
            RuntimeFault: An action does not exist, or an episode has ended.
        """
        wanted = actions.to(self.device, torch.int64)
        self._refuse(wanted)
        pair = self.case.unsqueeze(1).expand(-1, 2)
        counts = self.lattices.counts[self.case].unsqueeze(1)
        wide_before = self._wide_at(pair)
        self.node = move(self.node, wanted, counts)
        scores = self.table.at(pair, self.node)
        fresh = self._remember(pair, scores)
        outcome = Outcome(
            scores=scores,
            before=self._before if self.reward.needs_before else scores,
            wide=self._wide_at(pair),
            wide_before=wide_before,
            fresh=fresh,
        )
        rewards = self.reward(outcome).to(torch.float32)
        self._before = scores
        self.lead += torch.sign(scores[:, 0] - scores[:, 1]).long()
        none = torch.zeros_like(self._ended)
        terminated = none if self.tau is None else (scores > self.tau).any(dim=1)
        truncated = (self.time >= self.horizon) & ~terminated
        self._ended = terminated | truncated
        info: dict[str, Any] = {"scores": scores}
        if self.maps:
            info["maps"] = {
                number: self.map(number, lost=self.painting == "original" and bool(terminated[number]))
                for number in torch.nonzero(self._ended).flatten().tolist()
            }
        return self.observation(), rewards, terminated, truncated, info

    # -- what is seen ------------------------------------------------------------------------------

    def action_masks(self, agent: int = 0) -> Tensor:
        """Legal moves ``(E, 6)`` bool of one window; all where there is none, and with `bounds` ``noop``."""
        if self.bounds == "noop":
            return torch.ones(self.num_envs, ACTIONS, dtype=torch.bool, device=self.device)
        legal = legal_moves(self.node[:, agent], self.lattices.counts[self.case])
        return legal | ~legal.any(dim=1, keepdim=True)

    @torch.no_grad()
    def observation(self, agent: int = 0) -> dict[str, Tensor]:
        """What one of the windows sees now, of all E games; it does not hold a score.

        ``case`` ``(E, 1)`` and ``node`` ``(E, 2, 3)`` int64, the own place first; ``time`` ``(E, 1)``, the
        part of the horizon that is left; ``trail`` ``(E, 10)``, see `TRAIL`; and what `observe` names.
        """
        node = self.node if agent == 0 else self.node.flip(1)
        counts = self.lattices.counts[self.case]
        own = node[:, 0]
        around = torch.cat([own.unsqueeze(1), own.unsqueeze(1) + self._moves], dim=1)
        inside = ((around >= 0) & (around < counts.unsqueeze(1))).all(dim=2)
        number = (around[..., 0] * counts[:, None, 1] + around[..., 1]) * counts[:, None, 2] + around[..., 2]
        been = (number.unsqueeze(2) == self._flat.unsqueeze(1)).any(dim=2) & inside
        mean = self._sum[:, agent] / self.time.clamp(min=1).unsqueeze(1)
        way = torch.where(self.time.unsqueeze(1) > 0, mean - own, 0.0) / counts
        found = {
            "case": self.case.unsqueeze(1).clone(),
            "node": node.clone(),
            "time": (1.0 - self.time / self.horizon).unsqueeze(1),
            "trail": torch.cat([been.float(), way.float()], dim=1),
        }
        if "view" in self.observe:
            found["view"] = self.observer.view(self.case, own)
        return found

    def both(self) -> dict[str, Tensor]:
        """What both windows see, those of all first windows before those of all second ones ``(2E, ...)``."""
        one, other = self.observation(0), self.observation(1)
        return {name: torch.cat([one[name], other[name]]) for name in one}

    def noise(self, agent: int = 0) -> Tensor:
        """Gumbel noise ``(E, 6)`` for the next move of one window, drawn at the start of the episode."""
        at = self.time.clamp(max=self.horizon - 1)
        return self._noise[torch.arange(self.num_envs, device=self.device), at, agent]

    # -- what remains ------------------------------------------------------------------------------

    def visits(self, index: int) -> tuple[Tensor, Tensor]:
        """Corners ``(M, 3)`` and values ``(M,)`` that a game painted so far, in order."""
        done = int(self.time[index])
        nodes, scores = self._visits[index, :done], self._scores[index, :done]
        if self.painting == "original":
            scores = torch.stack([scores[:, 1], scores[:, 1]], dim=1)
        if self.writers == "agent":
            nodes, scores = nodes[:, :1], scores[:, :1]
        lattice = self.lattices[int(self.case[index])]
        return lattice.corner(nodes.reshape(-1, 3)), scores.flatten()

    def map(self, index: int, *, lost: bool = False) -> ScoreMap:
        """What a game painted so far; nothing where it is lost."""
        lattice = self.lattices[int(self.case[index])]
        corners, values = self.visits(index)
        keep = 0 if lost else len(corners)
        return paint(lattice.shape, lattice.window, corners[:keep], values[:keep])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        found = {name: getattr(self, name).cpu().clone() for name in _STATE}
        found["generators"] = torch.stack([item.get_state() for item in self._generators])
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        for item, value in zip(self._generators, state["generators"], strict=True):
            # A row of a larger tensor would be read from its beginning.
            item.set_state(value.cpu().clone())

    # -- private -----------------------------------------------------------------------------------

    def _seeded(self, seed: int) -> list[torch.Generator]:
        numbers = range(self.first, self.first + self.num_envs)
        return [rng.torch_generator(seed, "spars", "game", number) for number in numbers]

    def _begin(self, where: Tensor, case: Tensor, node: Tensor) -> None:
        self.case[where], self.node[where] = case, node
        self.time[where], self.lead[where] = 0, 0
        self._flat[where], self._sum[where] = -1, 0.0
        self._ended[where] = False
        if self.reward.needs_before:
            self._before[where] = self.table.at(case.unsqueeze(1).expand(-1, 2), node)

    def _remember(self, pair: Tensor, scores: Tensor) -> Tensor:
        """Write down where the windows are; return whether nobody was there ``(E, 2)``."""
        games = torch.arange(self.num_envs, device=self.device)
        number = self.lattices.flat(pair, self.node) - self.lattices.base[pair]
        fresh = ~(number.unsqueeze(2) == self._flat.unsqueeze(1)).any(dim=2)
        self._visits[games, self.time] = self.node
        self._scores[games, self.time] = scores
        self._flat[games, self.time * 2] = number[:, 0]
        self._flat[games, self.time * 2 + 1] = number[:, 1]
        self._sum += self.node
        self.time += 1
        return fresh

    def _wide_scores(self) -> Tensor | None:
        if not self.reward.scales:
            return None
        each = [self.table.scaled(index, self.reward.scales).flatten() for index in range(len(self.table))]
        return torch.cat(each)

    def _wide_at(self, pair: Tensor) -> Tensor:
        if self._wide is None:
            return torch.zeros(self.num_envs, 2, device=self.device)
        return self._wide[self.lattices.flat(pair, self.node)]

    def _refuse(self, actions: Tensor) -> None:
        if actions.shape != (self.num_envs, 2) or bool(((actions < 0) | (actions >= ACTIONS)).any()):
            raise RuntimeFault(
                "spars environment", why=f"actions {actions.tolist()}, expected {self.num_envs} pairs below 6"
            )
        if bool(self._ended.any()):
            where = torch.nonzero(self._ended).flatten().tolist()
            raise RuntimeFault(
                "spars environment", why=f"episodes {where} have ended", do="reset them with `indices`"
            )

    def _space(self) -> gymnasium.spaces.Dict:
        box = gymnasium.spaces.Box
        most = int(self.lattices.counts.max()) - 1
        found: dict[str, gymnasium.Space[Any]] = {
            "case": box(0, len(self.table) - 1, (1,), np.int64),
            "node": box(0, most, (2, 3), np.int64),
            "time": box(0.0, 1.0, (1,), np.float32),
            "trail": box(-1.0, 1.0, (TRAIL,), np.float32),
        }
        if "view" in self.observe:
            found["view"] = box(-_LARGEST, _LARGEST, (2, *self.observer.view_size), np.float32)
        return gymnasium.spaces.Dict(found)


_STATE = (
    "case",
    "node",
    "time",
    "lead",
    "member",
    "_visits",
    "_flat",
    "_scores",
    "_noise",
    "_sum",
    "_before",
    "_ended",
)


def _check(
    table: ScoreTable,
    num_envs: int,
    horizon: int,
    observe: Sequence[str],
    weights: Tensor | None,
    start: str,
) -> None:
    """Refuse settings without a meaning, all of them at once."""
    problems: list[str] = []
    if num_envs < 1 or horizon < 1:
        problems.append(f"{num_envs} games of {horizon} steps")
    if set(observe) - {"view"}:
        problems.append(f"observe: unknown {', '.join(sorted(set(observe) - {'view'}))}; known is view")
    if weights is not None and (
        tuple(weights.shape) != (len(table),) or not bool((weights >= 0).all() & (weights.sum() > 0))
    ):
        problems.append(f"weights: expected {len(table)} numbers, none negative and not all 0")
    if start != "random" and (start == "corner_center") != (table.start == "corner_center"):
        problems.append(f"start {start}: the lattice of the table has {table.start}")
    if problems:
        raise ConfigError("spars environment", why="its settings do not fit", problems=problems)
