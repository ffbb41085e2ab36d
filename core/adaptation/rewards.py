"""Reward functions by registry key: oracles that compare with reference labels, and learned rewards.

A reward is called with actions ``(N, *S)`` and images ``(N, C, *S)`` and gives numbers in [0, 1]: one for
each pixel ``(N, *S)``, or one for each image ``(N, 1, …, 1)``. Oracles need the reference labels as well;
`bind` gives them once, so that every reward becomes a function of actions and images.

Source: specification of rl4seg §4; findings step 6.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from medrl.core import rng
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.learned_reward.composite import CompositeReward
from medrl.core.learned_reward.correctors import Corrector, dice_per_image
from medrl.core.learned_reward.net import RewardNet
from medrl.core.registry import Registry

from .sets import ImageSet

RewardFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Reward(Protocol):
    """What every reward of label maps is.

    Attributes:
        needs_truth: Whether it is an oracle: it compares with reference labels, which an unsupervised run
            does not have.
    """

    needs_truth: ClassVar[bool]

    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward actions ``(N, *S)`` on images ``(N, C, *S)``; without a graph."""
        ...

    def bind(self, truth: Tensor | None = None) -> RewardFn:
        """Return the reward as a function of actions and images, given reference labels if it needs them."""
        ...


class _Bound(ABC):
    """Gives reference labels to a reward."""

    needs_truth: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward actions on images."""

    def bind(self, truth: Tensor | None = None) -> RewardFn:
        """Return a function of actions and images.

        Several actions of an image follow each other; each is compared with the labels of that image.

        Raises:
            ConfigError: An oracle is given no reference labels.
        """
        if self.needs_truth and truth is None:
            raise _without_labels(self)
        return lambda actions, images: self(actions, images, truth)


class PixelwiseAccuracy(_Bound):
    """1 where the label is right, else 0; ``(N, *S)``. An oracle.

    >>> reward = PixelwiseAccuracy()
    >>> reward(torch.tensor([[[0, 1, 2]]]), torch.zeros(1, 1, 1, 3), torch.tensor([[[0, 2, 2]]])).tolist()
    [[[1.0, 0.0, 1.0]]]
    """

    needs_truth: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, *S)``."""
        return _right(self, actions, truth, images)


class AccuracyMap(_Bound):
    """Share of right labels of the image, in every pixel; ``(N, *S)``. An oracle."""

    needs_truth: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, *S)``."""
        right = _right(self, actions, truth, images)
        return _image_mean(right).expand_as(right)


class Accuracy(_Bound):
    """Share of right labels of the image; ``(N, 1, …, 1)``. An oracle.

    Deviation: the original reduces an axis that does not exist, and stops.
    """

    needs_truth: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, 1, …, 1)``."""
        return _image_mean(_right(self, actions, truth, images))


class Dice(_Bound):
    """Dice of the image, mean over the structures that either map has; ``(N, 1, …, 1)``. An oracle.

    Args:
        classes: K.
    """

    needs_truth: ClassVar[bool] = True

    def __init__(self, classes: int) -> None:
        self.classes = classes

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, 1, …, 1)``."""
        dice = dice_per_image(actions, _checked(self, actions, truth, images), self.classes)
        return dice.view(-1, *[1] * (actions.dim() - 1))


class LearnedReward(_Bound):
    """The reward net alone; ``(N, *S)``.

    With a binary head and scalar encoding this is the original's: σ(net([image, label]) / T), no threshold.

    Args:
        reward_net: Trained.
        temperature: T in place of the net's own.
    """

    def __init__(self, reward_net: RewardNet, temperature: float | None = None) -> None:
        self.reward_net = reward_net
        if temperature is not None:
            reward_net.set_temperature(temperature)

    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, *S)``; reference labels are not looked at."""
        del truth
        return self.reward_net.reward(actions, images)


