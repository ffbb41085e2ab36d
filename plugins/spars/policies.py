"""Who visits windows: chance, greedy look-ahead, tiles, the exhaustive scan, and self-play.

All of them are asked in one way and pay for every different window that they score, so that they can be
compared at equal numbers of windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.plugins.spars.agent.policy import HuntAgent
from medrl.plugins.spars.lattice import ACTIONS, Lattice, legal_moves, move, moves
from medrl.plugins.spars.observer import Observer
from medrl.plugins.spars.table import ScoreTable

_ROUNDS = 1000
"""Rounds of further episodes after which a budget that cannot be spent is given up."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Visits:
    """Windows that were visited in one volume, in order.

    Attributes:
        corners: ``(M, 3)`` int64, minimum corners.
        scores: ``(M,)`` float32.
        episode: ``(M,)`` int64 number of the episode; -1 where there are none.
        step: ``(M,)`` int64 from 0 on within the episode.
        agent: ``(M,)`` int64, 0 or 1.
        windows_scored: Different windows that were scored, those that were only looked at included.
    """

    corners: Tensor
    scores: Tensor
    episode: Tensor
    step: Tensor
    agent: Tensor
    windows_scored: int

    def __len__(self) -> int:
        return len(self.corners)

    @property
    def final(self) -> Tensor:
        """Corners ``(R, 3)`` of the last windows of each episode and agent; of a scan, the best window."""
        if not len(self):
            return self.corners
        if int(self.episode[0]) < 0:
            return self.corners[self.scores.argmax().view(1)]
        walker = self.episode * 2 + self.agent
        last = [torch.nonzero(walker == number).flatten()[-1] for number in torch.unique(walker).tolist()]
        return self.corners[torch.stack(last)]


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """How much a policy may do in a volume.

    Attributes:
        episodes: How many walks; with a budget, as many as it pays for.
        steps: Moves of a walk.
        agents: Windows of an episode, 1 or 2; both paint.
        start: ``random`` places, or the ``centre`` of the table's lattice.
        budget: Different windows that may be scored; None is no limit.
    """

    episodes: int = 8
    steps: int = 32
    agents: int = 2
    start: str = "random"
    budget: int | None = None

    def __post_init__(self) -> None:
        good = self.episodes >= 1 and self.steps >= 1 and self.agents in (1, 2)
        if not good or (self.budget is not None and self.budget < 1):
            raise ConfigError("episodes", why=f"{self}", do="give positive numbers, and one or two agents")


class Policy(Protocol):
    """Visits windows.

    Attributes:
        name: As in ``--policy``.
    """

    name: str

    def visit(self, table: ScoreTable, index: int, plan: Episodes, generator: torch.Generator) -> Visits:
        """Visit windows of a volume, see `run`."""
        ...


def run(policy: Policy, table: ScoreTable, index: int, plan: Episodes, generator: torch.Generator) -> Visits:
    """Let a policy visit windows of one volume.

    Args:
        policy: Who visits.
        table: Volumes and scores.
        index: Number of the volume.
        plan: How much it may do.
        generator: Of any device; policies without chance leave it alone.
    """
    return policy.visit(table, index, plan, generator)


# -- without walks -----------------------------------------------------------------------------------


class Scan:
    """Every window of the lattice; with a smaller budget, tiles spread evenly, then the windows between."""

    name = "scan"

    def visit(self, table: ScoreTable, index: int, plan: Episodes, generator: torch.Generator) -> Visits:
        """See `Policy`."""
        del generator
        lattice = table.lattices[index]
        nodes = lattice.nodes()
        if plan.budget is not None and plan.budget < lattice.size:
            tiles = lattice.tiles()
            if plan.budget <= len(tiles):
                chosen = torch.linspace(0, len(tiles) - 1, plan.budget, dtype=torch.float64).round().long()
                nodes = tiles[chosen]
            else:
                rest = torch.ones(lattice.size, dtype=torch.bool)
                rest[lattice.flat(tiles)] = False
                between = nodes[rest]
                count = plan.budget - len(tiles)
                chosen = torch.linspace(0, len(between) - 1, count, dtype=torch.float64).round().long()
                nodes = torch.cat([tiles, between[chosen]])
        return _visited(table, index, nodes)


class RandomTiles:
    """Tiles that together see the whole volume, in random order; when they are used up, random windows."""

    name = "tiles"

    def visit(self, table: ScoreTable, index: int, plan: Episodes, generator: torch.Generator) -> Visits:
        """See `Policy`; without a budget, all tiles."""
        lattice = table.lattices[index]
        tiles = lattice.tiles()
        order = _shuffled(len(tiles), generator)
        nodes = tiles[order]
        if plan.budget is not None and plan.budget > len(tiles):
            rest = torch.ones(lattice.size, dtype=torch.bool)
            rest[lattice.flat(tiles)] = False
            between = lattice.nodes()[rest]
            nodes = torch.cat([nodes, between[_shuffled(len(between), generator)]])
        return _visited(table, index, nodes[: plan.budget])


