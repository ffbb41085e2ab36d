"""The ranks of a run as saving sees them."""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class Peers(Protocol):
    """The ranks of a run, as far as saving needs them."""

    rank: int
    world_size: int

    def exchange(self, doing: str, value: T) -> list[T]:
        """Return the values of all ranks in rank order; every rank must call it."""
        ...


class Alone:
    """One process without peers."""

    rank = 0
    world_size = 1

    def exchange(self, doing: str, value: T) -> list[T]:
        """Return the only value."""
        del doing
        return [value]
