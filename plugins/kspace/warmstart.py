"""The warm start: imitate the exact gain of every line, known from the labels, in states on the way.

States come from acquisitions whose lines are chosen by the oracle, at random, or by the agent itself. The
loss is minus the expected gain of the agent's line and minus a small entropy; gains are standardised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, DataError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.plugins.kspace.agent.columns import ColumnAgent
from medrl.plugins.kspace.agent.policy import Sighted
from medrl.plugins.kspace.candidates import AT_ONCE, gains
from medrl.plugins.kspace.masks import apply_order, random_order, variable_density_order
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.policies import observation_of
from medrl.plugins.kspace.rewards import Quality


@dataclass(frozen=True, eq=False, kw_only=True)
class States:
    """n states with the gain of every line.

    Attributes:
        case: ``(n,)`` int64.
        mask: ``(n, A)`` bool, acquired lines.
        legal: ``(n, A)`` bool.
        remaining: ``(n,)`` int64.
        taken: ``(n,)`` int64.
        gains: ``(n, A)`` float32; 0 for illegal lines.
        seen: Features that the agent reads, ``(n, ...)`` each, if they were kept.
    """

    case: Tensor
    mask: Tensor
    legal: Tensor
    remaining: Tensor
    taken: Tensor
    gains: Tensor
    seen: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.case)

    def select(self, index: Tensor) -> States:
        """Some of the states: numbers, or ``(n,)`` bool."""
        parts = {name: getattr(self, name)[index] for name in _TENSORS}
        return States(**parts, seen={name: value[index] for name, value in self.seen.items()})

    def observation(self) -> dict[str, Tensor]:
        """As the environment gives it, with the features that were kept."""
        return {**observation_of(self.case, self.mask, self.remaining, self.taken), **self.seen}

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[States]:
        """Every state once, in random order, `size` at a time; the last may be smaller."""
        for part in torch.split(torch.randperm(len(self), generator=generator), size):
            yield self.select(part.to(self.case.device))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**{name: getattr(self, name) for name in _TENSORS}, "seen": dict(self.seen)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> States:
        """What `state_dict` gave."""
        return cls(**{name: state[name] for name in _TENSORS}, seen=dict(state["seen"]))

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        """Several sets as one.

        Raises:
            DataError: There is none.
        """
        if not parts:
            raise DataError("states of the warm start", why="there is none")
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        seen = {name: torch.cat([part.seen[name] for part in parts]) for name in parts[0].seen}
        return cls(**whole, seen=seen)


_TENSORS = ("case", "mask", "legal", "remaining", "taken", "gains")


class StateCollector:
    """B acquisitions that go on line by line; every state on the way is given with the gains of all lines.

    Args:
        observer: Of the cases.
        quality: What gains are of.
        batch: B.
        budgets: Each acquisition's budget is one of these, drawn uniformly.
        cases: ``(n,)`` numbers of the cases to draw from; None is all.
        weights: ``(N,)``, how often each case is drawn; None is uniform.
        span: At most so many states of one acquisition: a longer one begins at a random place, the lines
            before it being drawn with variable density or chosen by the policy. 0 is no limit.
        at_once: Images that are reconstructed and segmented at once.
        keep: Names of the agent's features to keep with the states, as ``columns`` and ``pooled``; none for
            agents that read images.
        seed: Of cases, budgets, places and lines.

    Raises:
        ConfigError: A budget does not fit the cases, or a number is out of range.
    """

    def __init__(
        self,
        observer: CaseObserver,
        quality: Quality,
        *,
        batch: int,
        budgets: Sequence[int],
        cases: Tensor | None = None,
        weights: Tensor | None = None,
        span: int = 8,
        at_once: int = AT_ONCE,
        keep: Sequence[str] = ("columns", "pooled"),
        seed: int = 0,
    ) -> None:
        bank = observer.cases
        if batch < 1 or span < 0 or not len(budgets) or min(budgets) < 1 or max(budgets) > bank.fewest:
            raise ConfigError(
                "warm start",
                why=f"batch {batch}, span {span}, budgets {list(budgets)}; a case leaves {bank.fewest} lines",
            )
        share = torch.ones(len(bank)) if weights is None else weights.detach().cpu().float()
        if cases is not None:
            share = share * torch.zeros(len(bank)).index_fill(0, cases.cpu(), 1.0)
        if not bool(share.sum() > 0):
            raise ConfigError("warm start", why="no case can be drawn")
        self.observer, self.quality = observer, quality
        self.budgets = torch.tensor(list(budgets), dtype=torch.int64)
        self.share, self.span, self.at_once = share, int(span), int(at_once)
        self.keep = tuple(keep)
        self.generator = torch.Generator().manual_seed(seed)
        device = bank.device
        self.case = torch.zeros(batch, dtype=torch.int64, device=device)
        self.mask = torch.zeros(batch, bank.actions, dtype=torch.bool, device=device)
        self.taken = torch.zeros(batch, dtype=torch.int64, device=device)
        self.budget = torch.zeros(batch, dtype=torch.int64, device=device)
        self.end = torch.zeros(batch, dtype=torch.int64, device=device)

    @torch.no_grad()
    def collect(self, policy: Sighted | None = None, *, oracle: float = 0.5) -> States:
        """Give the states ``(B,)`` of all acquisitions, and go on by one line.

        Args:
            policy: Draws the next line where the oracle does not; None draws uniformly.
            oracle: Probability that the best line is the next one.
        """
        ended = torch.nonzero(self.taken >= self.end).flatten()
        if len(ended):
            self._begin(ended, policy)
        legal = self.observer.cases.rows("possible", self.case) & ~self.mask
        exact = gains(self.observer, self.quality, self.case, self.mask, at_once=self.at_once)
        observation = observation_of(self.case, self.mask, self.budget - self.taken, self.taken)
        seen: Mapping[str, Tensor] = {}
        if self.keep and self.observer.features is not None:
            seen = self.observer.features_of(observation)
        found = States(
            case=self.case.clone(),
            mask=self.mask.clone(),
            legal=legal,
            remaining=self.budget - self.taken,
            taken=self.taken.clone(),
            gains=exact.masked_fill(~legal, 0.0),
            seen={name: seen[name] for name in self.keep if name in seen},
        )
        other = self._drawn({**observation, **found.seen}, legal, policy)
        by_oracle = torch.rand(len(self.case), generator=self.generator).to(legal.device) < oracle
        self._acquire(torch.where(by_oracle, exact.argmax(dim=1), other))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next states depend on."""
        names = ("case", "mask", "taken", "budget", "end")
        return {
            **{name: getattr(self, name).cpu().clone() for name in names},
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in ("case", "mask", "taken", "budget", "end"):
            getattr(self, name).copy_(state[name])
        self.generator.set_state(state["generator"].cpu())

    def _begin(self, where: Tensor, policy: Sighted | None) -> None:
        bank, count = self.observer.cases, len(where)
        case = torch.multinomial(self.share, count, replacement=True, generator=self.generator)
        number = torch.randint(len(self.budgets), (count,), generator=self.generator)
        budget = self.budgets[number]
        start = torch.zeros_like(budget)
        if self.span:
            place = torch.rand(count, generator=self.generator)
            start = (place * (budget - self.span + 1).clamp_min(1)).long()
        self.case[where], self.budget[where] = case.to(bank.device), budget.to(bank.device)
        self.mask[where] = bank.rows("initial", case)
        self.taken[where] = 0
        self.end[where] = (start + (self.span or int(self.budgets.max()))).minimum(budget).to(bank.device)
        if policy is None:
            free = bank.rows("possible", case) & ~self.mask[where]
            order = variable_density_order(free, self.generator)
            self.mask[where] = apply_order(self.mask[where], order, start.to(bank.device))
            self.taken[where] = start.to(bank.device)
            return
        for step in range(int(start.max())):
            rows = where[(start > step).to(bank.device)]
            case, mask, taken = self.case[rows], self.mask[rows], self.taken[rows]
            legal = bank.rows("possible", case) & ~mask
            observation = observation_of(case, mask, self.budget[rows] - taken, taken)
            lines = self._drawn(observation, legal, policy)
            self.mask[rows] = mask.scatter(1, lines.unsqueeze(1), value=True)
            self.taken[rows] += 1

    def _drawn(self, observation: Mapping[str, Tensor], legal: Tensor, policy: Sighted | None) -> Tensor:
        if policy is None:
            return random_order(legal, self.generator)[:, 0]
        return policy.distribution(dict(observation), legal).sample(self.generator)

    def _acquire(self, lines: Tensor) -> None:
        self.mask.scatter_(1, lines.unsqueeze(1), value=True)
        self.taken += 1


def standardised(states: States) -> States:
    """States whose gains are centred over the legal lines of each, and divided by one deviation for all."""
    legal = states.legal
    count = legal.sum(dim=1, keepdim=True)
    centred = (states.gains - states.gains.sum(dim=1, keepdim=True) / count) * legal
    spread = (centred.double().square().sum() / legal.sum()).sqrt().clamp_min(1e-12)
    parts = {name: getattr(states, name) for name in _TENSORS}
    return States(**{**parts, "gains": (centred / spread).float()}, seen=states.seen)


def imitation_loss(policy: MaskedCategorical, gains: Tensor, *, entropy: float = 0.03) -> Tensor:
    """-Σ π(c) · gain(c) - w · entropy, mean over states.

    Args:
        policy: Over the lines, ``(n, A)``, with a graph.
        gains: ``(n, A)``, standardised; 0 for illegal lines.
        entropy: w.
    """
    expected = (policy.probs * gains).sum(dim=1)
    return -(expected + entropy * policy.entropy()).mean()


@torch.no_grad()
def imitation_score(policy: Sighted, states: States, *, batch: int = 256) -> dict[str, float]:
    """How well the most probable line does.

    Returns:
        ``gain``, its mean gain; ``best``, that of the best line; ``agreement``, how often it is the best;
        ``entropy`` of the policy.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for rows in torch.split(torch.arange(len(states), device=states.case.device), batch):
        part = states.select(rows)
        distribution = policy.distribution(part.observation(), part.legal)
        best, line = part.gains.masked_fill(~part.legal, -torch.inf).max(dim=1)
        chosen = distribution.mode()
        got = part.gains.gather(1, chosen.unsqueeze(1)).squeeze(1)
        values = (got, best, (chosen == line).float(), distribution.entropy())
        sums += torch.stack([value.double().sum().cpu() for value in values])
    gain, top, agreement, spread = (sums / max(len(states), 1)).tolist()
    return {"gain": gain, "best": top, "agreement": agreement, "entropy": spread}


def imitate_epoch(
    policy: Sighted,
    states: States,
    *,
    batch: int,
    entropy: float,
    generator: torch.Generator,
    step: Callable[[Tensor], object],
) -> float:
    """One pass over the states; return the mean loss.

    Args:
        policy: The agent that learns.
        states: With standardised gains.
        batch: States in a minibatch.
        entropy: Weight of the entropy.
        generator: Of the order.
        step: Takes the loss, goes backward and steps, as in `medrl.core.rl.ppo.ppo_update`.
    """
    total = 0.0
    for part in states.minibatches(batch, generator):
        distribution = policy.distribution(part.observation(), part.legal)
        loss = imitation_loss(distribution, part.gains, entropy=entropy)
        step(loss)
        total += float(loss.detach()) * len(part)
    return total / max(len(states), 1)


def fit_scales(policy: Sighted, states: States) -> None:
    """Standardise what a column agent reads by these states; other agents are left as they are."""
    if isinstance(policy.agent, ColumnAgent):
        seen = policy.observer.seen(states.observation(), policy.agent.needs)
        policy.agent.fit_scales(seen)