def _visited(table: ScoreTable, index: int, nodes: Tensor) -> Visits:
    """Visits of different nodes ``(M, 3)``, each of them scored."""
    where = nodes.to(table.device)
    case = torch.full((len(where),), index, device=table.device)
    count = torch.arange(len(where), device=table.device)
    return Visits(
        corners=table.lattices[index].corner(where),
        scores=table.at(case, where),
        episode=torch.full_like(count, -1),
        step=count,
        agent=torch.zeros_like(count),
        windows_scored=len(where),
    )


def _uniform(size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Numbers in [0, 1) on the CPU, from a generator of any device."""
    return torch.rand(*size, generator=generator, dtype=torch.float64, device=generator.device).cpu()


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()


# -- walks -------------------------------------------------------------------------------------------


class Walk:
    """Where the windows of some episodes are; what a walker may know.

    Attributes:
        table, index: Volume and scores.
        node: ``(R, agents, 3)``.
        time: Moves done.
        steps: Moves of an episode.
    """

    def __init__(self, table: ScoreTable, index: int, node: Tensor, steps: int) -> None:
        self.table, self.index, self.node, self.steps = table, index, node, steps
        self.lattice: Lattice = table.lattices[index]
        self.counts = node.new_tensor(self.lattice.counts)
        self.time = 0
        self._been = torch.zeros(len(node), 0, dtype=torch.int64, device=node.device)
        self._sum = torch.zeros(node.shape, device=node.device)

    @property
    def legal(self) -> Tensor:
        """Moves that stay inside ``(R, agents, 6)``; all where there is none."""
        found = legal_moves(self.node, self.counts)
        return found | ~found.any(dim=-1, keepdim=True)

    def go(self, actions: Tensor) -> None:
        """Move all windows ``(R, agents)``."""
        self.node = move(self.node, actions, self.counts)
        self._been = torch.cat([self._been, self.lattice.flat(self.node)], dim=1)
        self._sum = self._sum + self.node
        self.time += 1

    def observation(self, agent: int) -> dict[str, Tensor]:
        """What the window sees, as `HuntEnv.observation` tells it ``(R, ...)``."""
        own = self.node[:, agent]
        other = self.node[:, -1 - agent] if self.node.shape[1] == 2 else own
        around = torch.cat([own.unsqueeze(1), own.unsqueeze(1) + moves(own.device)], dim=1)
        inside = ((around >= 0) & (around < self.counts)).all(dim=2)
        number = self.lattice.flat(around)
        been = (number.unsqueeze(2) == self._been.unsqueeze(1)).any(dim=2) & inside
        mean = self._sum[:, agent] / max(1, self.time)
        way = (mean - own if self.time else torch.zeros_like(mean)) / self.counts
        done = torch.full((len(own), 1), self.time, device=own.device)
        return {
            "case": torch.full_like(done, self.index),
            "node": torch.stack([own, other], dim=1),
            "time": 1.0 - done / self.steps,
            "trail": torch.cat([been.float(), way.float()], dim=1),
        }


class Walker(ABC):
    """A policy that moves windows by one place at a time.

    Attributes:
        name: As in ``--policy``.
    """

    name: str

    @abstractmethod
    def choose(self, walk: Walk, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Choose moves.

        Args:
            walk: Where the windows are.
            noise: ``(R, agents, 6)`` Gumbel noise.

        Returns:
            Actions ``(R, agents)``, and the nodes that were looked at ``(R, agents, L, 3)``.
        """

    def visit(self, table: ScoreTable, index: int, plan: Episodes, generator: torch.Generator) -> Visits:
        """See `Policy`."""
        parts: list[_Part] = []
        done, rounds = 0, 0
        # Where scores are expensive, no episode is begun that the budget does not pay for.
        together = plan.episodes if plan.budget is None or table.fills else 1
        while rounds < _ROUNDS:
            rounds += 1
            parts.append(self._walk(table, index, plan, together, done, generator))
            done += together
            if plan.budget is None or _different(parts) >= min(plan.budget, table.lattices[index].size):
                break
        return _joined(table, index, parts, plan.budget)

    def _walk(
        self,
        table: ScoreTable,
        index: int,
        plan: Episodes,
        count: int,
        first: int,
        generator: torch.Generator,
    ) -> _Part:
        lattice, device = table.lattices[index], table.device
        size = (count, plan.agents)
        if plan.start == "random":
            drawn = _uniform((*size, 3), generator)
            node = (drawn * torch.tensor(lattice.counts)).long().to(device)
        else:
            node = lattice.start_node().to(device).expand(*size, 3)
        walk = Walk(table, index, node, plan.steps)
        nodes, looks = [], []
        for _ in range(plan.steps):
            uniform = _uniform((*size, ACTIONS), generator).clamp(min=1e-300)
            noise = (-(-uniform.log()).clamp(min=1e-300).log()).float().to(device)
            actions, looked = self.choose(walk, noise)
            walk.go(actions)
            nodes.append(walk.node)
            looks.append(torch.cat([looked, walk.node.unsqueeze(2)], dim=2))
        # (episodes, steps, agents, ...): one episode after the other.
        return _Part(torch.stack(nodes, dim=1), torch.stack(looks, dim=1), first, lattice)


@dataclass(frozen=True, eq=False)
class _Part:
    """Episodes: nodes ``(R, T, agents, 3)``, and what was scored before each ``(R, T, agents, L, 3)``."""

    nodes: Tensor
    looks: Tensor
    first: int
    lattice: Lattice

    @property
    def scored(self) -> Tensor:
        """Numbers of the windows that were scored, in order."""
        return self.lattice.flat(self.looks).flatten()


def _different(parts: list[_Part]) -> int:
    return len(torch.unique(torch.cat([part.scored for part in parts])))


def _joined(table: ScoreTable, index: int, parts: list[_Part], budget: int | None) -> Visits:
    """Visits of all parts, as far as the budget pays for them."""
    lattice = table.lattices[index]
    scored = torch.cat([part.scored for part in parts])
    nodes = torch.cat([part.nodes.flatten(0, 2) for part in parts])
    episode, step, agent = (torch.cat(items) for items in zip(*(_numbers(p) for p in parts), strict=True))
    # How many different windows were scored up to each one.
    _, inverse = torch.unique(scored, return_inverse=True)
    place = torch.arange(len(scored), device=scored.device)
    earliest = torch.full((int(inverse.max()) + 1,), len(scored), device=scored.device)
    earliest.scatter_reduce_(0, inverse, place, "amin")
    paid = (earliest[inverse] == place).cumsum(0)
    each = len(scored) // len(nodes)
    cost = paid.view(-1, each)[:, -1]
    keep = torch.ones_like(cost, dtype=torch.bool) if budget is None else cost <= budget
    count = int(cost[keep].max()) if bool(keep.any()) else 0
    where = nodes[keep]
    case = torch.full((len(where),), index, device=where.device)
    return Visits(
        corners=lattice.corner(where),
        scores=table.at(case, where),
        episode=episode[keep],
        step=step[keep],
        agent=agent[keep],
        windows_scored=count,
    )


def _numbers(part: _Part) -> tuple[Tensor, Tensor, Tensor]:
    device = part.nodes.device
    axes = [torch.arange(count, device=device) for count in part.nodes.shape[:3]]
    episode, step, agent = torch.meshgrid(*axes, indexing="ij")
    return (episode + part.first).flatten(), step.flatten(), agent.flatten()


class RandomWalk(Walker):
    """Legal moves, all alike."""

    name = "random"

    def choose(self, walk: Walk, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Walker`."""
        return noise.masked_fill(~walk.legal, -torch.inf).argmax(dim=-1), walk.node[:, :, None][:, :, :0]


class GreedyLookAhead(Walker):
    """To the best of the neighbours, all of which are scored for it; equal ones by chance."""

    name = "greedy"

    def choose(self, walk: Walk, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Walker`."""
        legal = walk.legal
        around = move(
            walk.node.unsqueeze(2).expand(-1, -1, ACTIONS, -1).contiguous(),
            torch.arange(ACTIONS, device=walk.node.device).expand(*walk.node.shape[:2], ACTIONS),
            walk.counts,
        )
        case = torch.full(around.shape[:-1], walk.index, device=around.device)
        scores = walk.table.at(case, around).masked_fill(~legal, -torch.inf)
        best = scores == scores.amax(dim=-1, keepdim=True)
        return noise.masked_fill(~(best & legal), -torch.inf).argmax(dim=-1), around


class SelfPlay(Walker):
    """The trained agent moves both windows; a window is scored where it is, and nowhere else.

    Args:
        agent: The network.
        observer: Of the volumes of the table that it is run on.
        greedy: Take the likeliest move, instead of a drawn one.
    """

    name = "self-play"

    def __init__(self, agent: HuntAgent, observer: Observer, *, greedy: bool = False) -> None:
        self.agent, self.observer, self.greedy = agent, observer, bool(greedy)

    @torch.no_grad()
    def visit(self, table: ScoreTable, index: int, plan: Episodes, generator: torch.Generator) -> Visits:
        """See `Policy`."""
        training = self.agent.training
        self.agent.eval()
        try:
            return super().visit(table, index, plan, generator)
        finally:
            self.agent.train(training)

    def choose(self, walk: Walk, noise: Tensor) -> tuple[Tensor, Tensor]:
        """See `Walker`; both windows in one forward."""
        agents = walk.node.shape[1]
        each = [walk.observation(agent) for agent in range(agents)]
        observation = {name: torch.cat([item[name] for item in each]) for name in each[0]}
        logits, _ = self.agent.logits_and_values(self.observer.seen(observation, self.agent.needs))
        legal = torch.cat([walk.legal[:, agent] for agent in range(agents)])
        chances = MaskedCategorical(logits, legal).log_probs
        if not self.greedy:
            chances = chances + torch.cat([noise[:, agent] for agent in range(agents)])
        actions = torch.stack(chances.argmax(dim=-1).chunk(agents), dim=1)
        return actions, walk.node[:, :, None][:, :, :0]
