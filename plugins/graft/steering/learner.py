"""Weighting `reinforce`: an agent draws the weights, and learns from the change of reward that they cause.

An action is held for `agent.horizon` steps. Its reward is r after them minus r before them, on reward cases.
After `agent.interval` rewarded actions the policy takes one step of REINFORCE.

Source: specification §5 (DEFAULT); horizon and cross-fitting after experiments recorded beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.core.rng import derive_seed, torch_generator
from medrl.plugins.graft.agent import AgentSettings, ScoredAction, TeacherAgent
from medrl.plugins.graft.config import GraftConfig
from medrl.plugins.graft.models import StudentOutput
from medrl.plugins.graft.priors import floor_of
from medrl.plugins.graft.rewards import RewardMeter
from medrl.plugins.graft.samples import Batch
from medrl.plugins.graft.weighting import TerminalReward

from .scene import Scene, Steering, by_teacher


class Learner(Steering):
    """The agent inside the loop: acts, measures what its actions earn, learns at the end of an episode.

    Args:
        scene: The run.
        policy: Prepared.
    """

    def __init__(self, scene: Scene, policy: nn.Module) -> None:
        super().__init__(scene)
        cfg = scene.cfg
        self.settings = cfg.agent
        self.agent = TeacherAgent(
            policy,
            AgentSettings(
                kappa=cfg.agent.kappa,
                floor=floor_of(cfg),
                gamma=cfg.agent.gamma,
                entropy=cfg.agent.entropy,
                baseline_momentum=cfg.agent.baseline_momentum,
                scale=cfg.agent.scale,
                seed=derive_seed(cfg.train.seed, "graft", "agent"),
            ),
        )
        self.terminal = TerminalReward(cfg.agent.baseline_momentum)
        self.noise = torch_generator(cfg.train.seed, "graft", "random reward")
        self.optimizer = agent_optimizer(cfg, policy)
        self.meter = RewardMeter(cfg, scene.data, scene.rt.device)
        self.held = Held()
        self._measured: Batch | None = None
        if cfg.agent.horizon > 1 and not self.meter.on_split:
            raise ConfigError(
                "agent.horizon",
                why="a reward over several steps needs cases of its own, the batch changes at every step",
                do="--set split.reward_mode=split or --set split.reward_mode=crossfit",
            )
        scene.rt.checkpoint.register(
            policy=policy,
            agent=self.agent,
            agent_optimizer=self.optimizer,
            terminal_reward=self.terminal,
            reward_noise=self.noise,
            held_action=self.held,
        )

    def held_out(self, step: int) -> int | None:
        """The fold that measures the reward of the current episode."""
        return self.meter.fold(self._episode(step))

    def weights(self, step: int, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """The held action, or a new one; all micro-batches of a step share the first one's draw."""
        size = len(batch.case_ids)
        if not self.held.weights:
            state = self.scene.observe(batch, output) if self.settings.policy == "state" else None
            prior = self.scene.priors.batch(size)
            action = self.agent.act(state, prior, alpha=self.scene.alpha(step), start=prior)
            self.held.weights = {kind: weights[:1].detach() for kind, weights in action.weights.items()}
            self.held.action = self.agent.scored(action) if self._due(step) else None
        device = self.scene.rt.device
        return {kind: held.to(device).expand(size, -1) for kind, held in self.held.weights.items()}

    def before(self, step: int, batch: Batch) -> None:
        """Measure the student just before the first update that the action causes."""
        if self.held.action is None or (step - 1) % self.settings.horizon:
            return
        self._measured = self.meter.batch(self._episode(step), batch)
        self.held.before = self.meter.level(self.scene.student, self._measured)

    def after(self, step: int, batch: Batch, *, applied: bool) -> dict[str, Any]:
        """After the last step of an action give it its reward, and learn if the episode is over."""
        self.held.applied += int(applied)
        if step % self.settings.horizon:
            return {}
        facts: dict[str, Any] = {}
        held, measured = self.held, self._measured
        if held.action is not None and held.applied:
            if measured is None or self.meter.on_split:
                measured = self.meter.batch(self._episode(step), batch)
            change = self.meter.level(self.scene.student, measured) - held.before
            reward = self.scene.rt.reduce(change)
            if self.settings.random_reward:
                reward = float(torch.randn((), generator=self.noise))
            if math.isfinite(reward):
                self.agent.record(held.action, reward)
            facts["reward"] = reward
        held.clear()
        self._measured = None
        if len(self.agent.episode) >= self.settings.interval:
            facts |= self._learn(step)
        return facts

    def _learn(self, step: int) -> dict[str, Any]:
        """End the episode with one REINFORCE update."""
        terminal = 0.0
        facts: dict[str, Any] = {}
        if self.settings.terminal and self.meter.on_split:
            dice = self.meter.dice(self.scene.student, self._episode(step))
            terminal = self.terminal(dice)
            if self.settings.random_reward:
                terminal = float(torch.randn((), generator=self.noise))
            facts |= {"reward_dice": dice, "terminal_reward": terminal}
        loss, report = self.agent.loss(terminal=terminal)
        self.scene.rt.backward(loss)
        self.scene.rt.step(self.optimizer, clip_norm=self.settings.clip_norm)
        names = self.scene.data.teacher_names
        facts |= {
            "return": report.mean_return,
            "return_baseline": report.baseline,
            "return_scale": report.scale,
        }
        if self.settings.policy == "free":
            with torch.no_grad():
                means = self.agent.means(None, self.scene.priors.batch(1))
            for kind, mean in means.items():
                facts |= by_teacher(f"policy_{kind}", mean[0].tolist(), names)
        for kind, found in self.agent.correlation.items():
            facts |= by_teacher(f"correlation_{kind}", found.values, names)
        return facts

    def _episode(self, step: int) -> int:
        """Number of the episode that a step belongs to, if no reward is left out."""
        settings = self.settings
        return (step - 1) // (settings.interval * settings.horizon * settings.reward_every)

    def _due(self, step: int) -> bool:
        """Whether the action that is drawn at a step earns a reward."""
        number = (step - 1) // self.settings.horizon + 1
        return self.scene.alpha(step) > 0.0 and number % self.settings.reward_every == 0


