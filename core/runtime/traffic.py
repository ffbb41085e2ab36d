"""What ranks send each other, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist

_COUNTED = ("all_reduce", "all_gather", "broadcast", "all_gather_object")


@dataclass
class Traffic:
    """Bytes that this rank handed to each kind of exchange; what a ring makes of them is the backend's.

    Attributes:
        bytes: By kind: ``all_reduce``, ``all_gather``, ``broadcast``.
        calls: Number of exchanges by kind.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())

    def add(self, kind: str, count: int) -> None:
        """Count one exchange."""
        self.bytes[kind] = self.bytes.get(kind, 0) + count
        self.calls[kind] = self.calls.get(kind, 0) + 1


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Count what this process sends through torch.distributed inside the block; objects by their pickles."""
    traffic = Traffic()
    before: dict[str, Callable[..., Any]] = {name: getattr(dist, name) for name in _COUNTED}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # all_gather takes the own tensor second, the others first
            value = args[1] if name.startswith("all_gather") else args[0]
            if isinstance(value, torch.Tensor):
                traffic.add(name, value.numel() * value.element_size())
            else:
                traffic.add(name, len(ForkingPickler.dumps(value)))
            return before[name](*args, **kwargs)

        return call

    for name in _COUNTED:
        setattr(dist, name, counting(name))
    try:
        yield traffic
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
