"""Where a window may be: minimum corners on a lattice, and the six moves between them.

A corner is in voxels; a node is its number along each axis of the lattice. All legal corners lie in
``[0, S - w]``, so that a window never leaves its volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError

Size: TypeAlias = tuple[int, int, int]
Start: TypeAlias = Literal["random", "centre", "corner_center"]
STARTS: tuple[Start, ...] = ("random", "centre", "corner_center")

ACTIONS = 6
_MOVES = ((0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0))


def moves(device: torch.device | None = None) -> Tensor:
    """Steps of the actions ``(6, 3)`` int64, in nodes: +z, -z, +y, -y, +x, -x.

    Source: SPARS best_RL.py, ``step``; specification §4.
    """
    return torch.tensor(_MOVES, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Lattice:
    """The corners of a window in one volume.

    Attributes:
        shape: (X, Y, Z) of the volume, in voxels.
        window: In voxels.
        stride: Distance of neighbours, in voxels.
        offset: The least corner along each axis, below the stride.
        start: The corner that episodes begin at where the place is not drawn.

    Raises:
        ConfigError: The window does not fit in the volume, or a number makes no sense.
    """

    shape: Size
    window: Size
    stride: Size
    offset: Size
    start: Size

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        window: Sequence[int],
        stride: Sequence[int] | int = 4,
        start: Start = "centre",
    ) -> Lattice:
        """The lattice through the place where episodes begin.

        Args:
            shape: Of the volume.
            window: In voxels.
            stride: In voxels, one number or three.
            start: `centre` is a window in the middle of the volume, ``(S - w) // 2``; `corner_center` has its
                minimum corner there, ``S // 2`` (original), as far as the volume allows; `random` has the
                lattice of `centre`.
        """
        if start not in STARTS:
            raise ConfigError("env.start", why=f"unknown: {start!r}", do=", ".join(STARTS))
        full, size = triple(shape, "shape"), triple(window, "window")
        step = triple([stride] * 3 if isinstance(stride, int) else stride, "stride")
        if any(w > s for w, s in zip(size, full, strict=True)):
            raise ConfigError(
                f"window {list(size)}",
                why=f"it does not fit in a volume of {list(full)} voxels",
                do="choose a smaller score.window, or resample with sample.volume_size",
            )
        room = [s - w for s, w in zip(full, size, strict=True)]
        if start == "corner_center":
            first = [min(s // 2, most) for s, most in zip(full, room, strict=True)]
        else:
            first = [most // 2 for most in room]
        offset = [place % by for place, by in zip(first, step, strict=True)]
        return cls(full, size, step, _three(offset), _three(first))

    @property
    def counts(self) -> Size:
        """Nodes along each axis."""
        return _three(
            (s - w - o) // by + 1
            for s, w, o, by in zip(self.shape, self.window, self.offset, self.stride, strict=True)
        )

    @property
    def size(self) -> int:
        """Number of nodes."""
        return prod(self.counts)

    def nodes(self, device: torch.device | None = None) -> Tensor:
        """All nodes ``(size, 3)`` int64, the last axis first to change."""
        axes = [torch.arange(count, device=device) for count in self.counts]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)

    def corners(self, device: torch.device | None = None) -> Tensor:
        """All corners ``(size, 3)`` int64, in the order of `nodes`."""
        return self.corner(self.nodes(device))

    def corner(self, node: Tensor) -> Tensor:
        """Corners ``(..., 3)`` of nodes ``(..., 3)``."""
        return node * node.new_tensor(self.stride) + node.new_tensor(self.offset)

    def node(self, corner: Tensor) -> Tensor:
        """Nodes ``(..., 3)`` of corners ``(..., 3)``.

        Raises:
            ConfigError: A corner is outside the volume or not on the lattice.
        """
        found = (corner - corner.new_tensor(self.offset)).div(
            corner.new_tensor(self.stride), rounding_mode="floor"
        )
        good = (self.corner(found) == corner) & (found >= 0) & (found < found.new_tensor(self.counts))
        if not bool(good.all()):
            wrong = corner.reshape(-1, 3)[int(torch.nonzero(~good.reshape(-1, 3).all(dim=1))[0])]
            raise ConfigError(f"corner {wrong.tolist()}", why="it is not on the lattice of the window")
        return found

    def flat(self, node: Tensor) -> Tensor:
        """Numbers ``(...)`` of nodes ``(..., 3)`` in the order of `nodes`."""
        _, ny, nz = self.counts
        return (node[..., 0] * ny + node[..., 1]) * nz + node[..., 2]

    def unflat(self, flat: Tensor) -> Tensor:
        """Nodes ``(..., 3)`` of numbers ``(...)``, the inverse of `flat`."""
        _, ny, nz = self.counts
        return torch.stack([flat // (ny * nz), flat // nz % ny, flat % nz], dim=-1)

    def start_node(self) -> Tensor:
        """The node ``(3,)`` of the start."""
        return self.node(torch.tensor(self.start))

    def legal(self, node: Tensor) -> Tensor:
        """Which of the six moves stay inside ``(..., 6)`` bool."""
        return legal_moves(node, node.new_tensor(self.counts))

    def tiles(self) -> Tensor:
        """Nodes ``(n, 3)`` of the fewest windows that together see every voxel that the lattice can see."""
        axes = []
        for count, window, stride in zip(self.counts, self.window, self.stride, strict=True):
            every = max(1, window // stride)
            places = list(range(0, count, every))
            if places[-1] != count - 1:
                places.append(count - 1)
            axes.append(torch.tensor(places))
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)


class Lattices:
    """The lattices of several volumes, as tensors.

    Args:
        lattices: One a volume.
        device: Of the tensors.

    Attributes:
        counts: ``(N, 3)`` nodes along each axis.
        offset: ``(N, 3)`` least corners.
        shape: ``(N, 3)`` of the volumes.
        start: ``(N, 3)`` nodes where episodes begin.
        base: ``(N,)`` number of the first node of each volume among the nodes of all.
        stride: ``(3,)``.
        window: ``(3,)``.
    """

    def __init__(self, lattices: Sequence[Lattice], device: torch.device | None = None) -> None:
        if not lattices:
            raise ConfigError("volumes", why="there are none")
        self.items = tuple(lattices)
        self.counts = torch.tensor([item.counts for item in lattices], device=device)
        self.offset = torch.tensor([item.offset for item in lattices], device=device)
        self.shape = torch.tensor([item.shape for item in lattices], device=device)
        self.start = torch.stack([item.start_node() for item in lattices]).to(self.counts.device)
        self.stride = torch.tensor(lattices[0].stride, device=device)
        self.window = torch.tensor(lattices[0].window, device=device)
        sizes = torch.tensor([item.size for item in lattices], device=device)
        self.base = sizes.cumsum(0) - sizes
        self.total = int(sizes.sum())

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Lattice:
        return self.items[index]

    def flat(self, case: Tensor, node: Tensor) -> Tensor:
        """Numbers ``(...)`` among the nodes of all volumes, of nodes ``(..., 3)`` in volumes ``(...)``."""
        counts = self.counts[case]
        inside = (node[..., 0] * counts[..., 1] + node[..., 1]) * counts[..., 2] + node[..., 2]
        return self.base[case] + inside

    def corner(self, case: Tensor, node: Tensor) -> Tensor:
        """Corners ``(..., 3)`` of nodes ``(..., 3)`` in volumes ``(...)``."""
        return node * self.stride + self.offset[case]

    def node(self, case: Tensor, corner: Tensor) -> Tensor:
        """Nodes ``(..., 3)`` of corners ``(..., 3)``.

        Raises:
            ConfigError: A corner is outside its volume or not on its lattice.
        """
        found = (corner - self.offset[case]).div(self.stride, rounding_mode="floor")
        good = (self.corner(case, found) == corner) & (found >= 0) & (found < self.counts[case])
        if not bool(good.all()):
            raise ConfigError("corners", why="some are not on the lattice of the window")
        return found

    def legal(self, case: Tensor, node: Tensor) -> Tensor:
        """Which moves stay inside ``(..., 6)`` bool, of nodes ``(..., 3)`` in volumes ``(...)``."""
        return legal_moves(node, self.counts[case])


def legal_moves(node: Tensor, counts: Tensor) -> Tensor:
    """Which moves stay inside ``(..., 6)`` bool, of nodes ``(..., 3)`` among counts ``(..., 3)``."""
    up, down = node + 1 < counts, node > 0
    pairs = torch.stack([up, down], dim=-1).flip(-2)
    return pairs.flatten(-2)


def move(node: Tensor, actions: Tensor, counts: Tensor) -> Tensor:
    """Nodes ``(..., 3)`` after actions ``(...)``; a move that would leave the volume changes nothing."""
    after = node + moves(node.device)[actions]
    inside = ((after >= 0) & (after < counts)).all(dim=-1, keepdim=True)
    return torch.where(inside, after, node)


def triple(values: Sequence[int], name: str) -> Size:
    """Three positive whole numbers.

    Raises:
        ConfigError: They are something else.
    """
    found = tuple(int(value) for value in values)
    if len(found) != 3 or min(found) < 1:
        raise ConfigError(name, why=f"{list(values)}", do="give three positive numbers")
    return found


def _three(values: Sequence[int] | object) -> Size:
    x, y, z = values  # type: ignore[misc]
    return int(x), int(y), int(z)
