"""The published weighting: a mixture of policy, quality and diversity, and the published updates.

Kept for comparison. Neither update contains the action, so the policy cannot learn whom to trust: the episode
loss only pulls towards or away from equal weights, the step loss always towards.

Deviations: the policy is built whole before its optimiser (there its first convolutions never train), its
maps are pooled and scaled before the first convolution, returns of one step are zero instead of NaN, and
every rank takes part. R_T of the last episode before a validation is the validation Dice, as published, so
that the validation cases take part in training the policy.

Source: specification §5; train_loops_new_policy.py and models/policy.py of the original.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from medrl.core.rng import torch_generator
from medrl.plugins.graft.agent import (
    Correlation,
    PolicyState,
    StoredEpisode,
    TeacherPolicy,
    published_losses,
    published_step_loss,
)
from medrl.plugins.graft.models import StudentOutput
from medrl.plugins.graft.rewards import RewardMeter
from medrl.plugins.graft.samples import Batch
from medrl.plugins.graft.weighting import (
    TerminalReward,
    legacy_weights,
    warmup_alpha,
    warmup_blend,
)

from .learner import agent_optimizer
from .scene import Scene, Steering, by_teacher


class PublishedSteering(Steering):
    """w = (h + Q + A)/3, updated as published.

    Args:
        scene: The run.
        policy: Gives h; prepared.
    """

    def __init__(self, scene: Scene, policy: nn.Module) -> None:
        super().__init__(scene)
        if not isinstance(policy, TeacherPolicy):
            raise TypeError("the published weighting needs a policy with a state")
        self.policy = policy
        self.settings = scene.cfg.agent
        self.optimizer = agent_optimizer(scene.cfg, policy)
        self.episode = StoredEpisode()
        self.terminal = TerminalReward(legacy=True)
        self.noise = torch_generator(scene.cfg.train.seed, "graft", "random reward")
        self.meter = RewardMeter(scene.cfg, scene.data, scene.rt.device)
        self.correlation = {kind: Correlation(policy.teachers) for kind in policy.head_names}
        self._drawn: list[tuple[Tensor, Tensor]] = []
        self._reward = 0.0
        scene.rt.checkpoint.register(
            policy=policy,
            agent=self.episode,
            agent_optimizer=self.optimizer,
            reward_noise=self.noise,
            **{f"correlation_{kind}": found for kind, found in self.correlation.items()},
        )

    def weights(self, step: int, batch: Batch, output: StudentOutput) -> dict[str, Tensor]:
        """The mixture on this batch; its reward is that of the student before the update, as published."""
        state = self.scene.observe(batch, output)
        by_step = self.settings.update == "step"
        with torch.set_grad_enabled(by_step):
            mixed = self.mixture(state)
        rewards = self._rewards(batch, output)
        if by_step and rewards.numel() and bool(torch.isfinite(rewards).all()):
            chosen = batch.labelled
            self._drawn.append((torch.cat([w[chosen] for w in mixed.values()], dim=1), rewards))
        reward = self._mean(rewards)
        self._reward = reward
        if math.isfinite(reward):
            for kind, found in self.correlation.items():
                found.update(mixed[kind].detach().mean(dim=0), reward)
            if not by_step:
                self.episode.add(state, reward)
        alpha, ones = self._alpha(step), self.settings.blend == "ones"
        return {kind: warmup_blend(w.detach(), alpha, legacy=ones) for kind, w in mixed.items()}

    def mixture(self, state: PolicyState) -> dict[str, Tensor]:
        """Weights ``(B, N)`` by kind from a state, with a graph to the policy."""
        taps = self.scene.data.taps
        quality = state.scalars[..., len(taps)]
        found = {}
        for kind, scores in self.policy(state).items():
            # Logits have no features of their own; they take the likeness at the first tap.
            place = taps.index(kind) if kind in taps else 0
            alike = state.scalars[..., place] if taps else torch.zeros_like(quality)
            found[kind] = legacy_weights(
                torch.softmax(scores, dim=-1),
                quality,
                alike,
                gated=self.settings.gated_diversity,
                factors=self.policy.factors,
                temperature=self.scene.cfg.weighting.temperature,
            )
        return found

    def after(self, step: int, batch: Batch, *, applied: bool) -> dict[str, Any]:
        """Update the policy when it is due."""
        del batch, applied
        facts: dict[str, Any] = {"reward": self._reward} if math.isfinite(self._reward) else {}
        drawn, self._drawn = self._drawn, []
        if self.settings.update == "step":
            if step % self.settings.step_every == 0 or step % self.scene.epoch == 0:
                self._step_update(drawn)
            return facts
        if len(self.episode) >= self.settings.interval:
            facts |= self._episode_update(sum(self.episode.rewards) / len(self.episode))
        return facts

    def validated(self, step: int, dice: float) -> dict[str, Any]:
        """End what is left of an episode with R_T = 100·Dice, as the original does after every epoch."""
        del step
        if self.settings.update == "step" or not len(self.episode):
            return {}
        terminal = self.terminal(dice)
        if self.settings.random_reward:
            terminal = float(torch.randn((), generator=self.noise))
        return self._episode_update(terminal)

    def _episode_update(self, terminal: float) -> dict[str, Any]:
        """Go back through the stored states, four batches at a time."""
        rt = self.scene.rt

        def all_kinds(state: PolicyState) -> Tensor:
            moved = PolicyState(
                tuple(maps.to(rt.device) for maps in state.spatial), state.scalars.to(rt.device)
            )
            return torch.cat(list(self.mixture(moved).values()), dim=1)

        for loss in published_losses(self.episode, all_kinds, gamma=self.settings.gamma, terminal=terminal):
            rt.backward(loss)
            rt.step(self.optimizer, clip_norm=self.settings.clip_norm)
        self.episode.clear()
        facts: dict[str, Any] = {"terminal_reward": terminal}
        for kind, found in self.correlation.items():
            facts |= by_teacher(f"correlation_{kind}", found.values, self.scene.data.teacher_names)
        return facts

    def _step_update(self, drawn: list[tuple[Tensor, Tensor]]) -> None:
        rt = self.scene.rt
        if drawn:
            losses = [published_step_loss(weights, rewards) for weights, rewards in drawn]
            rt.backward(torch.stack(losses).mean())
        rt.step(self.optimizer, clip_norm=self.settings.clip_norm)

    def _alpha(self, step: int) -> float:
        """By epochs, as the original counts; with `ones` also in a run shorter than the warm-up."""
        epoch = self.scene.epoch
        return warmup_alpha(
            (step - 1) // epoch,
            self.settings.warmup / epoch,
            total=self.scene.cfg.train.max_steps / epoch,
            legacy=self.settings.blend == "ones",
        )

    def _rewards(self, batch: Batch, output: StudentOutput) -> Tensor:
        """Reward of each labelled sample on the output before the update."""
        found = self.meter.rewards(output.main.detach().float(), batch)
        if self.settings.random_reward:
            found = torch.randn(found.shape, generator=self.noise).to(found)
        return found

    def _mean(self, rewards: Tensor) -> float:
        """Mean over the labelled samples of all ranks; NaN where there is none."""
        both = torch.stack(
            [rewards.double().sum(), torch.tensor(float(rewards.numel())).to(rewards.device).double()]
        )
        total, count = self.scene.rt.reduce(both).tolist()
        return total / count if count else math.nan
