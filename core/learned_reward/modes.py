"""Networks that are only asked: evaluation mode and no graph for a while, and everything as it was after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError


@contextmanager
def evaluating(*modules: object) -> Iterator[None]:
    """Run a block without gradients and with modules in evaluation mode, then restore each one's own mode.

    In this mode batch norm neither uses nor changes statistics of the batch, so that weights and buffers stay
    bit for bit what they were. Objects that are no modules are left alone.
    """
    switched = [
        part
        for module in modules
        if isinstance(module, nn.Module)
        for part in module.modules()
        if part.training
    ]
    for part in switched:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part in switched:
            part.training = True


def logits_of(output: Any) -> Tensor:
    """The logits in what a network returned: a tensor, or an output object whose `main` is one; float32.

    Raises:
        ConfigError: It is neither.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "main", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            "network",
            why=f"expected logits, it returned a {type(output).__name__}",
            do="choose a segmentation network that returns (N, K, *S)",
        )
    return logits.float()


def class_logits(output: Any, classes: int) -> Tensor:
    """Logits ``(N, K, *S)`` of a policy's network; one logit for two classes becomes (0, z).

    Raises:
        ConfigError: The number of logits does not fit the classes.
    """
    logits = logits_of(output)
    if classes == 2 and logits.shape[1] == 1:
        logits = torch.cat((torch.zeros_like(logits), logits), dim=1)
    if logits.shape[1] != classes:
        raise ConfigError("network", why=f"it has {logits.shape[1]} logits for {classes} classes")
    return logits
