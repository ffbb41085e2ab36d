"""How good an acquisition is, and what a line is paid.

Quality has two parts: of the reconstruction (SSIM, NMSE, PSNR) and of the segmentation (Dice, cross-entropy).
Both are larger where things are better. A slice without foreground has no quality of segmentation: that part
is 0 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.imaging import View
from medrl.plugins.kspace.quality import SsimTarget, nmse, psnr

OfImage: TypeAlias = Literal["ssim", "nmse", "psnr"]
OfLabels: TypeAlias = Literal["soft_dice", "dice", "ce", "log_prob"]
Mode: TypeAlias = Literal["delta", "terminal", "asmr"]

OF_IMAGE = ("ssim", "nmse", "psnr")
OF_LABELS = ("soft_dice", "dice", "ce", "log_prob")
MODES = ("delta", "terminal", "asmr")

EPS = 1e-6
PSNR_SCALE = 40.0
PSNR_CEILING = 100.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Truth:
    """What B acquisitions are judged by.

    Attributes:
        target: ``(B, [D], H, W)``.
        ssim: Of the targets, with their local means, or None where SSIM is not asked for; of each slice
            ``(B * D,)`` by itself where some are missing.
        labels: ``(B, [D], H, W)`` int64, or None.
        slices: ``(B, D)`` bool, or None.
    """

    target: Tensor
    ssim: SsimTarget | None
    labels: Tensor | None
    slices: Tensor | None

    def select(self, index: Tensor) -> Truth:
        """Some of them, or some of them several times."""
        return Truth(
            target=self.target[index],
            ssim=None if self.ssim is None else self.ssim.select(self._of_slices(index)),
            labels=None if self.labels is None else self.labels[index],
            slices=None if self.slices is None else self.slices[index],
        )

    def put(self, index: Tensor, other: Truth) -> None:
        """Replace some of them in place."""
        pairs = ((self.target, other.target), (self.labels, other.labels), (self.slices, other.slices))
        for own, new in pairs:
            if own is not None and new is not None:
                own[index] = new
        if self.ssim is not None and other.ssim is not None:
            for name in ("target", "mean", "variance", "c1", "c2"):
                getattr(self.ssim, name)[self._of_slices(index)] = getattr(other.ssim, name)

    def _of_slices(self, index: Tensor) -> Tensor:
        """The places in `ssim` of some of them."""
        if self.slices is None:
            return index
        depth = self.slices.shape[1]
        return (index.unsqueeze(1) * depth + torch.arange(depth, device=index.device)).flatten()

    @property
    def has_foreground(self) -> Tensor:
        """``(B,)`` bool."""
        if self.labels is None:
            return torch.zeros(len(self.target), dtype=torch.bool, device=self.target.device)
        return (self.labels > 0).flatten(1).any(dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """Quality of B acquisitions, each ``(B,)`` float32; a part of weight 0 is 0 and not computed."""

    image: Tensor
    labels: Tensor
    total: Tensor


class Quality:
    """λ1 · quality of the reconstruction + λ2 · quality of the segmentation.

    Args:
        image_weight: λ1.
        label_weight: λ2.
        of_image: ``ssim``; ``nmse``, minus the NMSE of magnitudes; ``psnr``, divided by 40 and limited to
            100 dB.
        of_labels: ``soft_dice`` and ``dice``, means over the foreground classes that are there, of
            probabilities and of the most probable labels; ``ce``, minus the mean cross-entropy of all pixels;
            ``log_prob``, the mean log-probability of the true label of foreground pixels.

    Of stacks and volumes, Dice and cross-entropy are of the whole volume, SSIM is the mean over slices.

    Raises:
        ConfigError: A name is unknown, a weight is negative, or both are 0.
    """

    def __init__(
        self,
        *,
        image_weight: float = 0.5,
        label_weight: float = 0.5,
        of_image: OfImage = "ssim",
        of_labels: OfLabels = "soft_dice",
    ) -> None:
        problems = []
        if of_image not in OF_IMAGE:
            problems.append(f"of_image: {of_image!r}, expected {', '.join(OF_IMAGE)}")
        if of_labels not in OF_LABELS:
            problems.append(f"of_labels: {of_labels!r}, expected {', '.join(OF_LABELS)}")
        if min(image_weight, label_weight) < 0 or image_weight + label_weight == 0:
            problems.append(f"weights: {image_weight} and {label_weight}, expected positive numbers")
        if problems:
            raise ConfigError("reward", why="it cannot be computed", problems=problems)
        self.image_weight, self.label_weight = float(image_weight), float(label_weight)
        self.of_image: OfImage = of_image
        self.of_labels: OfLabels = of_labels

    @property
    def needs_labels(self) -> bool:
        """Whether labels and a segmentation network are needed."""
        return self.label_weight > 0

    def truth(self, cases: Cases, index: Tensor) -> Truth:
        """What the cases ``(B,)`` are judged by.

        Raises:
            DataError: There are no labels and they are needed.
        """
        target = cases.rows("target", index)
        slices = None if cases.slices is None else cases.rows("slices", index)
        wanted = self.image_weight > 0 and self.of_image == "ssim"
        return Truth(
            target=target,
            ssim=_ssim_target(target, slices) if wanted else None,
            labels=cases.rows("labels", index).long() if self.needs_labels else None,
            slices=slices,
        )

    def score(self, view: View, truth: Truth) -> Scores:
        """Judge B acquisitions."""
        zero = torch.zeros(len(view.image), device=view.image.device)
        image = self._image(view.magnitude, truth) if self.image_weight > 0 else zero
        labels = zero
        if self.needs_labels:
            if view.logits is None or truth.labels is None:
                raise ConfigError(
                    "reward",
                    why="it needs labels and a segmentation network",
                    do="give them, or set label_weight to 0",
                )
            labels = label_quality(
                view.logits,
                truth.labels,
                kind=self.of_labels,
                slices=truth.slices,
                probabilities=view.probs,
            )
        return Scores(
            image=image, labels=labels, total=self.image_weight * image + self.label_weight * labels
        )

    def _image(self, magnitude: Tensor, truth: Truth) -> Tensor:
        if self.of_image == "nmse":
            return -nmse(magnitude, truth.target)
        if self.of_image == "psnr":
            return psnr(magnitude, truth.target).clamp(max=PSNR_CEILING) / PSNR_SCALE
        ssim = truth.ssim if truth.ssim is not None else _ssim_target(truth.target, truth.slices)
        if truth.slices is None:
            return ssim.score(magnitude)
        each = ssim.score(magnitude.flatten(0, 1)).view(truth.slices.shape)
        there = truth.slices.to(each.dtype)
        return (each * there).sum(dim=1) / there.sum(dim=1).clamp_min(1.0)


def label_quality(
    logits: Tensor,
    labels: Tensor,
    *,
    kind: OfLabels = "soft_dice",
    slices: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> Tensor:
    """Quality of segmentations ``(B,)``; 0 where there is no foreground.

    Args:
        logits: ``(B, K, [D], H, W)``.
        labels: ``(B, [D], H, W)`` int64 below K.
        kind: See `Quality`.
        slices: ``(B, D)`` bool, which slices count; None is all.
        probabilities: Softmax of the logits, if it is known already.
    """
    classes = int(logits.shape[1])
    flat, truth = logits.flatten(2).float(), labels.flatten(1)
    foreground = truth > 0
    there = foreground.any(dim=1)
    weight = None
    if slices is not None:
        weight = slices.to(flat.dtype).repeat_interleave(truth.shape[1] // slices.shape[1], dim=1)
    if kind in ("ce", "log_prob"):
        chosen = torch.log_softmax(flat, dim=1).gather(1, truth.unsqueeze(1)).squeeze(1)
        if kind == "ce":
            weight = torch.ones(truth.shape, device=flat.device) if weight is None else weight
            return torch.where(there, (chosen * weight).sum(dim=1) / weight.sum(dim=1), 0.0)
        count = foreground.sum(dim=1).clamp_min(1)
        return (chosen * foreground).sum(dim=1) / count
    each = torch.arange(1, classes, device=truth.device).view(1, -1, 1)
    hot = (truth.unsqueeze(1) == each).to(flat.dtype)
    if kind == "soft_dice":
        given = (torch.softmax(flat, dim=1) if probabilities is None else probabilities.flatten(2))[:, 1:]
    else:
        given = (flat.argmax(dim=1, keepdim=True) == each).to(flat.dtype)
    size = hot.sum(dim=2)
    drawn = (given if weight is None else given * weight.unsqueeze(1)).sum(dim=2)
    dice = 2.0 * (given * hot).sum(dim=2) / (drawn + size + EPS)
    present = size > 0
    return (dice * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)


def squash(values: Tensor) -> Tensor:
    """h(z) = sign(z)(√(|z| + 1) - 1) + 0.001 z.

    Source: ASMR asmr_env.py; Pohlen et al. 2018.

    >>> f"{squash(torch.tensor(0.5).log()):.5f}"
    '-0.30190'
    """
    return values.sign() * ((values.abs() + 1.0).sqrt() - 1.0) + 0.001 * values


class Reward:
    """What each line is paid, from the quality before and after it.

    Args:
        quality: Of acquisitions.
        mode: ``delta``: the quality gained, so that without discount the return is the gain of the episode;
            ``terminal``: the quality at the end, once; ``asmr``: `squash` of the quality after each line,
            the reward of the original, made for log-probabilities.
        delay: With ``asmr``, the first so many lines are paid nothing (the original: 7).

    Raises:
        ConfigError: The mode is unknown, or a delay is asked of another mode.

    Source: specification §5; ASMR asmr_env.py.
    """

    def __init__(self, quality: Quality, *, mode: Mode = "delta", delay: int = 0) -> None:
        if mode not in MODES:
            raise ConfigError("reward mode", why=f"unknown: {mode!r}", do=", ".join(MODES))
        if delay < 0 or (delay and mode != "asmr"):
            raise ConfigError(
                "delay of the reward",
                why=f"{delay} in mode {mode}",
                do="0, or a positive number in mode asmr",
            )
        self.quality, self.mode, self.delay = quality, mode, int(delay)

    def needed(self, taken: Tensor, done: Tensor) -> Tensor:
        """Whose quality after this line is read, ``(E,)`` bool.

        Args:
            taken: ``(E,)`` lines acquired by the policy, this one included.
            done: ``(E,)`` bool.
        """
        if self.mode == "terminal":
            return done
        return torch.ones_like(done) if self.mode == "delta" else taken > self.delay

    def pay(self, before: Tensor, after: Tensor, taken: Tensor, done: Tensor) -> Tensor:
        """Rewards ``(E,)`` float32.

        Args:
            before: ``(E,)`` quality before the line; only read in mode ``delta``.
            after: ``(E,)`` quality after it; only read where `needed`.
            taken: ``(E,)`` lines acquired by the policy, this one included.
            done: ``(E,)`` bool.
        """
        if self.mode == "delta":
            return after - before
        if self.mode == "terminal":
            return torch.where(done, after, 0.0)
        return torch.where(taken > self.delay, squash(after), 0.0)


def asmr_reward(*, delay: int = 7) -> Reward:
    """The reward of the original: squashed mean log-probability of the foreground, from line 8 on."""
    return Reward(Quality(image_weight=0.0, label_weight=1.0, of_labels="log_prob"), mode="asmr", delay=delay)


def delta_reward(
    *,
    image_weight: float = 0.5,
    label_weight: float = 0.5,
    of_image: OfImage = "ssim",
    of_labels: OfLabels = "soft_dice",
) -> Reward:
    """What SSIM and soft Dice gain with each line; see `Quality`."""
    return Reward(
        Quality(image_weight=image_weight, label_weight=label_weight, of_image=of_image, of_labels=of_labels)
    )


def terminal_reward(
    *,
    image_weight: float = 0.5,
    label_weight: float = 0.5,
    of_image: OfImage = "ssim",
    of_labels: OfLabels = "soft_dice",
) -> Reward:
    """SSIM and soft Dice at the end of the episode; see `Quality`."""
    quality = Quality(
        image_weight=image_weight, label_weight=label_weight, of_image=of_image, of_labels=of_labels
    )
    return Reward(quality, mode="terminal")


def _ssim_target(target: Tensor, slices: Tensor | None) -> SsimTarget:
    """Targets for SSIM; slice by slice, with the range of the volume, where some slices are missing."""
    if slices is None:
        return SsimTarget(target)
    reach = target.flatten(1).amax(dim=1).repeat_interleave(target.shape[1])
    return SsimTarget(target.flatten(0, 1), reach)


def centred(rewards: Tensor, repeats: int) -> Tensor:
    """Rewards ``(T, E)`` minus their mean over the `repeats` episodes of each case at each step."""
    groups = rewards.view(len(rewards), -1, repeats)
    return (groups - groups.mean(dim=2, keepdim=True)).flatten(1)
