"""Cross-entropy of a policy to reference labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.learned_reward.encoding import cross_entropy as exact_cross_entropy

from .actors import PixelActor


def cross_entropy(actor: PixelActor, images: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of a policy ``(N, K, *S)`` to labels ``(N, *S)``, in float32.

    Raises:
        ConfigError: Label smoothing is asked for a binary policy.
    """
    logits = actor.logits(images).float()
    if logits.shape[1] == 1:
        if smoothing:
            raise ConfigError("label_smoothing", why="a binary actor takes none", do="set it to 0")
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    # Not torch's, which has no deterministic form on GPUs.
    loss = exact_cross_entropy(logits, labels)
    if smoothing:
        loss = (1.0 - smoothing) * loss - smoothing * logits.log_softmax(dim=1).mean()
    return loss
