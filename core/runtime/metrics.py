"""The mean of metrics over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from medrl.core.runtime.ranks import Ranks


def mean_over_ranks(ranks: Ranks, metrics: Mapping[str, object]) -> dict[str, Any]:
    """Return metrics as plain values, numbers averaged over ranks, in the given order.

    Numbers, tensors and lists of numbers are averaged in double precision and in rank order; where all ranks
    have the same number, it stays exactly that. Anything else is left as this rank has it.
    """
    numbers: dict[str, torch.Tensor] = {}
    texts: dict[str, object] = {}
    for name, value in metrics.items():
        if isinstance(value, torch.Tensor):
            numbers[name] = value.detach().cpu().double()
        elif isinstance(value, (bool, int, float)) or hasattr(value, "dtype"):
            numbers[name] = torch.as_tensor(value, dtype=torch.float64)
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
            numbers[name] = torch.tensor(value, dtype=torch.float64)
        else:
            texts[name] = value
    if numbers:
        flat = torch.cat([tensor.reshape(-1) for tensor in numbers.values()])
        every = ranks.gather_tensor(f"log {', '.join(numbers)}", flat)
        mean = torch.stack(every).sum(0) / ranks.world_size
        mean = torch.where(torch.stack([part == flat for part in every]).all(0), flat, mean)
        parts = torch.split(mean, [tensor.numel() for tensor in numbers.values()])
        for (name, tensor), part in zip(numbers.items(), parts, strict=True):
            texts[name] = part.reshape(tensor.shape).tolist()
    return {name: texts[name] for name in metrics}
