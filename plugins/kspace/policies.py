"""Policies that every adaptive one is compared with, and the agent as one of them.

A policy gives the lines of whole acquisitions in order; all start from the initial lines of the cases. What
matters is whether an adaptive policy beats low-to-high and the fixed mask, not whether it beats random lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.agent.policy import LineAgent, Sighted
from medrl.plugins.kspace.candidates import AT_ONCE, quality_with_each
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.masks import (
    equispaced_columns,
    low_to_high_order,
    random_order,
    variable_density_order,
)
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.rewards import Quality

__all__ = [
    "AgentLines",
    "EquispacedLines",
    "ExchangedLines",
    "FixedLines",
    "GreedyLines",
    "LinePolicy",
    "LowToHighLines",
    "RandomLines",
    "VariableDensityLines",
    "observation_of",
]


class LinePolicy(Protocol):
    """Chooses the lines of acquisitions."""

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """Lines ``(B, budget)`` int64 of cases ``(B,)``, from their initial lines on, in order.

        Args:
            observer: Of the cases.
            case: ``(B,)``.
            budget: How many.
            generator: CPU generator; policies without chance leave it alone.
        """
        ...


class RandomLines:
    """Lines drawn uniformly from those that are possible."""

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`."""
        return random_order(_free(observer.cases, case, budget), generator)[:, :budget]


class EquispacedLines:
    """Lines spread evenly over those that are possible; other lines for every budget."""

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`."""
        return equispaced_columns(_free(observer.cases, case, budget), budget)


class LowToHighLines:
    """Outwards from the centre, right and left in turn."""

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`."""
        free = _free(observer.cases, case, budget, whole_lines=True)
        lines = int(observer.cases.rows("initial", case).sum(dim=1).max())
        return low_to_high_order(free, lines)[:, :budget]


class VariableDensityLines:
    """Lines drawn with triangular weights, more of them near the centre."""

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`."""
        free = _free(observer.cases, case, budget, whole_lines=True)
        return variable_density_order(free, generator)[:, :budget]


class FixedLines:
    """The same lines for every case, such as `population_greedy` finds; a case skips what it cannot acquire.

    Args:
        lines: In order.
    """

    def __init__(self, lines: Sequence[int] | Tensor) -> None:
        self.lines = torch.as_tensor(lines, dtype=torch.int64)

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`.

        Raises:
            ConfigError: The lines do not suffice for the budget.
        """
        free = _free(observer.cases, case, budget)
        there = free[:, self.lines.to(free.device)]
        if int(there.sum(dim=1).min()) < budget:
            raise ConfigError(
                "fixed mask", why=f"it has {len(self.lines)} lines, too few for a budget of {budget}"
            )
        first = there.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :budget]
        return self.lines.to(free.device)[first]


class ExchangedLines:
    """The fixed mask of each budget after exchanging lines, made when that budget is first asked for.

    Args:
        order: A fixed order, such as `population_greedy` finds; its first lines are where a mask begins.
        improve: Gives better lines in place of some.
    """

    def __init__(self, order: Tensor, improve: Callable[[Tensor], Tensor]) -> None:
        self.fixed, self.improve = FixedLines(order), improve
        self._made: dict[int, FixedLines] = {}

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`.

        Raises:
            ConfigError: The lines do not suffice for the budget.
        """
        if budget > len(self.fixed.lines):
            return self.fixed.order(observer, case, budget, generator)
        if budget not in self._made:
            self._made[budget] = FixedLines(self.improve(self.fixed.lines[:budget]).cpu())
        return self._made[budget].order(observer, case, budget, generator)


class GreedyLines:
    """The line that helps most now, known from the labels: an oracle, not a policy.

    One step ahead is not the best of all masks: on magnitudes a greedy order can lose to a fixed one.

    Args:
        quality: What a line helps.
        at_once: Images that are reconstructed and segmented at once.
    """

    def __init__(self, quality: Quality, *, at_once: int = AT_ONCE) -> None:
        self.quality, self.at_once = quality, at_once

    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`."""
        _free(observer.cases, case, budget)
        mask = observer.cases.rows("initial", case).clone()
        chosen: list[Tensor] = []
        for _ in range(budget):
            _, after = quality_with_each(observer, self.quality, case, mask, at_once=self.at_once)
            chosen.append(after.argmax(dim=1))
            mask.scatter_(1, chosen[-1].unsqueeze(1), value=True)
        return torch.stack(chosen, dim=1)


class AgentLines:
    """What a trained agent chooses: the most probable line, or a drawn one.

    Args:
        agent: The network.
        sample: Draw lines.
        at_once: Acquisitions that go on together.
    """

    def __init__(self, agent: LineAgent, *, sample: bool = False, at_once: int = AT_ONCE) -> None:
        self.agent, self.sample, self.at_once = agent, bool(sample), int(at_once)

    @torch.no_grad()
    def order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        """See `LinePolicy`.

        Raises:
            ConfigError: The agent cannot count so many lines.
        """
        self.agent.check_budget(budget)
        training = self.agent.training
        self.agent.eval()
        try:
            parts = [
                self._order(observer, part, budget, generator) for part in torch.split(case, self.at_once)
            ]
        finally:
            self.agent.train(training)
        return torch.cat(parts)

    def _order(self, observer: CaseObserver, case: Tensor, budget: int, generator: torch.Generator) -> Tensor:
        policy = Sighted(self.agent, observer)
        cases = observer.cases
        case = case.to(cases.device)
        mask = cases.rows("initial", case).clone()
        free = _free(cases, case, budget)
        chosen: list[Tensor] = []
        for taken in range(budget):
            seen = observation_of(case, mask, budget - taken, taken)
            distribution = policy.distribution(seen, free & ~mask)
            chosen.append(distribution.sample(generator) if self.sample else distribution.mode())
            mask.scatter_(1, chosen[-1].unsqueeze(1), value=True)
        return torch.stack(chosen, dim=1)


def observation_of(
    case: Tensor, mask: Tensor, remaining: Tensor | int, taken: Tensor | int
) -> dict[str, Tensor]:
    """The observation of acquisitions, as the environment gives it.

    Args:
        case: ``(B,)``.
        mask: ``(B, A)``.
        remaining: ``(B,)``, or one number for all.
        taken: ``(B,)``, or one number for all.
    """
    counts = [
        torch.as_tensor(value, dtype=torch.int64, device=mask.device).expand(len(mask)).unsqueeze(1)
        for value in (remaining, taken)
    ]
    return {
        "case": case.to(mask.device).view(-1, 1),
        "mask": mask.clone(),
        "remaining": counts[0],
        "taken": counts[1],
    }


def _free(cases: Cases, case: Tensor, budget: int, *, whole_lines: bool = False) -> Tensor:
    """Lines that may be acquired after the initial ones ``(B, A)``.

    Raises:
        ConfigError: Too few for the budget, or points where whole lines are needed.
    """
    if whole_lines and cases.points:
        raise ConfigError("policy", why="the lines are points (kz, ky), which have no order outwards")
    free = cases.rows("possible", case) & ~cases.rows("initial", case)
    least = int(free.sum(dim=1).min()) if len(free) else budget
    if not 1 <= budget <= least:
        raise ConfigError(f"budget of {budget} lines", why=f"1 to {least} are possible")
    return free
