"""The environment: acquire a line, pay for what it adds; E acquisitions at once, on one device.

Observations hold the number of the case, the mask and the counters, so that rollouts keep no k-space;
`CaseObserver` makes images and features of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.imaging import View
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.rewards import Reward
from medrl.plugins.kspace.under_way import UnderWay

EXTRAS = ("kspace", "zf", "seg_prob", "columns")


class KSpaceEnv:
    """E acquisitions of cases drawn at random; the `BatchedEnv` of medrl.

    An episode starts with the initial lines of its case, and ends when its budget of further lines is spent.
    Illegal actions (acquired, padding, outside the sampled indices, a finished episode) are errors.

    Args:
        observer: The cases, and how they are seen.
        reward: Pays each line.
        num_envs: E.
        budgets: Each episode's budget is one of these, drawn uniformly; ``range(5, 51)`` is 5 to 50.
        same_budget: All episodes that start together have one budget, as in the original.
        repeats: So many neighbouring episodes have the same case and budget, to compare their returns.
        weights: ``(N,)``, how often each case is drawn, with replacement; None is uniform.
        observe: What observations hold beside the mask and the counters: ``columns`` (with ``pooled``) are
            features, which then need not be computed again in an update; ``kspace`` as real and imaginary
            part, ``zf`` and ``seg_prob`` for agents of other libraries.
        seed: Of cases and budgets.

    Attributes:
        case: ``(E,)`` number of each episode's case.
        mask: ``(E, A)`` acquired lines.
        budget: ``(E,)``.
        taken: ``(E,)`` lines acquired by the policy.

    Deviation: episodes do not start again by themselves (`BatchedEnv`); budgets and ends are each episode's
    own; the reward network does not run on steps that are paid nothing.

    Raises:
        ConfigError: A budget is below 1 or above what a case offers; weights, repeats or names do not fit.

    Source: ASMR asmr_env.py; specification §5.
    """

    def __init__(
        self,
        observer: CaseObserver,
        reward: Reward,
        *,
        num_envs: int,
        budgets: Sequence[int] = range(5, 51),
        same_budget: bool = False,
        repeats: int = 1,
        weights: Tensor | None = None,
        observe: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        cases = observer.cases
        _check(observer, reward, num_envs, budgets, repeats, weights, observe)
        self.observer, self.reward = observer, reward
        self.num_envs, self.repeats = int(num_envs), int(repeats)
        self.budgets = torch.tensor(list(budgets), dtype=torch.int64)
        self.same_budget = bool(same_budget)
        self.weights = torch.ones(len(cases)) if weights is None else weights.detach().cpu().float()
        self.observe = tuple(observe)
        self.generator = torch.Generator().manual_seed(seed)
        device = cases.device
        self.case = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.mask = torch.zeros(num_envs, cases.actions, dtype=torch.bool, device=device)
        self.budget = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.taken = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._quality = torch.zeros(num_envs, device=device)
        self._under_way: UnderWay | None = None
        self._view: View | None = None
        self._seen: dict[str, Tensor] | None = None
        features = observer.features
        self._always = bool(set(observe) & {"seg_prob", "columns"})
        self._segment = (
            reward.quality.needs_labels
            or "seg_prob" in observe
            or (features is not None and features.needs_classes)
        )
        self.action_space = gymnasium.spaces.Discrete(cases.actions)
        self.observation_space = self._space()

    @property
    def cases(self) -> Cases:
        """The cases."""
        return self.observer.cases

    def reset(self, seed: int | None = None, indices: Tensor | None = None) -> dict[str, Tensor]:
        """Start new episodes; see `BatchedEnv.reset`.

        Raises:
            ConfigError: With `repeats`, not all episodes of a case start together.
        """
        if seed is not None:
            self.generator.manual_seed(seed)
        everyone = torch.arange(self.num_envs)
        chosen = everyone if indices is None or self._under_way is None else indices.cpu().sort().values
        self._begin(chosen, *self._draw(chosen))
        return self.observation()

    def start(self, cases: Tensor, budgets: Tensor) -> dict[str, Tensor]:
        """Start all episodes on given cases ``(E,)`` with given budgets ``(E,)``, in place of drawn ones.

        Raises:
            ConfigError: The numbers do not fit the cases.
        """
        if (
            not len(cases) == len(budgets) == self.num_envs
            or not 0 <= int(cases.min()) <= int(cases.max()) < len(self.cases)
            or not 1 <= int(budgets.min()) <= int(budgets.max()) <= self.cases.fewest
        ):
            raise ConfigError(
                "episodes",
                why=f"{self.num_envs} numbers of {len(self.cases)} cases and budgets from 1 to "
                f"{self.cases.fewest} are expected",
            )
        self._begin(torch.arange(self.num_envs), cases, budgets)
        return self.observation()

    @torch.no_grad()
    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Acquire one line ``(E,)`` in each episode; see `BatchedEnv.step`.

        The info has ``quality`` ``(E,)``, as far as the reward needs it, and ``no_foreground`` ``(E,)`` bool.

        Raises:
            RuntimeFault: An action is illegal, or an episode has ended.
        """
        under_way = self._now
        done = self._acquire(actions)
        before = self._quality.clone()
        rows = self.reward.needed(self.taken, done)
        everyone = bool(rows.all())
        self._view = self._look() if self._always or everyone else None
        if everyone:
            self._score(torch.arange(self.num_envs, device=rows.device))
        elif bool(rows.any()):
            self._score(torch.nonzero(rows).flatten())
        rewards = self.reward.pay(before, self._quality, self.taken, done)
        info = {"quality": self._quality.clone(), "no_foreground": ~under_way.truth.has_foreground}
        return self.observation(), rewards, done, torch.zeros_like(done), info

    @torch.no_grad()
    def advance(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Acquire one line in each episode, and start new ones in the place of those that end.

        What `step` and then `reset` of the ended episodes give, up to rounding; the last states of episodes,
        in which nothing is chosen, are judged only, and all others are looked at together.

        Returns:
            Observations, of new episodes where one ended; rewards ``(E,)``; who ended ``(E,)`` bool.

        Raises:
            RuntimeFault: An action is illegal.
        """
        if not self._always or self.reward.mode != "delta":
            observation, rewards, done, _, _ = self.step(actions)
            if bool(done.any()):
                observation = self.reset(indices=torch.nonzero(done).flatten())
            return observation, rewards, done
        done = self._acquire(actions)
        before, taken = self._quality.clone(), self.taken.clone()
        ended = torch.nonzero(done).flatten()
        if len(ended):
            self._view = None
            self._score(ended)
            last = self._quality[ended]
            chosen = ended.cpu()
            self._begin(chosen, *self._draw(chosen), look=False)
        self._view = self._look()
        self._score(torch.arange(self.num_envs, device=done.device))
        after = self._quality.clone()
        if len(ended):
            after[ended] = last
        return self.observation(), self.reward.pay(before, after, taken, done), done

    def action_masks(self) -> Tensor:
        """Legal lines ``(E, A)`` bool."""
        return self.cases.rows("possible", self.case) & ~self.mask

    @torch.no_grad()
    def observation(self) -> dict[str, Tensor]:
        """What is observed now, of all E episodes.

        ``case`` ``(E, 1)``, ``mask`` ``(E, A)`` bool, ``remaining`` and ``taken`` ``(E, 1)`` int64, and what
        `observe` names.
        """
        found = {
            "case": self.case.unsqueeze(1).clone(),
            "mask": self.mask.clone(),
            "remaining": (self.budget - self.taken).unsqueeze(1),
            "taken": self.taken.unsqueeze(1).clone(),
        }
        if self._view is not None:
            self.observer.remember(self.case, self.mask, self._view)
        if "columns" in self.observe:
            if self._seen is None:
                self._seen = dict(self.observer.features_of(found))
            found |= self._seen
        if "kspace" in self.observe:
            found["kspace"] = torch.view_as_real(self.cases.measured(self.case, self.mask))
        if "zf" in self.observe:
            found["zf"] = self._image().abs()
        if "seg_prob" in self.observe:
            found["seg_prob"] = (self._view or self._look()).probabilities
        return found

    @torch.no_grad()
    def refresh(self) -> dict[str, Tensor]:
        """Compute images and qualities of all episodes again from their masks, and observe.

        What follows then depends on `state_dict` alone, to the last bit: call it before each rollout. It also
        ends the rounding errors of images to which lines were added one by one.
        """
        everyone = torch.arange(self.num_envs)
        self._begin(
            everyone,
            self.case.clone(),
            self.budget.clone(),
            mask=self.mask.clone(),
            taken=self.taken.clone(),
        )
        return self.observation()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next episodes depend on, after `refresh`."""
        return {
            "case": self.case.cpu().clone(),
            "mask": self.mask.cpu().clone(),
            "budget": self.budget.cpu().clone(),
            "taken": self.taken.cpu().clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.generator.set_state(state["generator"].cpu())
        everyone = torch.arange(self.num_envs)
        self._begin(everyone, state["case"], state["budget"], mask=state["mask"], taken=state["taken"])

    # -- private -----------------------------------------------------------------------------------

    def _draw(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Cases and budgets of the episodes that start."""
        groups = chosen[: len(chosen) // self.repeats * self.repeats].view(-1, self.repeats)
        first = groups[:, :1]
        together = groups.numel() == len(chosen) and bool((first % self.repeats == 0).all())
        if not together or not torch.equal(groups, first + torch.arange(self.repeats)):
            raise ConfigError("episodes", why=f"the {self.repeats} of one case must start together")
        cases = torch.multinomial(self.weights, len(groups), replacement=True, generator=self.generator)
        draws = 1 if self.same_budget else len(groups)
        number = torch.randint(len(self.budgets), (draws,), generator=self.generator)
        budgets = self.budgets[number.expand(len(groups))]
        return cases.repeat_interleave(self.repeats), budgets.repeat_interleave(self.repeats)

    @torch.no_grad()
    def _begin(
        self,
        chosen: Tensor,
        cases: Tensor,
        budgets: Tensor,
        *,
        mask: Tensor | None = None,
        taken: Tensor | None = None,
        look: bool = True,
    ) -> None:
        self.observer.forget()
        device = self.mask.device
        where = chosen.to(device)
        own = cases.to(device)
        self.case[where], self.budget[where] = own, budgets.to(device)
        self.taken[where] = torch.zeros_like(own) if taken is None else taken.to(device)
        self.mask[where] = self.cases.rows("initial", own) if mask is None else mask.to(device)
        fresh = UnderWay(self.cases, self.reward.quality, own, self.mask[where])
        if self._under_way is None or len(chosen) == self.num_envs:
            self._under_way, self._view, self._seen = fresh, None, None
        else:
            self._under_way.put(where, fresh)
        if not look:
            return
        if self._always or self.reward.mode == "delta":
            view = self.observer.view(own, self.mask[where], coil_images=fresh.images, segment=self._segment)
            self._see(where, view)
            self._view = view if self._view is None else self._view.put(where, view)
        else:
            self._view = None
        self._quality[where] = 0.0
        if self.reward.mode == "delta":
            self._score(where)

    def _see(self, where: Tensor, view: View) -> None:
        """Renew the features of episodes that have begun; those of the others are as they were."""
        if self._seen is None:
            return
        names = {
            "case": self.case,
            "mask": self.mask,
            "remaining": self.budget - self.taken,
            "taken": self.taken,
        }
        own = {name: value[where] for name, value in names.items()}
        self.observer.remember(own["case"], own["mask"], view)
        fresh = self.observer.features_of(own)
        self.observer.forget()
        self._seen = {name: value.index_copy(0, where, fresh[name]) for name, value in self._seen.items()}

    @property
    def _now(self) -> UnderWay:
        if self._under_way is None:
            raise RuntimeFault("kspace environment", why="nothing is under way", do="reset it first")
        return self._under_way

    def _acquire(self, actions: Tensor) -> Tensor:
        """Take one line ``(E,)`` in each episode; say which have ended."""
        lines = actions.to(self.mask.device, torch.int64).view(-1)
        under_way = self._now
        self._refuse(lines)
        self.observer.forget()
        self._seen = None
        self.mask.scatter_(1, lines.unsqueeze(1), value=True)
        under_way.add(lines)
        self.taken += 1
        return self.taken >= self.budget

    def _look(self) -> View:
        return self.observer.view(self.case, self.mask, coil_images=self._now.images, segment=self._segment)

    def _score(self, where: Tensor) -> None:
        """Judge some episodes, with the view of all if there is one."""
        under_way, quality = self._now, self.reward.quality
        whole = len(where) == self.num_envs
        truth = under_way.truth if whole else under_way.truth.select(where)
        if self._view is not None:
            view = self._view if whole else self._view.select(where)
        else:
            view = self.observer.view(
                self.case[where],
                self.mask[where],
                coil_images=under_way.images[where],
                segment=quality.needs_labels,
                gradient=False,
            )
        self._quality[where] = quality.score(view, truth).total

    def _image(self) -> Tensor:
        if self._view is not None:
            return self._view.image
        images = self._now.images
        return self.observer.view(self.case, self.mask, coil_images=images, segment=False).image

    def _refuse(self, lines: Tensor) -> None:
        """Refuse actions without a meaning."""
        if lines.shape != self.case.shape or bool(((lines < 0) | (lines >= self.cases.actions)).any()):
            raise RuntimeFault(
                "kspace environment",
                why=f"actions {lines.tolist()}, expected {self.num_envs} below {self.cases.actions}",
            )
        ended = self.taken >= self.budget
        if bool(ended.any()):
            where = torch.nonzero(ended).flatten().tolist()
            raise RuntimeFault(
                "kspace environment", why=f"episodes {where} have ended", do="reset them with `indices`"
            )
        legal = self.action_masks().gather(1, lines.unsqueeze(1)).squeeze(1)
        if not bool(legal.all()):
            first = int(torch.nonzero(~legal)[0])
            raise RuntimeFault(
                "kspace environment",
                why=f"line {int(lines[first])} of episode {first} was acquired before or does not exist",
                do="choose among `action_masks`",
            )

    def _space(self) -> gymnasium.spaces.Dict:
        cases = self.cases
        box = gymnasium.spaces.Box
        most = int(self.budgets.max())
        found: dict[str, gymnasium.Space[Any]] = {
            "case": box(0, len(cases) - 1, (1,), np.int64),
            "mask": gymnasium.spaces.MultiBinary(cases.actions),
            "remaining": box(0, most, (1,), np.int64),
            "taken": box(0, most, (1,), np.int64),
        }
        coils = tuple(cases.kspace.shape[1:2]) if cases.coils else ()
        features = self.observer.features
        count = (0, 0) if features is None else (len(features.names), len(features.pooled_names))
        shapes = {
            "kspace": (*coils, *cases.image_shape, 2),
            "zf": cases.image_shape,
            "columns": (count[0], cases.width),
            "pooled": (count[1],),
        }
        wanted = {*self.observe, *(("pooled",) if "columns" in self.observe else ())}
        for name in sorted(wanted & shapes.keys()):
            found[name] = box(0.0 if name == "zf" else -np.inf, np.inf, shapes[name], np.float32)
        if "seg_prob" in wanted:
            classes = self.observer.classes
            found["seg_prob"] = box(0.0, 1.0, (classes, *cases.image_shape), np.float32)
        return gymnasium.spaces.Dict(found)


def _check(
    observer: CaseObserver,
    reward: Reward,
    num_envs: int,
    budgets: Sequence[int],
    repeats: int,
    weights: Tensor | None,
    observe: Sequence[str],
) -> None:
    """Refuse settings without a meaning, all of them at once."""
    cases = observer.cases
    problems: list[str] = []
    if num_envs < 1 or repeats < 1 or num_envs % max(repeats, 1):
        problems.append(f"{num_envs} environments in groups of {repeats}")
    if not len(budgets) or min(budgets) < 1 or max(budgets) > cases.fewest:
        found = f"{min(budgets)} to {max(budgets)}" if len(budgets) else "none"
        problems.append(f"budgets: {found}; a case leaves {cases.fewest} lines to choose")
    if weights is not None and (
        tuple(weights.shape) != (len(cases),) or not bool((weights >= 0).all() & (weights.sum() > 0))
    ):
        problems.append(f"weights: expected {len(cases)} numbers, none negative and not all 0")
    unknown = sorted(set(observe) - set(EXTRAS))
    if unknown:
        problems.append(f"observe: unknown {', '.join(unknown)}; known are {', '.join(EXTRAS)}")
    if "columns" in observe and observer.features is None:
        problems.append("observe: columns need an observer with features")
    if observer.imaging.segmenter is None and (reward.quality.needs_labels or "seg_prob" in observe):
        problems.append("a segmentation network is needed by the reward or by what is observed")
    if reward.quality.needs_labels and cases.labels is None:
        problems.append("labels are needed by the reward")
    if problems:
        raise ConfigError("kspace environment", why="its settings do not fit", problems=problems)
