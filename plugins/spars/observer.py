"""What a policy sees of volumes: never a score.

Everything that depends on the place alone is computed once for every place of a volume, and looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from medrl.core.errors import ConfigError
from medrl.plugins.spars.boxsum import integral
from medrl.plugins.spars.lattice import Lattice, Lattices, Size, triple
from medrl.plugins.spars.table import ScoreTable

Seen: TypeAlias = Mapping[str, Tensor]
"""What an agent's network reads, by name."""

Needs: TypeAlias = Literal["features", "view", "window"]

PARTS = 3
"""Boxes along each axis of a glimpse."""
SCALES = (1.0, 2.0, 4.0)
"""Sizes of the glimpses, in windows."""
GLIMPSE = PARTS**3 * (len(SCALES) + 1)
"""Numbers of a glimpse: means at every scale, standard deviations at the first."""
STATE = 17
"""Numbers of the state: own place, way to the other, time left, trail."""
TRAIL = 10
"""Numbers of a trail: whether somebody was here, and at each neighbour; the way to the mean of own visits."""


class Observer:
    """Glimpses, views and windows of volumes.

    Args:
        volumes: N of ``(X, Y, Z)``.
        lattices: Their lattices.
        view_size: Cells of the low-resolution view.
        window_size: Voxels that a window is enlarged to for agents that read windows; None keeps it.
        dtype: Of stored glimpses; half precision halves the memory of large volumes.

    A glimpse looks at boxes about the window's centre, three along each axis, of one third of the window and
    of two and four times that: means, and standard deviations of the smallest. Outside the volume is 0.
    """

    def __init__(
        self,
        volumes: Sequence[Tensor],
        lattices: Lattices,
        *,
        view_size: Sequence[int] = (16, 16, 12),
        window_size: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        if len(volumes) != len(lattices):
            raise ConfigError("observer", why=f"{len(volumes)} volumes, {len(lattices)} lattices")
        self.volumes, self.lattices, self.dtype = list(volumes), lattices, dtype
        self.view_size: Size = triple(view_size, "view_size")
        self.window_size: Size = (
            triple(window_size, "window_size") if window_size is not None else lattices[0].window
        )
        self.device = lattices.counts.device
        self._glimpses = torch.empty(0, GLIMPSE, dtype=dtype, device=self.device)
        self._made = torch.zeros(len(self.volumes), dtype=torch.bool)
        self._low: Tensor | None = None

    @classmethod
    def of(
        cls,
        table: ScoreTable,
        *,
        view_size: Sequence[int] = (16, 16, 12),
        window_size: Sequence[int] | None = None,
    ) -> Observer:
        """The observer of a table's volumes."""
        return cls(table.volumes, table.lattices, view_size=view_size, window_size=window_size)

    def seen(self, observation: Mapping[str, Tensor], needs: Needs) -> Seen:
        """What a network with these needs reads of observations ``(B, ...)`` of the environment.

        ``state`` ``(B, 17)`` always; with `features` also ``glimpse`` ``(B, 108)``; with `view` ``view``
        ``(B, 2, *view_size)``; with `window` ``window`` ``(B, 1, *window_size)``.
        """
        case = observation["case"].view(-1)
        node = observation["node"][:, 0]
        found = {"state": self.state(observation)}
        if needs == "features":
            found["glimpse"] = self.glimpse(case, node)
        elif needs == "view":
            found["view"] = self.view(case, node)
        else:
            found["window"] = self.window(case, node)
        return found

    def state(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Place in [-1, 1], way to the other, time left and trail ``(B, 17)`` float32."""
        counts = self.lattices.counts[observation["case"].view(-1)].unsqueeze(1)
        place = 2.0 * observation["node"] / (counts - 1).clamp(min=1) - 1.0
        way = place[:, 1] - place[:, 0]
        return torch.cat([place[:, 0], way, observation["time"], observation["trail"]], dim=1)

    def glimpse(self, case: Tensor, node: Tensor) -> Tensor:
        """Glimpses ``(B, 108)`` float32 at nodes ``(B, 3)`` of volumes ``(B,)``."""
        if not len(self._glimpses):
            self._glimpses = torch.empty(self.lattices.total, GLIMPSE, dtype=self.dtype, device=self.device)
        if not bool(self._made.all()):
            for index in torch.unique(case).tolist():
                self._prepare(index)
        return self._glimpses[self.lattices.flat(case, node)].float()

    def glimpses(self, index: int) -> Tensor:
        """Glimpses of all nodes of a volume ``(size, 108)`` float32."""
        lattice = self.lattices[index]
        nodes = lattice.nodes(self.device)
        return self.glimpse(torch.full((len(nodes),), index, device=self.device), nodes)

    def view(self, case: Tensor, node: Tensor) -> Tensor:
        """The volume at low resolution and the window in it ``(B, 2, *view_size)`` float32."""
        if self._low is None:
            each = [
                functional.adaptive_avg_pool3d(volume[None, None].float(), self.view_size)[0, 0]
                for volume in self.volumes
            ]
            self._low = torch.stack(each).to(self.device)
        corner = self.lattices.corner(case, node)
        shape = self.lattices.shape[case]
        axes = [self._cover(corner[:, axis], shape[:, axis], axis) for axis in range(3)]
        mask = axes[0][:, :, None, None] * axes[1][:, None, :, None] * axes[2][:, None, None, :]
        return torch.stack([self._low[case], mask], dim=1)

    def window(self, case: Tensor, node: Tensor) -> Tensor:
        """The contents of windows, enlarged by nearest neighbours ``(B, 1, *window_size)`` float32."""
        wx, wy, wz = self.lattices[0].window
        corners = self.lattices.corner(case, node).tolist()
        crops = [
            self.volumes[index][x : x + wx, y : y + wy, z : z + wz]
            for index, (x, y, z) in zip(case.tolist(), corners, strict=True)
        ]
        stack = torch.stack(crops).unsqueeze(1).float()
        if self.window_size == (wx, wy, wz):
            return stack
        return functional.interpolate(stack, size=self.window_size, mode="nearest")

    # -- private -----------------------------------------------------------------------------------

    def _prepare(self, index: int) -> None:
        if bool(self._made[index]):
            return
        base = int(self.lattices.base[index])
        found = glimpses(self.volumes[index].to(self.device), self.lattices[index])
        self._glimpses[base : base + len(found)] = found.to(self.dtype)
        self._made[index] = True

    def _cover(self, low: Tensor, shape: Tensor, axis: int) -> Tensor:
        """Which part of each cell along an axis the window covers ``(B, cells)``."""
        cells = self.view_size[axis]
        width = (shape.float() / cells).unsqueeze(1)
        left = torch.arange(cells, device=self.device) * width
        first = low.unsqueeze(1).float()
        last = first + self.lattices[0].window[axis]
        return (torch.minimum(left + width, last) - torch.maximum(left, first)).clamp(min=0.0) / width


def glimpses(volume: Tensor, lattice: Lattice) -> Tensor:
    """Glimpses at all nodes of a lattice ``(size, 108)`` float32, see `Observer`."""
    sums = integral(volume)
    parts = [_boxes(sums, lattice, scale) for scale in SCALES]
    squares = _boxes(integral(volume.double().square()), lattice, SCALES[0])
    spread = (squares - parts[0].square()).clamp(min=0.0).sqrt()
    return torch.cat([*parts, spread], dim=1).float()


def _boxes(sums: Tensor, lattice: Lattice, scale: float) -> Tensor:
    """Means in the boxes of one scale ``(size, 27)`` float64."""
    found, voxels = sums, torch.ones((), dtype=torch.float64, device=sums.device)
    fine = torch.linspace(-0.5, 0.5, PARTS + 1, dtype=torch.float64, device=sums.device)
    for axis in range(3):
        window, most = lattice.window[axis], sums.shape[axis] - 1
        low = torch.arange(lattice.counts[axis], device=sums.device) * lattice.stride[axis]
        centre = low + lattice.offset[axis] + window / 2
        edges = (centre.unsqueeze(1) + fine * window * scale).round().long().clamp(0, most)
        length = edges.diff(dim=1)
        taken = found.index_select(axis * 2, edges.flatten())
        shape = [*taken.shape[: axis * 2], *edges.shape, *taken.shape[axis * 2 + 1 :]]
        found = taken.view(shape).diff(dim=axis * 2 + 1)
        view = [1] * 6
        view[axis * 2], view[axis * 2 + 1] = length.shape
        voxels = voxels * length.double().view(view)
    means = torch.where(voxels > 0, found / voxels.clamp(min=1.0), 0.0)
    return means.permute(0, 2, 4, 1, 3, 5).reshape(lattice.size, PARTS**3)
