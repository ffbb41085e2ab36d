"""The agent: acts by drawing weights around a prior, and learns from the rewards that they cause.

Mean weights are softmax(log prior + score), with a floor; the action is drawn from a Dirichlet distribution
around them, so that the gradient of log π says which teachers' shares led to which reward.

Source: specification §5 (DEFAULT) and Williams 1992. The published policy acts without randomness and its
loss does not contain the action, so it cannot learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.rl.distributions import DirichletPolicy
from medrl.core.rl.reinforce import EmaBaseline
from medrl.plugins.graft.agent.episode import TraceEpisode
from medrl.plugins.graft.agent.state import PolicyState
from medrl.plugins.graft.weighting.rules import warmup_blend, with_floor


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Settings of acting and learning.

    Attributes:
        kappa: Concentration of the Dirichlet distribution around the mean weights.
        floor: Part of the weight that is shared equally.
        gamma: Discount of later rewards.
        entropy: β, weight of the entropy bonus.
        baseline_momentum: Memory of the return baseline and scale across episodes.
        scale: Returns are divided by their standard deviation in the episode (``episode``; nothing for an
            episode of one step) or by its running mean across episodes (``running``).
        clip: Largest |advantage| of an episode of one step; 0 = no limit.
        share_action: One action for the whole batch, because the reward is one for the batch.
        seed: Of the draws; the same on every rank.
    """

    kappa: float = 20.0
    floor: float = 0.01
    gamma: float = 0.95
    entropy: float = 1e-3
    baseline_momentum: float = 0.9
    scale: str = "episode"
    clip: float = 3.0
    share_action: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Action:
    """What the agent did for one batch.

    Attributes:
        weights: Weights to use, for each kind of action ``(B, N)``, after the warm-up blend.
        raw: Drawn weights ``(B, N)`` before the blend.
        mean: Mean of the policy ``(B, N)``, without a graph.
        log_prob: log π of the raw action, summed over kinds and averaged over samples; with a graph.
        entropy: Entropy of the policy, likewise.
    """

    weights: dict[str, Tensor]
    raw: dict[str, Tensor]
    mean: dict[str, Tensor]
    log_prob: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class ScoredAction:
    """An action whose reward is still to come: the gradients that the reward will multiply, without a graph.

    Attributes:
        score: ∇log π, one tensor for each parameter of the policy.
        spread: ∇H likewise; None without an entropy bonus.
        away: Drawn minus mean weights by kind ``(N,)``.
    """

    score: list[Tensor]
    spread: list[Tensor] | None
    away: dict[str, Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        return {"score": self.score, "spread": self.spread, "away": self.away}


@dataclass(frozen=True)
class UpdateReport:
    """Numbers of one update, for the log."""

    steps: int
    mean_return: float
    baseline: float
    scale: float


class TeacherAgent:
    """Draws teacher weights and learns from rewards.

    The loop calls `act`, trains the student with the weights, measures the reward and calls `record`; every
    so many steps it goes back through `loss` and steps the policy's optimiser. Rewards must already be the
    mean over ranks.

    Args:
        policy: `TeacherPolicy` or `FreePolicy`, already on its device; register it with the checkpoint
            beside the agent.
        settings: Of acting and learning.
    """

    def __init__(self, policy: nn.Module, settings: AgentSettings | None = None) -> None:
        self.policy = policy
        self.settings = settings or AgentSettings()
        if self.settings.scale not in ("episode", "running"):
            raise ConfigError("agent scale", why=f"expected episode or running, got '{self.settings.scale}'")
        self.episode = TraceEpisode(
            [p for p in policy.parameters() if p.requires_grad], gamma=self.settings.gamma
        )
        self.baseline = EmaBaseline(self.settings.baseline_momentum)
        self.spread = EmaBaseline(self.settings.baseline_momentum)
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.correlation: dict[str, Correlation] = {}

    def means(self, state: PolicyState | None, prior: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean weights ``(B, N)`` of each kind of action, with a graph, float32.

        Args:
            state: Of the batch; None for a policy without a state.
            prior: Weights ``(N,)`` or ``(B, N)`` by kind of action; uniform where a kind is missing.
        """
        scores = self.policy(state)
        found = {}
        for name, score in scores.items():
            base = torch.zeros_like(score)
            if name in prior:
                base = prior[name].detach().to(score).clamp_min(1e-8).log()
            found[name] = with_floor(torch.softmax(score.float() + base, dim=-1), self.settings.floor)
        return found

    def act(
        self,
        state: PolicyState | None,
        prior: Mapping[str, Tensor],
        *,
        alpha: float = 1.0,
        start: Mapping[str, Tensor] | None = None,
        explore: bool = True,
    ) -> Action:
        """Draw the weights of a batch.

        Args:
            state: Of the batch; None for a policy without a state.
            prior: What the scores are a residual on.
            alpha: Warm-up: 0 gives exactly the starting weights, 1 the drawn ones. Log π is always that of
                the raw draw.
            start: Weights that the warm-up starts from, by kind; uniform where a kind is missing.
            explore: Draw; else take the mean.
        """
        means = self.means(state, prior)
        weights, raw, log_probs, entropies = {}, {}, [], []
        for name, mean in means.items():
            batch = mean.shape[0]
            shared = mean.mean(dim=0, keepdim=True) if self.settings.share_action else mean
            policy = DirichletPolicy.around(shared, kappa=self.settings.kappa)
            drawn = shared.detach()
            if explore:
                drawn = DirichletPolicy(policy.concentration.detach().cpu()).sample(self.generator).to(shared)
            log_probs.append(policy.log_prob(drawn).mean())
            entropies.append(policy.entropy().mean())
            raw[name] = drawn.expand(batch, -1)
            weights[name] = warmup_blend(raw[name], alpha, start=(start or {}).get(name))
        return Action(
            weights,
            raw,
            {name: mean.detach() for name, mean in means.items()},
            torch.stack(log_probs).sum(),
            torch.stack(entropies).sum(),
        )

    def scored(self, action: Action) -> ScoredAction:
        """Keep of an action what its reward will need, so that it can be held over several updates."""
        score, spread = self.episode.gradients(
            action.log_prob, action.entropy if self.settings.entropy > 0 else None
        )
        away = {name: (raw - action.mean[name]).mean(dim=0) for name, raw in action.raw.items()}
        return ScoredAction(score, spread, away)

    def record(self, action: Action | ScoredAction, reward: float) -> None:
        """Take in the reward that an action caused, one number for the batch, equal on all ranks.

        A reward that is not finite is left out with its action.
        """
        if not math.isfinite(reward):
            return
        held = action if isinstance(action, ScoredAction) else self.scored(action)
        self.episode.take(
            [g.to(p) for g, p in zip(held.score, self.episode.parameters, strict=True)],
            None
            if held.spread is None
            else [g.to(p) for g, p in zip(held.spread, self.episode.parameters, strict=True)],
            float(reward),
        )
        for name, away in held.away.items():
            tracker = self.correlation.setdefault(name, Correlation(len(away)))
            tracker.update(away, float(reward))

    def loss(self, *, terminal: float = 0.0) -> tuple[Tensor, UpdateReport]:
        """End the episode: a scalar whose gradient is that of REINFORCE, and numbers for the log.

        Advantages are (G − baseline)/scale with the baseline of earlier episodes; the first episode uses its
        own mean, and an episode of one step that nothing precedes has no advantage.

        Args:
            terminal: R_T, the reward of the episode's end.
        """
        steps = len(self.episode)
        if steps == 0:
            zero = sum((p.sum() * 0.0 for p in self.episode.parameters), torch.zeros(()))
            return zero, UpdateReport(0, 0.0, self.baseline.value, 1.0)
        returns = self.episode.returns(terminal)
        known = self.baseline.updates > 0
        baseline = self.baseline.value if known else float(returns.mean())
        deviation = float((returns - baseline).square().mean().sqrt())
        scale = self._scale(returns)
        advantage = (float(returns.mean()) - baseline) / scale
        limit = self.settings.clip
        if steps == 1 and limit > 0 and abs(advantage) > limit:
            scale *= abs(advantage) / limit
        gradients = self.episode.gradient(
            terminal=terminal, baseline=baseline, scale=scale, beta=self.settings.entropy
        )
        report = UpdateReport(steps, float(returns.mean()), baseline, scale)
        self.baseline.update(returns)
        self.spread.update(deviation)
        surrogate = torch.stack(
            [(p * g.detach()).sum() for p, g in zip(self.episode.parameters, gradients, strict=True)]
        ).sum()
        self.episode.clear()
        return surrogate, report

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint; the policy is registered by itself."""
        return {
            "episode": self.episode.state_dict(),
            "baseline": self.baseline.state_dict(),
            "spread": self.spread.state_dict(),
            "generator": self.generator.get_state(),
            "correlation": {name: tracker.state_dict() for name, tracker in self.correlation.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: A key is missing or does not fit.
        """
        try:
            self.episode.load_state_dict(state["episode"])
            self.baseline.load_state_dict(state["baseline"])
            self.spread.load_state_dict(state["spread"])
            self.generator.set_state(state["generator"].cpu())
            self.correlation = {}
            for name, values in state["correlation"].items():
                self.correlation[name] = Correlation(len(values["products"]))
                self.correlation[name].load_state_dict(values)
        except KeyError as error:
            raise CheckpointError("agent", why=f"the checkpoint lacks {error}") from error

    def _scale(self, returns: Tensor) -> float:
        """What advantages are divided by; 1 where there is no spread, as rounding is no signal."""
        spread = float(returns.std()) if len(returns) > 1 else 0.0
        if self.settings.scale == "running":
            spread = self.spread.value
        return spread if spread > 1e-6 * float(returns.abs().max()) else 1.0


class Correlation:
    """Running correlation of each teacher's share (its deviation from the mean weight) with the reward."""

    def __init__(self, teachers: int) -> None:
        self.count = 0
        self.reward_mean = 0.0
        self.reward_square = 0.0
        self.means = [0.0] * teachers
        self.squares = [0.0] * teachers
        self.products = [0.0] * teachers

    def update(self, shares: Tensor, reward: float) -> None:
        """Take in one step (Welford's sums)."""
        self.count += 1
        before = reward - self.reward_mean
        self.reward_mean += before / self.count
        self.reward_square += before * (reward - self.reward_mean)
        for i, share in enumerate(shares.detach().double().tolist()):
            away = share - self.means[i]
            self.means[i] += away / self.count
            self.squares[i] += away * (share - self.means[i])
            self.products[i] += away * (reward - self.reward_mean)

    @property
    def values(self) -> list[float]:
        """Correlation of each teacher, 0 where it is not defined; its standard error is about 1/√count."""
        found = []
        for square, product in zip(self.squares, self.products, strict=True):
            size = (square * self.reward_square) ** 0.5
            found.append(product / size if size > 0 else 0.0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name in vars(self):
            setattr(self, name, state[name])


class Agreement:
    """Running correlation of each teacher's weight with its own measurement, such as its alignment."""

    def __init__(self, teachers: int) -> None:
        self.each = [Correlation(1) for _ in range(teachers)]

    def update(self, weights: Tensor, measured: Tensor) -> None:
        """Take in one measurement: both ``(N,)``; one that is not finite changes nothing."""
        if not bool(torch.isfinite(measured).all()):
            return
        for tracker, weight, value in zip(self.each, weights, measured.tolist(), strict=True):
            tracker.update(weight[None], float(value))

    @property
    def values(self) -> list[float]:
        """Correlation of each teacher, 0 where it is not defined; its standard error is about 1/√count."""
        return [tracker.values[0] for tracker in self.each]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"each": [tracker.state_dict() for tracker in self.each]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for tracker, values in zip(self.each, state["each"], strict=True):
            tracker.load_state_dict(values)