@dataclass
class Held:
    """The action in force, with the gradients that its reward will need; a part of the checkpoint.

    Attributes:
        weights: By kind ``(1, N)``; empty between two actions.
        action: None if it earns nothing.
        before: Level of the reward before it.
        applied: Updates of the student under it.
    """

    weights: dict[str, Tensor]
    action: ScoredAction | None
    before: float
    applied: int

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Between two actions."""
        self.weights, self.action, self.before, self.applied = {}, None, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "weights": dict(self.weights),
            "action": None if self.action is None else self.action.state_dict(),
            "before": self.before,
            "applied": self.applied,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.weights = dict(state["weights"])
        self.action = None if state["action"] is None else ScoredAction(**state["action"])
        self.before, self.applied = float(state["before"]), int(state["applied"])


def agent_optimizer(cfg: GraftConfig, policy: nn.Module) -> torch.optim.Optimizer:
    """The policy's optimiser; with `agent.reach` its rate follows from the number of updates of the run."""
    agent, name = cfg.agent, cfg.agent.optimizer
    if name == "auto":
        name = "sgd" if cfg.weighting.mode == "legacy" else "adam"
    rate = agent.lr or (1e-3 if name == "sgd" else 0.05)
    if agent.reach > 0:
        updates = cfg.train.max_steps / (agent.interval * agent.horizon * agent.reward_every)
        rate = agent.reach / max(1.0, updates)
    if name == "sgd":
        return torch.optim.SGD(policy.parameters(), lr=rate)
    return torch.optim.Adam(policy.parameters(), lr=rate)
