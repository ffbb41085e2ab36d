"""Before self-play: imitate who knows the scores of the training volumes.

Labels of voxels are not needed for it: the teacher looks at scores, which the classifier gives. The policy
learns to go the same way without looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.lattice import ACTIONS, Lattice, move
from medrl.plugins.spars.table import ScoreTable

TeacherKind: TypeAlias = Literal["planned", "multiscale", "greedy"]
SCALES = (1.0, 2.0, 4.0)
"""Relative sizes of the windows whose mean scores guide where the score itself says nothing."""
_ROUNDS = 2000


class Teacher:
    """What each move is worth, by looking at scores.

    Args:
        table: Volumes and scores.
        kind: ``planned``: the discounted sum of scores on the best path from there, by value iteration on
            all places of a volume; ``multiscale``: the mean score in windows of several sizes after the move;
            ``greedy``: the score after the move.
        gamma: Discount of the plan.

    Raises:
        ConfigError: The scorer cannot score whole volumes, which ``planned`` needs, or has no dense form,
            which ``multiscale`` needs.
    """

    def __init__(self, table: ScoreTable, kind: TeacherKind = "planned", *, gamma: float = 0.9) -> None:
        if kind not in ("planned", "multiscale", "greedy"):
            raise ConfigError("warm.kind", why=f"unknown: {kind!r}", do="planned, multiscale, greedy, none")
        if (kind == "planned" and not table.fills) or (kind == "multiscale" and not table.scorer.has_dense):
            raise ConfigError(
                f"warm.kind {kind}",
                why=f"scores of '{table.scorer.kind}' are made one by one",
                do="--set warm.kind=greedy or none",
            )
        self.table, self.kind, self.gamma = table, kind, float(gamma)
        self._worth = torch.full((table.lattices.total,), torch.nan, device=table.device)

    def worth(self, case: Tensor, node: Tensor) -> Tensor:
        """What the six moves are worth ``(B, 6)`` at nodes ``(B, 3)``; minus infinity where there is none."""
        lattices = self.table.lattices
        many = case.unsqueeze(1).expand(-1, ACTIONS)
        actions = torch.arange(ACTIONS, device=node.device).expand(len(node), ACTIONS)
        start = node.unsqueeze(1).expand(-1, ACTIONS, -1)
        around = move(start, actions, lattices.counts[case].unsqueeze(1))
        if self.kind == "greedy":
            found = self.table.at(many, around)
        else:
            for index in torch.unique(case).tolist():
                self._prepare(index)
            found = self._worth[lattices.flat(many, around)]
        return found.masked_fill((around == start).all(dim=2), -torch.inf)

    def targets(self, case: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
        """Chances of the best moves ``(B, 6)``, and whether the teacher has an opinion ``(B,)`` bool."""
        worth = self.worth(case, node)
        best = worth.amax(dim=1, keepdim=True)
        least = worth.masked_fill(worth == -torch.inf, torch.inf).amin(dim=1)
        top = worth >= best - 1e-6 * best.abs().clamp(min=1e-12)
        knows = torch.isfinite(best[:, 0]) & (best[:, 0] - least > 1e-6 * best[:, 0].abs())
        return top / top.sum(dim=1, keepdim=True), knows

    def _prepare(self, index: int) -> None:
        lattice, base = self.table.lattices[index], int(self.table.lattices.base[index])
        own = self._worth[base : base + lattice.size]
        if not bool(own.isnan().any()):
            return
        if self.kind == "multiscale":
            found = self.table.scaled(index, SCALES)
        else:
            found = planned(self.table.full(index), lattice, self.gamma)
        own.copy_(found.flatten())


def planned(scores: Tensor, lattice: Lattice, gamma: float) -> Tensor:
    r"""Value of being at each place ``(Lx, Ly, Lz)``: its score and what the best path from it earns.

    .. math:: W(n) = s(n) + \gamma \max_{n' \sim n} W(n')

    Raises:
        ConfigError: The discount is not in [0, 1).
    """
    if not 0.0 <= gamma < 1.0:
        raise ConfigError("warm.gamma", why=f"{gamma}", do="give a discount from 0 to below 1")
    value = scores.double()
    own = value.clone()
    limit = 1e-9 * max(float(own.max()), 1e-12)
    for _ in range(_ROUNDS):
        best = torch.full_like(value, -torch.inf)
        for axis in range(3):
            count = lattice.counts[axis]
            if count == 1:
                continue
            low, high = value.narrow(axis, 0, count - 1), value.narrow(axis, 1, count - 1)
            target = best.narrow(axis, 0, count - 1)
            torch.maximum(target, high, out=target)
            target = best.narrow(axis, 1, count - 1)
            torch.maximum(target, low, out=target)
        after = own + gamma * torch.where(best == -torch.inf, 0.0, best)
        change = float((after - value).abs().max())
        value = after
        if change <= limit:
            break
    return value.float()


def imitation_loss(logits: Tensor, legal: Tensor, targets: Tensor, knows: Tensor, entropy: float) -> Tensor:
    """Cross-entropy to the best moves where the teacher has an opinion, less an entropy bonus; a scalar."""
    policy = MaskedCategorical(logits, legal)
    likely = policy.log_probs.masked_fill(~legal, 0.0)
    each = -(targets * likely).sum(dim=1)
    weight = knows.to(each.dtype)
    return (each * weight).sum() / weight.sum().clamp(min=1.0) - entropy * policy.entropy().mean()


def agreement(logits: Tensor, legal: Tensor, targets: Tensor, knows: Tensor) -> float:
    """Share of states in which the likeliest move is one of the teacher's, where it has an opinion."""
    chosen = MaskedCategorical(logits, legal).mode()
    right = targets.gather(1, chosen.unsqueeze(1)).squeeze(1) > 0
    return float(right[knows].float().mean()) if bool(knows.any()) else 1.0


def walk_with(
    env: HuntEnv, teacher: Teacher, generator: torch.Generator, count: int, share: float = 0.5
) -> tuple[dict[str, Tensor], Tensor]:
    """Collect states on the way of windows that follow the teacher in part, and chance otherwise.

    Args:
        env: Goes on from where it is; both its windows walk.
        teacher: Whom they follow.
        generator: CPU generator.
        count: States to collect, of both windows of all games at a time.
        share: Of the moves that follow the teacher.

    Returns:
        Observations ``(N, ...)`` and legal moves ``(N, 6)``, N at least `count`.
    """
    seen: list[dict[str, Tensor]] = []
    masks: list[Tensor] = []
    collected = 0
    while collected < count:
        both = env.both()
        legal = torch.cat([env.action_masks(0), env.action_masks(1)])
        seen.append(both)
        masks.append(legal)
        collected += len(legal)
        targets, knows = teacher.targets(both["case"].flatten(), both["node"][:, 0])
        follow = (torch.rand(len(legal), generator=generator) < share).to(env.device) & knows
        chances = torch.where(follow.unsqueeze(1), targets.log(), 0.0).masked_fill(~legal, -torch.inf)
        noise = torch.cat([env.noise(0), env.noise(1)])
        _, _, over, cut, _ = env.step_both(torch.stack((chances + noise).argmax(dim=1).chunk(2), dim=1))
        ended = torch.nonzero(over | cut).flatten()
        if len(ended):
            env.reset(indices=ended)
    return joined(seen), torch.cat(masks)


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Observations one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
