"""The cases that an environment plays: k-space, targets, labels, and which lines exist.

Geometries: ``slice``, each slice a case of its own; ``stack``, the slices of a volume under one mask;
``volume3d``, a volume with a three-dimensional transform, whose lines are ky lines across all kz or, with
`points`, single points (kz, ky).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.kspace.fourier import PLANE, SPACE
from medrl.plugins.kspace.masks import initial_mask

Geometry: TypeAlias = Literal["slice", "stack", "volume3d"]

GEOMETRIES = ("slice", "stack", "volume3d")


@dataclass(frozen=True, eq=False, kw_only=True)
class Cases:
    """N cases of one size.

    Everything may stay on the CPU, also as a memory map; what is asked for comes to `device`.

    Attributes:
        ids: N names.
        kspace: ``(N, [C], [D], H, W)`` complex64, centred and orthonormal.
        target: ``(N, [D], H, W)`` float32, the image that a reconstruction is compared with.
        labels: ``(N, [D], H, W)`` integers, or None.
        possible: ``(N, A)`` bool: lines that may ever be acquired. A is W, or D·W with `points`.
        initial: ``(N, A)`` bool: lines that are there before the first action.
        geometry: See the module.
        coils: Whether axis 1 of `kspace` is coils.
        points: Whether an action is a point (kz, ky) of ``volume3d``, number ``kz * W + ky``.
        sensitivities: As `kspace`, or None; without them coils are combined by root sum of squares.
        slices: ``(N, D)`` bool: which slices of a stack are there, None for all.
        device: Where results are wanted.

    Raises:
        DataError: Shapes do not fit each other.
        ConfigError: The geometry does not fit, or a case has no line to choose.
    """

    ids: tuple[str, ...]
    kspace: Tensor
    target: Tensor
    labels: Tensor | None
    possible: Tensor
    initial: Tensor
    geometry: Geometry = "slice"
    coils: bool = False
    points: bool = False
    sensitivities: Tensor | None = None
    slices: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ConfigError("geometry", why=f"unknown: {self.geometry!r}", do=" or ".join(GEOMETRIES))
        if self.points and self.geometry != "volume3d":
            raise ConfigError("points", why=f"the geometry is {self.geometry}", do="points need volume3d")
        axes = 3 + int(self.coils) + int(self.geometry != "slice")
        image = self.image_shape if self.kspace.ndim == axes else ()
        count = len(self.ids)
        expected = {
            "kspace": (self.kspace, (count, *self.kspace.shape[1 : 1 + int(self.coils)], *image)),
            "target": (self.target, (count, *image)),
            "labels": (self.labels, (count, *image)),
            "possible": (self.possible, (count, self.actions)),
            "initial": (self.initial, (count, self.actions)),
            "sensitivities": (self.sensitivities, tuple(self.kspace.shape)),
            "slices": (self.slices, (count, *image[:1])),
        }
        for name, (value, shape) in expected.items():
            if value is not None and tuple(value.shape) != shape:
                raise DataError(
                    f"{name} of the cases",
                    why=f"shape {tuple(value.shape)}, expected {shape} for geometry {self.geometry}",
                )
        if not count or not bool((self.possible & ~self.initial).any(dim=1).all()):
            raise ConfigError("cases", why="there is none, or one has no line left to choose")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """``([D], H, W)``."""
        return tuple(self.kspace.shape[1 + int(self.coils) :])

    @property
    def width(self) -> int:
        """W."""
        return int(self.kspace.shape[-1])

    @property
    def actions(self) -> int:
        """A, how many lines there are."""
        return self.width * (int(self.kspace.shape[-3]) if self.points else 1)

    @property
    def volume(self) -> bool:
        """Whether the transform has three dimensions."""
        return self.geometry == "volume3d"

    @property
    def dims(self) -> tuple[int, ...]:
        """The axes of the transform."""
        return SPACE if self.volume else PLANE

    @property
    def fewest(self) -> int:
        """How many lines the case with the fewest of them leaves to choose: the largest budget."""
        return int((self.possible & ~self.initial).sum(dim=1).min())

    @cached_property
    def line_energy(self) -> Tensor:
        """``(N, A)`` float32: energy of each line, of all coils and slices."""
        rows = [_energy(self.kspace[number], points=self.points) for number in range(len(self))]
        return torch.stack(rows).to(self.device)

    def to(self, device: torch.device) -> Cases:
        """Move everything to a device."""
        moved: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name).to(device)
            for name in ("kspace", "target", "labels", "possible", "initial", "sensitivities", "slices")
        }
        return replace(self, **moved, device=device)

    def select(self, index: Sequence[int] | Tensor) -> Cases:
        """The cases with these numbers."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else self._rows(getattr(self, name), chosen)
            for name in ("kspace", "target", "labels", "possible", "initial", "sensitivities", "slices")
        }
        return replace(self, ids=tuple(self.ids[i] for i in chosen.tolist()), **parts)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """The cases ``(B,)`` of one attribute, on `device`.

        Raises:
            DataError: The cases do not have it.
        """
        values = getattr(self, name)
        if values is None:
            raise DataError(name, why="these cases have none", do="give labelled cases, or a reward without")
        return self._rows(values, index)

    def measured(self, index: Tensor, mask: Tensor) -> Tensor:
        """k-space ``(B, [C], [D], H, W)`` of the lines ``(B, A)`` of some cases ``(B,)``, zero elsewhere."""
        full = self.rows("kspace", index)
        return full * self.spread(mask.to(full.device))

    def spread(self, mask: Tensor) -> Tensor:
        """A mask ``(B, A)`` so that it multiplies k-space ``(B, [C], [D], H, W)``."""
        between = [1] * (self.kspace.ndim - 2)
        if self.points:
            between[-2] = int(self.kspace.shape[-3])
        return mask.view(mask.shape[0], *between, self.width)

    def _rows(self, values: Tensor, index: Tensor) -> Tensor:
        return values[index.to(values.device)].to(self.device)


def possible_lines(
    count: int,
    width: int,
    *,
    indices: tuple[int, int] | None = None,
    padding: Tensor | None = None,
    depth: int = 1,
) -> Tensor:
    """Lines that may ever be acquired ``(N, A)`` bool: within `indices`, both included, and no padding.

    Args:
        count: N.
        width: W.
        indices: First and last column; None is all.
        padding: ``(N, W)`` bool.
        depth: With points, their number along kz.

    Raises:
        ConfigError: The indices lie outside of the columns.
    """
    first, last = indices if indices is not None else (0, width - 1)
    if not 0 <= first <= last < width:
        raise ConfigError(
            "sampled_indices", why=f"{first} to {last} of {width} columns", do=f"0 to {width - 1}"
        )
    inside = torch.zeros(count, width, dtype=torch.bool)
    inside[:, first : last + 1] = True
    if padding is not None:
        inside &= ~padding.cpu()
    return inside.repeat(1, depth)


def initial_lines(
    count: int, width: int, lines: int, *, padding: Tensor | None = None, depth: int = 1
) -> Tensor:
    """Lines before the first action ``(N, A)`` bool: the centre block, across all kz for points."""
    padded = torch.zeros(count, width, dtype=torch.bool) if padding is None else padding.cpu()
    return initial_mask(width, lines, padding=padded).repeat(1, depth)


def _energy(kspace: Tensor, *, points: bool) -> Tensor:
    power = torch.view_as_real(kspace.resolve_conj()).square().sum(dim=-1)
    if points:
        return power.sum(dim=-2).reshape(-1, power.shape[-3], power.shape[-1]).sum(dim=0).flatten()
    return power.flatten(0, -2).sum(dim=0)