class Composite(_Bound):
    """The reward net, and the corrector's view of the label map that the net would choose; ``(N, *S)``.

    Args:
        reward_net: Trained, with a class head.
        corrector: Trained, if it is a learned one.
        weight: Share of the reward net.
    """

    def __init__(self, reward_net: RewardNet, corrector: Corrector, weight: float = 0.25) -> None:
        self.composite = CompositeReward(reward_net, corrector, weight=weight)

    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, *S)``; reference labels are not looked at."""
        del truth
        return self.composite.reward(actions, images)


class RandomReward:
    """Uniform noise in [0, 1) for each pixel; ``(N, *S)``.

    The noise depends on the seed and on the label maps as a whole, so that a resumed run earns the same. No
    label is worth more than another.

    Args:
        seed: Another seed is other noise.
    """

    needs_truth: ClassVar[bool] = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @torch.no_grad()
    def __call__(self, actions: Tensor, images: Tensor, truth: Tensor | None = None) -> Tensor:
        """Reward ``(N, *S)``; neither image nor reference labels are looked at."""
        del images, truth
        digest = hashlib.sha256(actions.to("cpu", torch.uint8).contiguous().numpy().tobytes()).hexdigest()
        generator = rng.torch_generator(self.seed, "random-reward", digest)
        return torch.rand(actions.shape, generator=generator).to(actions.device)

    def bind(self, truth: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the reward as a function of actions and images."""
        del truth
        return lambda actions, images: self(actions, images)


def build_reward(
    registry: Registry[Any],
    name: str,
    *,
    classes: int,
    reward_net: RewardNet | None = None,
    corrector: Corrector | None = None,
    **params: Any,
) -> Reward:
    """Build a reward by its registry key from the parts that it asks for.

    Args:
        registry: Of rewards.
        name: Key, such as ``<plugin>.composite``.
        classes: K, for rewards that ask for it.
        reward_net: Trained reward net, for rewards that ask for it.
        corrector: Corrector, for rewards that ask for it.
        params: Further settings of that reward.

    Raises:
        ConfigError: Unknown key or setting, a part that is missing, or a reward of another kind of method.
    """
    target = registry.get(name)
    wanted = inspect.signature(target).parameters
    parts = {"classes": classes, "reward_net": reward_net, "corrector": corrector}
    given = {key: part for key, part in parts.items() if key in wanted}
    missing = [key for key, part in given.items() if part is None]
    if missing:
        raise ConfigError(f"reward '{name}'", why=f"it needs a {' and a '.join(missing).replace('_', ' ')}")
    made = registry.build(name, **given, **params)
    if not isinstance(made, Reward):
        raise ConfigError(
            f"reward '{name}'",
            why="it does not reward label maps on images",
            do="choose a reward of label maps; `medrl methods` names them",
        )
    return made


class Judge:
    """A reward, and for oracles the reference labels that it compares with.

    Args:
        reward: The reward.
        device: Where it computes.
    """

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.reward, self.device = reward, device

    def of(self, images: ImageSet, index: Sequence[int]) -> RewardFn:
        """Return the reward as a function of actions and of the images with these numbers.

        Raises:
            ConfigError: An oracle is asked about images whose labels were not read.
        """
        labels = None if images.labels is None else torch.as_tensor(images.labels)[list(index)]
        return self.on(labels)

    def on(self, labels: Tensor | None) -> RewardFn:
        """Return the reward as a function of actions and of images with these labels ``(N, *S)``.

        Raises:
            ConfigError: An oracle is asked about images whose labels were not read.
        """
        if not self.reward.needs_truth:
            return self.reward.bind()
        if labels is None:
            raise ConfigError(
                "reward.name",
                why="this reward compares with labels of the target, which are not read",
                do="a learned reward; an upper bound with labels: --allow-target-labels",
            )
        return self.reward.bind(labels.long().to(self.device))


def _right(reward: _Bound, actions: Tensor, truth: Tensor | None, images: Tensor) -> Tensor:
    """1 where the label is right, else 0, float32."""
    return (actions == _checked(reward, actions, truth, images)).to(torch.float32)


def _checked(reward: _Bound, actions: Tensor, truth: Tensor | None, images: Tensor) -> Tensor:
    """The reference labels, if they are there and fit."""
    if truth is None:
        raise _without_labels(reward)
    samples = actions.shape[0] // max(1, truth.shape[0])
    if samples > 1:
        truth = truth.repeat_interleave(samples, dim=0)
    if not actions.shape == truth.shape == images.shape[:1] + images.shape[2:]:
        raise RuntimeFault(
            f"reward {type(reward).__name__}",
            why=f"actions {tuple(actions.shape)}, reference labels {tuple(truth.shape)}, "
            f"images {tuple(images.shape)}",
        )
    return truth


def _image_mean(values: Tensor) -> Tensor:
    return values.mean(dim=tuple(range(1, values.dim())), keepdim=True)


def _without_labels(reward: object) -> ConfigError:
    return ConfigError(
        f"reward {type(reward).__name__}",
        why="it compares with reference labels of the target, and there are none",
        do="choose a learned reward; an upper bound with labels: target.allow_labels",
    )
