"""A variational autoencoder of label maps: what it cannot reconstruct is not anatomy."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError, RuntimeFault

from ..corruption import AFFINE, AffineRanges, jitter_masks
from ..encoding import cross_entropy, one_hot
from ..fields import generators, normals
from ..modes import evaluating
from .base import CorrectorModule, frames_of, from_frames


class MaskVAE(CorrectorModule):
    """Encode a label map to the mean of its posterior and decode that.

    Encoder: `blocks` × [3×3 convolution of stride 2, 3×3 convolution], doubling the channels, then one more
    of stride 2 back to `channels`, then linear maps to mean and log-variance. Decoder: the reverse with
    transposed convolutions, and a 3×3 classifier. ELU, then batch norm, after each convolution.

    Args:
        classes: K.
        size: Spatial size at which it is trained, (X, Y) or (X, Y, T). Label maps are resized to it and the
            result back. With two axes, windows ``(N, X, Y, T)`` go through frame by frame.
        blocks: See above.
        channels: After the first block.
        latent: Dimensions of the code.
        ce_weight: Weight of the cross-entropy.
        dice_weight: Weight of 1 − Dice, mean over foreground classes in the batch.
        kl_weight: Weight of the KL divergence to N(0, 1), summed over the code.
        attribute_weight: Weight of the attribute term; 0 leaves it out (10 in the original's AR-VAE).
        attribute_delta: Its spread δ.
        jitter: Affine maps of the source masks while training; None as in the original.

    Raises:
        ConfigError: A setting makes no sense.

    Source: specification §6 (vital's AE defaults: 4 blocks, 48 channels, latent 16, weights 0.1, 1, 1e-4).
    Deviations: an axis is halved only while it is even and at least 4, so that any size works; the way
    back interpolates probabilities, not labels; classes absent from a batch are left out of its Dice; the
    attributes are those of `mask_attributes`; source masks are jittered by default.
    """

    learned: ClassVar[bool] = True

    def __init__(
        self,
        classes: int,
        size: Sequence[int],
        *,
        blocks: int = 4,
        channels: int = 48,
        latent: int = 16,
        ce_weight: float = 0.1,
        dice_weight: float = 1.0,
        kl_weight: float = 1e-4,
        attribute_weight: float = 0.0,
        attribute_delta: float = 1.0,
        jitter: AffineRanges | None = AFFINE,
    ) -> None:
        super().__init__(classes)
        self.size = tuple(int(length) for length in size)
        problems = []
        if len(self.size) not in (2, 3) or min(self.size) < 1:
            problems.append(f"size is {list(self.size)}, expected two or three positive lengths")
        problems += [
            f"{name} is {value}, expected at least {least}"
            for name, value, least in (
                ("blocks", blocks, 0),
                ("channels", channels, 1),
                ("latent", latent, classes + len(self.size) - 1 if attribute_weight else 1),
                ("attribute_weight", attribute_weight, 0),
            )
            if value < least
        ]
        if problems:
            raise ConfigError("corrector 'vae'", why="its settings do not fit", problems=problems)
        self.weights = (ce_weight, dice_weight, kl_weight, attribute_weight)
        self.attribute_delta = attribute_delta
        self.jitter = jitter
        strides = _strides(self.size, blocks + 1)
        bottom = tuple(
            length // prod(stride[axis] for stride in strides) for axis, length in enumerate(self.size)
        )
        widths = [channels * 2**block for block in range(blocks)]
        self.bottom = (channels, *bottom)
        layers: list[nn.Module] = []
        before = classes
        for width, stride in zip(widths, strides, strict=False):
            layers += [_conv(before, width, stride), _conv(width, width, (1,) * len(self.size))]
            before = width
        layers.append(_conv(before, channels, strides[-1]))
        self.encoder = nn.Sequential(*layers)
        self.mean = nn.Linear(prod(self.bottom), latent)
        self.log_variance = nn.Linear(prod(self.bottom), latent)
        self.expand = nn.Sequential(nn.Linear(latent, prod(self.bottom)), nn.ELU())
        layers, before = [], channels
        for width, stride in zip(reversed(widths), reversed(strides[1:]), strict=True):
            layers += [_up(before, width, stride), _conv(width, width, (1,) * len(self.size))]
            before = width
        layers.append(_up(before, before, strides[0]))
        self.decoder = nn.Sequential(*layers)
        last: type[nn.Module] = nn.Conv2d if len(self.size) == 2 else nn.Conv3d
        self.classifier = last(before, classes, 3, padding=1)

    def encode(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(N, latent)`` of label maps ``(N, *size)``."""
        features = self.encoder(one_hot(masks, self.classes)).flatten(1)
        return self.mean(features), self.log_variance(features)

    def decode(self, codes: Tensor) -> Tensor:
        """Logits ``(N, K, *size)`` of codes ``(N, latent)``."""
        features = self.expand(codes).view(-1, *self.bottom)
        logits: Tensor = self.classifier(self.decoder(features))
        return logits

    def forward(self, masks: Tensor) -> Tensor:
        """Logits ``(N, K, *size)`` of the reconstruction, from the mean of the posterior."""
        return self.decode(self.encode(masks)[0])

    @torch.no_grad()
    def probabilities(self, masks: Tensor) -> Tensor:
        """Probability of each class ``(N, K, *S)`` on the grid of the masks, in evaluation mode."""
        asked = self._framed(masks)
        with evaluating(self):
            found = torch.softmax(self(self._resized(asked)).float(), dim=1)
        if tuple(asked.shape[1:]) != self.size:
            mode = "bilinear" if len(self.size) == 2 else "trilinear"
            found = F.interpolate(found, size=asked.shape[1:], mode=mode, align_corners=False)
        return found if asked.dim() == masks.dim() else from_frames(found, masks)

    def loss(self, clean: Tensor, *, seed: int, keys: Sequence[object]) -> dict[str, Tensor]:
        """0.1·CE + (1 − Dice) + 1e-4·KL, and the attribute term; see `LearnedCorrector`."""
        if self.jitter is not None:
            clean = jitter_masks(clean, seed=seed, keys=keys, ranges=self.jitter)
        frames = clean.shape[3] if clean.dim() == 4 and len(self.size) == 2 else 1
        masks = self._resized(self._framed(clean)).to(torch.int64)
        mean, log_variance = self.encode(masks)
        noise = normals(generators(seed, "latent", keys), (frames, mean.shape[1]))
        noise = noise.reshape(mean.shape).to(mean)
        codes = mean + noise * torch.exp(0.5 * log_variance)
        logits = self.decode(codes).float()
        ce_weight, dice_weight, kl_weight, attribute_weight = self.weights
        terms = {
            "ce": cross_entropy(logits, masks),
            "dice": soft_dice(torch.softmax(logits, dim=1), masks),
            "kl": gaussian_kl(mean, log_variance),
        }
        loss = ce_weight * terms["ce"] + dice_weight * (1.0 - terms["dice"]) + kl_weight * terms["kl"]
        if attribute_weight:
            terms["attribute"] = attribute_loss(
                codes, mask_attributes(masks, self.classes), delta=self.attribute_delta
            )
            loss = loss + attribute_weight * terms["attribute"]
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def _framed(self, masks: Tensor) -> Tensor:
        if masks.dim() == len(self.size) + 1:
            return masks
        if len(self.size) == 2:
            return frames_of(masks)
        raise RuntimeFault(
            "corrector 'vae'", why=f"label maps {tuple(masks.shape)} for a size of {list(self.size)}"
        )

    def _resized(self, masks: Tensor) -> Tensor:
        if tuple(masks.shape[1:]) == self.size:
            return masks
        resized = F.interpolate(masks[:, None].float(), size=self.size, mode="nearest-exact")
        return resized[:, 0].to(masks.dtype)


def soft_dice(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Dice of probabilities ``(N, K, *S)`` with labels, pooled over the batch, mean over present classes.

    Background does not count; without any foreground in the labels it is 0 and has no gradient.
    """
    truth = one_hot(labels, probabilities.shape[1], dtype=probabilities.dtype)
    axes = (0, *range(2, probabilities.dim()))
    shared = (probabilities * truth).sum(dim=axes)[1:]
    size = (probabilities.sum(dim=axes) + truth.sum(dim=axes))[1:]
    present = (truth.sum(dim=axes)[1:] > 0).to(probabilities.dtype)
    return (present * 2.0 * shared / size.clamp_min(1e-6)).sum() / present.sum().clamp_min(1.0)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) ‖ N(0, 1)): sum over the code ``(N, Z)``, mean over samples.

    >>> print(float(gaussian_kl(torch.ones(1, 2), torch.zeros(1, 2))))
    1.0
    """
    return -0.5 * (1.0 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean()


def attribute_loss(codes: Tensor, attributes: Tensor, *, delta: float = 1.0) -> Tensor:
    """Let the first A dimensions of the code rise with the A attributes.

    Sum over attributes of the mean absolute difference of tanh(δ·(z_i − z_j)) and sign(a_i − a_j).

    Args:
        codes: ``(N, Z)``.
        attributes: ``(N, A)``, A ≤ Z.
        delta: Spread of the code.

    Source: Pati and Lerch 2021, "Attribute-based regularization of latent spaces".
    """
    z, a = codes[:, : attributes.shape[1]], attributes.to(codes)
    between = torch.tanh(delta * (z[:, None] - z[None, :]))
    return (between - torch.sign(a[:, None] - a[None, :])).abs().mean(dim=(0, 1)).sum()


def mask_attributes(masks: Tensor, classes: int) -> Tensor:
    """Attributes that any anatomy has: area share of each structure, centre of the foreground.

    Args:
        masks: ``(N, *S)``.
        classes: K.

    Returns:
        ``(N, K − 1 + len(S))``; shares in [0, 1], centres from −1 to 1, 0 without foreground.
    """
    hot = one_hot(masks, classes)[:, 1:]
    shares = hot.flatten(2).mean(dim=2)
    weight = hot.sum(dim=1)
    total = weight.flatten(1).sum(dim=1).clamp_min(1.0)
    centres = []
    for axis in range(masks.dim() - 1):
        shape = [1] * masks.dim()
        shape[axis + 1] = masks.shape[axis + 1]
        place = torch.linspace(-1.0, 1.0, masks.shape[axis + 1], device=masks.device).view(shape)
        centres.append((weight * place).flatten(1).sum(dim=1) / total)
    return torch.cat((shares, torch.stack(centres, dim=1)), dim=1)


def _strides(size: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """How each step halves each axis: while it is even and at least 4."""
    left = list(size)
    steps = []
    for _ in range(count):
        step = tuple(2 if length >= 4 and length % 2 == 0 else 1 for length in left)
        left = [length // by for length, by in zip(left, step, strict=True)]
        steps.append(step)
    return steps


def _conv(before: int, width: int, stride: Sequence[int]) -> nn.Sequential:
    kind: type[nn.Module] = nn.Conv2d if len(stride) == 2 else nn.Conv3d
    convolution = kind(before, width, 3, stride=tuple(stride), padding=1)
    return nn.Sequential(convolution, nn.ELU(), _norm(len(stride), width))


def _up(before: int, width: int, stride: Sequence[int]) -> nn.Sequential:
    kind: type[nn.Module] = nn.ConvTranspose2d if len(stride) == 2 else nn.ConvTranspose3d
    convolution = kind(before, width, tuple(stride), stride=tuple(stride))
    return nn.Sequential(convolution, nn.ELU(), _norm(len(stride), width))


def _norm(dims: int, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if dims == 2 else nn.BatchNorm3d(width)
