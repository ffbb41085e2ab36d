"""What a reward net sees: the channels of the image, and the label map as further channels.

Arrays: images ``(N, C, *S)``, label maps ``(N, *S)``, probabilities ``(N, K, *S)``; S has two or three axes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault, did_you_mean

Encoding = Literal["onehot", "scalar"]
ENCODINGS: tuple[Encoding, ...] = ("onehot", "scalar")


def input_channels(image_channels: int, classes: int, kind: Encoding = "onehot") -> int:
    """Input channels of a network that sees an encoded pair.

    >>> input_channels(1, 3), input_channels(1, 3, "scalar")
    (4, 2)
    """
    _check_kind(kind)
    return image_channels + (classes if kind == "onehot" else 1)


def encode(images: Tensor, actions: Tensor, classes: int, kind: Encoding = "onehot") -> Tensor:
    """Join images and label maps.

    Args:
        images: ``(N, C, *S)``.
        actions: ``(N, *S)`` labels in [0, classes).
        classes: K.
        kind: ``onehot`` adds K channels of 0 and 1; ``scalar`` adds one channel with the raw label values as
            the original does.

    Returns:
        ``(N, C + K, *S)`` or ``(N, C + 1, *S)`` in the type of the images.

    Raises:
        RuntimeFault: The shapes do not fit.
        ConfigError: Unknown kind.

    Source: specification §4 (`scalar`), §14.4 (`onehot`).

    >>> encode(torch.zeros(1, 1, 1, 2), torch.tensor([[[2, 0]]]), 3)[0, 1:, 0].T.tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    _check_kind(kind)
    check_pair(images, actions)
    if kind == "onehot":
        labels = one_hot(actions, classes, dtype=images.dtype)
    else:
        labels = actions.unsqueeze(1).to(images.dtype)
    return torch.cat((images, labels), dim=1)


def one_hot(labels: Tensor, classes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn labels ``(N, *S)`` into ``(N, K, *S)`` of 0 and 1; a label outside [0, K) gives zeros only."""
    values = torch.arange(classes, device=labels.device).view(1, -1, *[1] * (labels.dim() - 1))
    return (labels.unsqueeze(1) == values).to(dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits ``(N, K, *S)`` and labels ``(N, *S)``, a scalar.

    Written out, because torch's own has no deterministic form for images on a GPU.
    """
    logs = torch.log_softmax(logits.float(), dim=1)
    return -(logs * one_hot(labels, logits.shape[1])).sum(dim=1).mean()


def at_action(per_class: Tensor, actions: Tensor) -> Tensor:
    """Take from ``(N, K, *S)`` the value of each pixel's action; ``(N, *S)``."""
    return per_class.gather(1, actions.to(torch.int64).unsqueeze(1)).squeeze(1)


def check_pair(images: Tensor, actions: Tensor) -> None:
    """Refuse label maps that do not lie on the grid of their images.

    Raises:
        RuntimeFault: With both shapes.
    """
    fits = images.dim() in (4, 5) and actions.shape == images.shape[:1] + images.shape[2:]
    if not fits:
        raise RuntimeFault(
            "images and label maps",
            why=f"expected (N, C, *S) and (N, *S), got {tuple(images.shape)} and {tuple(actions.shape)}",
        )


def _check_kind(kind: str) -> None:
    if kind not in ENCODINGS:
        raise ConfigError(f"encoding '{kind}'", why=did_you_mean(kind, ENCODINGS))
