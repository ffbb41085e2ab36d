"""Episodes of an environment under a simple policy, and what every environment must hold."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import gymnasium
import numpy as np
import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.errors import ConfigError, MedrlError
from medrl.core.rl.env import BatchedEnv, GymnasiumAdapter, Observation, action_masks

PolicyName: TypeAlias = Literal["random", "greedy"]
POLICIES: tuple[PolicyName, ...] = ("random", "greedy")
STEPS = 1000
"""Steps after which an episode that does not end is cut."""

Build: TypeAlias = Callable[[int], BatchedEnv]
"""Makes the environment with a number of episodes."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode that was played.

    Attributes:
        actions: As plain values.
        rewards: Of each step.
        ended: ``terminated``, ``truncated``, or ``cut`` by the limit of steps.
    """

    actions: tuple[Any, ...]
    rewards: tuple[float, ...]
    ended: str

    @property
    def total(self) -> float:
        """Sum of the rewards."""
        return float(sum(self.rewards))


def play(
    env: BatchedEnv, policy: PolicyName = "random", *, episodes: int = 1, seed: int = 0, steps: int = STEPS
) -> Iterator[Episode]:
    """Play episodes one after the other; legal actions only, where the environment has action masks.

    Args:
        env: With ``num_envs`` equal to 1.
        policy: ``random``; ``greedy`` tries each action on a copy of the environment and takes the one whose
            next reward is largest, the first of equals: it looks at the reward, which a policy must predict.
        episodes: How many.
        seed: Of environment and policy; episode k is the same however many are played.
        steps: The longest episode.

    Raises:
        ConfigError: Several episodes at once, an unknown policy, or actions that cannot be counted.
    """
    if env.num_envs != 1:
        raise ConfigError("play", why=f"the environment holds {env.num_envs} episodes, expected 1")
    if policy not in POLICIES:
        raise ConfigError("policy", why=f"unknown: {policy!r}", do=" or ".join(POLICIES))
    if policy == "greedy" and not isinstance(env.action_space, gymnasium.spaces.Discrete):
        why = f"it tries every action, and these are {env.action_space}"
        raise ConfigError("policy greedy", why=why, do="--policy random")
    for number in range(episodes):
        env.reset(seed=rng.derive_seed(seed, "play", number) % 2**31)
        generator = rng.numpy_generator(seed, "play", "policy", number)
        env.action_space.seed(int(generator.integers(2**31)))
        actions: list[Any] = []
        rewards: list[float] = []
        ended = "cut"
        while len(actions) < steps:
            action = _draw(env, generator) if policy == "random" else _best(env)
            _, reward, terminated, truncated, _ = env.step(action)
            actions.append(action[0].tolist())
            rewards.append(float(reward[0]))
            if bool(terminated[0]) or bool(truncated[0]):
                ended = "terminated" if bool(terminated[0]) else "truncated"
                break
        yield Episode(actions=tuple(actions), rewards=tuple(rewards), ended=ended)


def problems_of(build: Build, *, seed: int = 0) -> list[str]:
    """Return what is wrong with an environment, one sentence each; empty if nothing.

    Checked are: gymnasium's checker on one episode; shapes and types of batches of three; observations in
    their space; one seed, one course; an episode started anew leaves the others alone; episodes end; the
    global random streams of torch and numpy stay untouched.
    """
    found: list[str] = []
    checks = {
        "gymnasium's checker": _gymnasium,
        "a batch of three": _batches,
        "two of one seed": _repeats,
        "an episode started anew": _restarts,
        "the end of an episode": _ends,
    }
    for what, check in checks.items():
        try:
            found += check(build, seed)
        except (
            MedrlError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            text = (str(error).strip().splitlines() or [""])[0]
            found.append(f"{what}: {type(error).__name__}: {text}")
    return found


# -- checks ------------------------------------------------------------------------------------------


def _gymnasium(build: Build, seed: int) -> list[str]:
    """Let gymnasium's checker examine one episode."""
    from gymnasium.utils.env_checker import check_env

    adapter = GymnasiumAdapter(build(1))
    if action_masks(adapter.env) is not None and isinstance(adapter.action_space, gymnasium.spaces.Discrete):
        adapter.action_space = _LegalActions(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for harmless in (".*render.*", ".*spec.*", ".*not within the observation space.*"):
            warnings.filterwarnings("ignore", message=harmless)
        try:
            check_env(adapter, skip_render_check=True)
        except (AssertionError, UserWarning, gymnasium.error.Error) as error:
            return [f"gymnasium's checker: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"]
    return []


def _batches(build: Build, seed: int) -> list[str]:
    """Look at shapes, types and values of a batch of three."""
    count = 3
    env = build(count)
    if env.num_envs != count:
        return [f"built with num_envs={count}, it says num_envs={env.num_envs}"]
    streams = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    found = _observation_problems(env.reset(seed=seed), env, "reset")
    generator = rng.numpy_generator(seed, "check")
    observation, reward, terminated, truncated, info = env.step(_draw(env, generator))
    found += _observation_problems(observation, env, "step")
    if tuple(reward.shape) != (count,) or not reward.is_floating_point():
        found.append(f"rewards are {_kind(reward)}, expected ({count},) floating point")
    elif not bool(torch.isfinite(reward).all()):
        found.append(f"rewards are not finite: {reward.tolist()}")
    for name, value in (("terminated", terminated), ("truncated", truncated)):
        if tuple(value.shape) != (count,) or value.dtype != torch.bool:
            found.append(f"{name} is {_kind(value)}, expected ({count},) torch.bool")
    if not isinstance(info, dict):
        found.append(f"info is a {type(info).__name__}, expected a dict")
    masks = action_masks(env)
    actions = getattr(env.action_space, "n", None)
    if masks is not None and (tuple(masks.shape) != (count, actions) or masks.dtype != torch.bool):
        found.append(f"action_masks is {_kind(masks)}, expected ({count}, {actions}) torch.bool")
    now = torch.random.get_rng_state(), np.random.get_state()[1]  # type: ignore[index,union-attr]
    if not torch.equal(streams[0], now[0]) or not np.array_equal(streams[1], now[1]):
        found.append("it draws from the global random streams; give it a generator of its own")
    return found


def _repeats(build: Build, seed: int) -> list[str]:
    """Play two environments with one seed."""
    courses = []
    for env in (build(1), build(1)):
        courses.append(list(play(env, "random", episodes=2, seed=seed)))
    if courses[0] != courses[1]:
        return ["two environments with one seed take different courses; seed all random numbers in reset"]
    return []


def _restarts(build: Build, seed: int) -> list[str]:
    """Start one of three episodes anew."""
    env = build(3)
    env.reset(seed=seed)
    before = _leaves(env.step(_draw(env, rng.numpy_generator(seed, "check")))[0])
    after = _leaves(env.reset(indices=torch.tensor([1])))
    wrong = [name for name, value in before.items() if not torch.equal(value[[0, 2]], after[name][[0, 2]])]
    if wrong:
        return [f"reset(indices=[1]) changed episodes 0 and 2 ({', '.join(wrong)})"]
    return []


def _ends(build: Build, seed: int) -> list[str]:
    """Play until an episode ends."""
    (episode,) = play(build(1), "random", seed=seed)
    if episode.ended == "cut":
        return [f"an episode did not end within {STEPS} steps; truncate it"]
    return []


class _LegalActions(gymnasium.spaces.Discrete):  # type: ignore[misc]
    """The actions of an environment, of which only legal ones are drawn."""

    def __init__(self, adapter: GymnasiumAdapter) -> None:
        space = adapter.env.action_space
        super().__init__(int(space.n), start=int(space.start))  # type: ignore[attr-defined]
        self._adapter = adapter

    def sample(self, mask: Any = None, probability: Any = None) -> Any:
        """Draw one; before the first reset any."""
        del mask, probability
        legal = np.flatnonzero(self._adapter.action_masks())
        return np.int64(self.np_random.choice(legal)) if len(legal) else super().sample()


# -- shared ------------------------------------------------------------------------------------------


def _draw(env: BatchedEnv, generator: np.random.Generator) -> Tensor:
    """Legal actions ``(E, ...)`` drawn uniformly."""
    masks = action_masks(env)
    if masks is None:
        drawn = [np.asarray(env.action_space.sample()) for _ in range(env.num_envs)]
        return torch.as_tensor(np.stack(drawn))
    chosen = []
    for row in masks.cpu().numpy():
        legal = np.flatnonzero(row)
        if not len(legal):
            raise ConfigError("action_masks", why="no action is legal, and the episode has not ended")
        chosen.append(int(generator.choice(legal)))
    return torch.tensor(chosen)


def _best(env: BatchedEnv) -> Tensor:
    """The action ``(1,)`` with the largest reward of the next step."""
    masks = action_masks(env)
    count = int(env.action_space.n)  # type: ignore[attr-defined]
    start = int(getattr(env.action_space, "start", 0))
    legal: Sequence[int] = range(count) if masks is None else torch.nonzero(masks[0]).flatten().tolist()
    found = []
    for action in legal:
        twin = copy.deepcopy(env)
        found.append(float(twin.step(torch.tensor([start + action]))[1][0]))
    return torch.tensor([start + legal[int(np.argmax(found))]])


def _observation_problems(observation: Observation, env: BatchedEnv, after: str) -> list[str]:
    space: Any = env.observation_space
    found = []
    leaves = _leaves(observation)
    named = {"": space} if isinstance(observation, Tensor) else dict(getattr(space, "spaces", {}))
    if set(leaves) != set(named):
        return [f"{after} observes {sorted(leaves)}, the space has {sorted(named)}"]
    for name, value in leaves.items():
        part = named[name]
        if tuple(value.shape) != (env.num_envs, *part.shape):
            wanted = (env.num_envs, *part.shape)
            found.append(f"{after}: observation {name or '()'} is {_kind(value)}, expected {wanted}")
        elif not all(part.contains(row.astype(part.dtype)) for row in value.detach().cpu().numpy()):
            found.append(f"{after}: observation {name or '()'} lies outside of {part}")
    return found


def _leaves(observation: Observation) -> dict[str, Tensor]:
    return {"": observation} if isinstance(observation, Tensor) else dict(observation)


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
