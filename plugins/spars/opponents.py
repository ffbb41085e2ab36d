"""Whom the learner plays: frozen copies of itself, and how it fares against each of them."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.rl.distributions import MaskedCategorical
from medrl.plugins.spars.agent.policy import HuntAgent
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.observer import Observer

Kind: TypeAlias = Literal["frozen", "pool", "live"]
MOST = 8
"""Largest pool."""
LIVE = -1
DUMMY = -2
"""Numbers of opponents that are no copies: the learner itself, and the window that always moves up."""


class Opponents:
    """Moves the second windows.

    The learner's copies are made every so many steps of each environment and never change. Which of them a
    game meets follows from a number that it drew at its start. Copies draw their moves from the noise of the
    environment.

    Args:
        agent: The learner; its copy is the first opponent.
        observer: Of the volumes of the environment.
        kind: ``frozen``: the latest copy; ``pool``: one of several; ``live``: the learner itself, whose
            weights change with every update (original).
        pool: Copies that are kept, for kind ``pool``.
        latest: Probability of the latest copy; else one of the pool, all alike.
        every: Steps of each environment between copies.
        dummy_first: Until the first copy, all second windows move up along z (original).

    Attributes:
        results: Steps won, drawn and lost against each opponent, by its number: of copies, the steps of an
            environment after which they were made.

    Raises:
        ConfigError: A number is out of its range.

    Source: SPARS best_RL.py for ``live`` and the dummy; specification §5.
    """

    def __init__(
        self,
        agent: HuntAgent,
        observer: Observer,
        *,
        kind: Kind = "frozen",
        pool: int = MOST,
        latest: float = 0.8,
        every: int = 32,
        dummy_first: bool = False,
    ) -> None:
        size = pool if kind == "pool" else 1
        if (
            kind not in ("frozen", "pool", "live")
            or not 1 <= size <= MOST
            or every < 1
            or not 0 <= latest <= 1
        ):
            raise ConfigError(
                "opponents",
                why=f"kind {kind}, pool {pool}, latest {latest}, every {every}",
                do=f"kind frozen, pool or live; a pool of 1 to {MOST}",
            )
        self.learner, self.observer, self.kind = agent, observer, kind
        self.size, self.latest, self.every = size, float(latest), int(every)
        self.dummy = self._dummy_first = bool(dummy_first)
        self.steps = 0
        self.results: dict[int, list[int]] = {}
        self._since = 0
        self._members: list[tuple[int, HuntAgent]] = []
        self.restart()

    def restart(self) -> None:
        """Forget everything, and copy the present learner."""
        self.dummy, self.steps, self._since = self._dummy_first, 0, 0
        self.results, self._members = {}, []
        if self.kind != "live":
            self._add(self.learner)

    @property
    def live(self) -> bool:
        """Whether learner and opponent are the same weights, so that one forward serves both."""
        return self.kind == "live" and not self.dummy

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the copies, the oldest first."""
        return tuple(number for number, _ in self._members)

    def member(self, number: int) -> HuntAgent:
        """The copy of a number.

        Raises:
            KeyError: It is not in the pool.
        """
        return dict(self._members)[number]

    def tick(self, steps: int) -> bool:
        """Count steps of each environment; make a copy of the learner where it is time. Return whether."""
        self.steps += steps
        self._since += steps
        if self._since < self.every:
            return False
        self._since = 0
        self.dummy = False
        if self.kind != "live":
            self._add(self.learner)
        return True

    def assigned(self, env: HuntEnv) -> Tensor:
        """Numbers of the opponents of all games ``(E,)`` int64, from what each drew at its start."""
        if self.dummy or self.kind == "live":
            return torch.full((env.num_envs,), DUMMY if self.dummy else LIVE)
        numbers = torch.tensor(self.numbers)
        drawn = env.member.cpu()
        rest = (drawn - self.latest) / max(1.0 - self.latest, 1e-12)
        chosen = (rest * len(numbers)).long().clamp(0, len(numbers) - 1)
        return torch.where(drawn < self.latest, numbers[-1], numbers[chosen])

    @torch.no_grad()
    def act(self, env: HuntEnv) -> Tensor:
        """Actions ``(E,)``, of all games of one opponent in one forward."""
        assigned = self.assigned(env).to(env.device)
        if self.dummy:
            return torch.zeros_like(assigned)
        observation, masks, noise = env.observation(1), env.action_masks(1), env.noise(1)
        actions = torch.zeros_like(assigned)
        for number in torch.unique(assigned).tolist():
            own = torch.nonzero(assigned == number).flatten()
            agent = self.learner if number == LIVE else self.member(number)
            seen = self.observer.seen({name: value[own] for name, value in observation.items()}, agent.needs)
            logits, _ = agent.logits_and_values(seen)
            chances = MaskedCategorical(logits, masks[own]).log_probs
            actions[own] = (chances + noise[own]).argmax(dim=1)
        return actions

    def record(self, env: HuntEnv, scores: Tensor) -> None:
        """Count steps won, drawn and lost, from the scores ``(E, 2)`` of one step."""
        sign = torch.sign(scores[:, 0] - scores[:, 1]).cpu()
        assigned = self.assigned(env)
        for number in torch.unique(assigned).tolist():
            own = sign[assigned == number]
            found = self.results.setdefault(number, [0, 0, 0])
            for place, value in enumerate((1.0, 0.0, -1.0)):
                found[place] += int((own == value).sum())

    def rates(self) -> dict[int, tuple[float, float, float]]:
        """Shares of steps won, drawn and lost against each opponent, by its number."""
        return {
            number: (won / (won + drawn + lost), drawn / (won + drawn + lost), lost / (won + drawn + lost))
            for number, (won, drawn, lost) in self.results.items()
            if won + drawn + lost
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        return {
            "steps": self.steps,
            "since": self._since,
            "dummy": self.dummy,
            "numbers": list(self.numbers),
            "members": [
                {name: value.detach().cpu().clone() for name, value in agent.state_dict().items()}
                for _, agent in self._members
            ],
            "results": {str(number): list(counts) for number, counts in self.results.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.steps, self._since, self.dummy = int(state["steps"]), int(state["since"]), bool(state["dummy"])
        self._members = []
        for number, weights in zip(state["numbers"], state["members"], strict=True):
            made = _frozen(self.learner)
            made.load_state_dict(weights)
            self._members.append((int(number), made))
        self.results = {int(number): list(counts) for number, counts in state["results"].items()}

    def _add(self, agent: HuntAgent) -> None:
        self._members.append((self.steps, _frozen(agent)))
        del self._members[: -self.size]


def _frozen(agent: HuntAgent) -> HuntAgent:
    return copy.deepcopy(agent).requires_grad_(requires_grad=False).eval()
