"""Balance of the loss parts by their running size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medrl.core.errors import CheckpointError


class LossBalancer:
    """Divides each part of the loss by its running mean.

    Args:
        momentum: Memory of the running means.
        warmup: Calls during which the means are only collected.

    Source: specification §4; `LossBalancer` in train_loops_new_policy.py. The means start at 1.
    """

    def __init__(self, momentum: float = 0.9, warmup: int = 10) -> None:
        self.momentum, self.warmup = momentum, warmup
        self.means: dict[str, float] = {}
        self.calls = 0

    def __call__(
        self, parts: Mapping[str, Tensor], sizes: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """Return the balanced parts.

        Args:
            parts: Loss parts by name, scalars with a graph.
            sizes: Their sizes as all ranks agree on them (means over ranks); taken from `parts` if None.
                A non-finite size changes no mean.
        """
        for name, part in parts.items():
            size = float(part.detach()) if sizes is None else float(sizes[name])
            old = self.means.get(name, 1.0)
            if math.isfinite(size):
                self.means[name] = self.momentum * old + (1.0 - self.momentum) * size
        ready = self.calls >= self.warmup
        self.calls += 1
        if not ready:
            return dict(parts)
        return {name: part / (abs(self.means.get(name, 1.0)) + 1e-8) for name, part in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"means": dict(self.means), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: A key is missing.
        """
        try:
            means, calls = dict(state["means"]), int(state["calls"])
        except KeyError as error:
            raise CheckpointError("loss balancer", why=f"the checkpoint lacks {error}") from error
        self.means, self.calls = {name: float(value) for name, value in means.items()}, calls
