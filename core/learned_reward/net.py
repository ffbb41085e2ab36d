"""The reward net: how probable is it, given the image, that the label of each pixel is right?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError, RuntimeFault, did_you_mean

from .encoding import Encoding, at_action, cross_entropy, encode, input_channels
from .modes import evaluating, logits_of
from .temperature import LIMIT, fit_temperature

Head = Literal["class", "binary"]
Reduce = Literal["min", "mean", "product"]
Criterion = Literal["nll", "mse"]

HEADS: tuple[Head, ...] = ("class", "binary")
REDUCTIONS: tuple[Reduce, ...] = ("min", "mean", "product")


class RewardNet(nn.Module):
    """One network or several that judge a label map on an image.

    - head ``class``: K logits, the class at each pixel given image and label map; the reward is the softmax
      at the action's class. It must not learn to compare mask with image, which a binary head has to
      (findings: error AUROC .90–.95 against .79–.88 on the same pairs).
    - head ``binary``: one logit, reward = σ(z / T) (original).

    Args:
        networks: Independently trained networks; each maps `encode`'s channels to K or 1 logits.
        classes: K.
        head: See above.
        encoding: How the label map enters (`encode`).
        temperature: T, one for all networks or one each; 1 leaves logits alone.
        reduce: How the rewards of several networks become one: ``min``, ``mean`` or ``product``.
        criterion: ``nll`` (cross-entropy) or, for the binary head, ``mse`` of the probability.

    Raises:
        ConfigError: A setting is unknown or does not fit the others.

    Source: specification §4, §8; findings steps 5 and 6.
    """

    temperature: Tensor

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        classes: int,
        head: Head = "class",
        encoding: Encoding = "onehot",
        temperature: float | Sequence[float] = 1.0,
        reduce: Reduce = "min",
        criterion: Criterion = "nll",
    ) -> None:
        super().__init__()
        input_channels(1, classes, encoding)
        if not networks:
            raise ConfigError("reward net", why="it has no network")
        if head not in HEADS:
            raise ConfigError(f"reward head '{head}'", why=did_you_mean(head, HEADS))
        if reduce not in REDUCTIONS:
            raise ConfigError(f"reduction '{reduce}'", why=did_you_mean(reduce, REDUCTIONS))
        if criterion not in ("nll", "mse") or (criterion == "mse" and head == "class"):
            known = "nll" if head == "class" else "nll or mse"
            raise ConfigError(f"reward criterion '{criterion}'", why=f"the {head} head has {known}")
        self.networks = nn.ModuleList(networks)
        self.classes = classes
        self.head: Head = head
        self.encoding: Encoding = encoding
        self.reduce: Reduce = reduce
        self.criterion: Criterion = criterion
        self.register_buffer("temperature", torch.ones(len(networks)))
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float | Sequence[float]) -> None:
        """Set T of all networks, or of each.

        Raises:
            ConfigError: Not positive, or another number of them than networks.
        """
        values = [temperature] if isinstance(temperature, int | float) else list(temperature)
        if len(values) == 1:
            values = values * len(self.networks)
        if len(values) != len(self.networks) or not all(0.0 < value < float("inf") for value in values):
            raise ConfigError(
                "temperature",
                why=f"{values} for {len(self.networks)} networks; one positive number for all, or one each",
            )
        with torch.no_grad():
            self.temperature.copy_(torch.tensor(values))

    def forward(self, images: Tensor, actions: Tensor) -> Tensor:
        """Logits of every network, not divided by its temperature.

        Args:
            images: ``(N, C, *S)``.
            actions: ``(N, *S)`` labels.

        Returns:
            ``(M, N, K, *S)`` for the class head, ``(M, N, 1, *S)`` for the binary head, float32.
        """
        seen = encode(images, actions, self.classes, self.encoding)
        return torch.stack([self._one(network, seen) for network in self.networks])

    def loss(self, images: Tensor, actions: Tensor, truth: Tensor) -> Tensor:
        """Training loss, mean over pixels and networks.

        Args:
            images: ``(N, C, *S)``.
            actions: ``(N, *S)`` label maps to judge.
            truth: ``(N, *S)`` reference labels. For the binary head also a target in [0, 1] as a floating
                tensor, for rewards that are no matter of right or wrong labels.

        Raises:
            RuntimeFault: The shapes do not fit, or the class head is given a floating target.
        """
        if truth.shape != actions.shape or (truth.is_floating_point() and self.head == "class"):
            raise RuntimeFault(
                "reward net",
                why=f"{truth.dtype} truth {tuple(truth.shape)} for actions {tuple(actions.shape)} "
                f"and the {self.head} head",
            )
        losses = [self._loss(logits, actions, truth) for logits in self(images, actions)]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def reward(self, actions: Tensor, images: Tensor) -> Tensor:
        """Reward ``(N, *S)`` in [0, 1], without a graph and in evaluation mode whatever the mode is.

        The order of the arguments is that of every reward function.
        """
        if self.head == "class":
            each = [at_action(p, actions) for p in self.member_probabilities(images, actions)]
        else:
            with evaluating(self):
                logits = self(images, actions)
            each = [torch.sigmoid(z[:, 0] / t) for z, t in zip(logits, self.temperature, strict=True)]
        return fuse(torch.stack(each), self.reduce)

    @torch.no_grad()
    def class_probabilities(self, images: Tensor, actions: Tensor) -> Tensor:
        """Probability of each class ``(N, K, *S)``, mean over the networks, in evaluation mode.

        Raises:
            ConfigError: The head is binary and tells no class.
        """
        return self.member_probabilities(images, actions).mean(dim=0)

    @torch.no_grad()
    def member_probabilities(self, images: Tensor, actions: Tensor) -> Tensor:
        """Probability of each class by each network, ``(M, N, K, *S)``, at its temperature.

        Raises:
            ConfigError: The head is binary and tells no class.
        """
        if self.head != "class":
            raise ConfigError(
                "reward net", why="a binary head tells no class", do="train one with reward.head class"
            )
        with evaluating(self):
            logits = self(images, actions)
        scale = self.temperature.view(-1, *[1] * (logits.dim() - 1))
        return torch.softmax(logits / scale, dim=2)

    @torch.no_grad()
    def calibrate(
        self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, limit: int = LIMIT, use: bool = True
    ) -> list[float]:
        """Fit the temperature of each network on held-out pairs.

        Args:
            batches: Images ``(N, C, *S)``, actions and truth ``(N, *S)``, on the net's device.
            limit: Pixels to look at.
            use: Set them; otherwise they are only returned.

        Raises:
            DataError: There are no pairs.
        """
        kept: list[list[Tensor]] = [[] for _ in self.networks]
        wanted: list[Tensor] = []
        every = 1
        total = 0
        for images, actions, truth in batches:
            with evaluating(self):
                logits = self(images, actions)
            soft = self.head == "class" or truth.is_floating_point()
            target = truth if soft else (truth == actions)
            flat = target.reshape(-1)[::every]
            wanted.append(flat.cpu())
            for store, z in zip(kept, logits, strict=True):
                store.append(z.movedim(1, -1).reshape(-1, z.shape[1])[::every].cpu())
            total += flat.numel()
            while total > 2 * limit:  # thin out what was kept, so that memory has a bound
                every *= 2
                wanted = [item[::2] for item in wanted]
                kept = [[item[::2] for item in store] for store in kept]
                total = sum(item.numel() for item in wanted)
        truths = torch.cat(wanted) if wanted else torch.zeros(0)
        found = []
        for store in kept:
            z = torch.cat(store) if store else torch.zeros(0, 1)
            if self.head == "binary":
                found.append(fit_temperature(z[:, 0], truths.to(z.dtype), limit=limit))
            else:
                found.append(fit_temperature(z, truths, limit=limit))
        if use:
            self.set_temperature(found)
        return found

    def _one(self, network: nn.Module, seen: Tensor) -> Tensor:
        logits = logits_of(network(seen))
        wanted = self.classes if self.head == "class" else 1
        if logits.shape != (seen.shape[0], wanted, *seen.shape[2:]):
            raise ConfigError(
                "reward net",
                why=f"the {self.head} head needs logits {(seen.shape[0], wanted, *seen.shape[2:])}, "
                f"its network returned {tuple(logits.shape)}",
            )
        return logits

    def _loss(self, logits: Tensor, actions: Tensor, truth: Tensor) -> Tensor:
        if self.head == "class":
            return cross_entropy(logits, truth)
        target = (truth if truth.is_floating_point() else (truth == actions)).to(logits.dtype)
        if self.criterion == "mse":
            return F.mse_loss(torch.sigmoid(logits[:, 0]), target)
        return F.binary_cross_entropy_with_logits(logits[:, 0], target)


def fuse(rewards: Tensor, how: Reduce = "min") -> Tensor:
    """Make one reward of several ``(M, ...)``.

    >>> fuse(torch.tensor([[0.0, 0.5, 1.0], [0.4, 0.6, 0.2]])).tolist()
    [0.0, 0.5, 0.20000000298023224]
    """
    if how == "min":
        return rewards.amin(dim=0)
    if how == "mean":
        return rewards.mean(dim=0)
    if how == "product":
        return rewards.prod(dim=0)
    raise ConfigError(f"reduction '{how}'", why=did_you_mean(how, REDUCTIONS))


def stretch_frames(rewards: Tensor) -> Tensor:
    """Stretch each frame of ``(N, X, Y, T)`` so that its least reward is 0 and its greatest 1.

    A constant frame stays as it is (the original divides by zero).

    Source: rl4seg3d specification §6, §10.11: (r − min) / max(r − min), frame by frame.
    """
    least = rewards.amin(dim=(1, 2), keepdim=True)
    spread = rewards.amax(dim=(1, 2), keepdim=True) - least
    stretched = (rewards - least) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return torch.where(spread > 0, stretched, rewards)


def widen_input(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit the weights of a network to one of the same kind with more input channels.

    A weight that differs only in having fewer input channels gets zeros for the rest, so that the wider
    network starts with the outputs of the narrow one.

    Args:
        state: Weights to start from, such as those of the style-tuned actor.
        own: `state_dict()` of the network that will load the result.

    Raises:
        ConfigError: The networks are not of one kind.

    Source: findings step 5 ("initialised from the style actor").
    """
    fitted: dict[str, Tensor] = {}
    problems = []
    for name, target in own.items():
        given = state.get(name)
        if given is None:
            problems.append(f"{name} is missing")
        elif given.shape == target.shape:
            fitted[name] = given.to(target.dtype)
        elif _narrower(given, target):
            wide = torch.zeros_like(target)
            wide[:, : given.shape[1]] = given.to(target)
            fitted[name] = wide
        else:
            problems.append(f"{name} is {tuple(given.shape)}, expected {tuple(target.shape)}")
    problems += [f"{name} is unknown" for name in state if name not in own]
    if problems:
        raise ConfigError("initial weights", why="the networks are not of one kind", problems=problems[:5])
    return fitted


def _narrower(given: Tensor, target: Tensor) -> bool:
    return (
        given.dim() == target.dim() >= 3
        and given.shape[:1] + given.shape[2:] == target.shape[:1] + target.shape[2:]
        and given.shape[1] < target.shape[1]
    )
