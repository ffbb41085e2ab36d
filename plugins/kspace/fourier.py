"""Centred orthonormal Fourier transforms, and images that grow by one k-space column at a time.

Axis -1 is the phase-encoding direction, whose lines are called columns; axis -2 is the readout, always
sampled in full. k-space is complex64 also under automatic mixed precision; double precision stays double.

Source: fastMRI ``fft2c``, ASMR utils/transforms.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "ColumnReconstruction",
    "PointReconstruction",
    "as_complex",
    "basis_images",
    "fft2c",
    "fft3c",
    "fftc",
    "ifft2c",
    "ifft3c",
    "ifftc",
    "zero_filled",
]

PLANE = (-2, -1)
SPACE = (-3, -2, -1)


def as_complex(values: Tensor) -> Tensor:
    """Return complex values; half precision becomes complex64, float64 complex128."""
    if values.is_complex():
        return values.to(torch.complex64) if values.dtype == torch.complex32 else values
    return values.to(torch.complex128 if values.dtype == torch.float64 else torch.complex64)


def fftc(values: Tensor, dims: Sequence[int]) -> Tensor:
    """Image to k-space along some axes: ``fftshift(fft(ifftshift(x), norm="ortho"))``."""
    axes = tuple(dims)
    shifted = torch.fft.ifftshift(as_complex(values), dim=axes)
    found: Tensor = torch.fft.fftshift(torch.fft.fftn(shifted, dim=axes, norm="ortho"), dim=axes)
    return found


def ifftc(values: Tensor, dims: Sequence[int]) -> Tensor:
    """k-space to image along some axes, the inverse of `fftc` for odd sizes too."""
    axes = tuple(dims)
    shifted = torch.fft.ifftshift(as_complex(values), dim=axes)
    found: Tensor = torch.fft.fftshift(torch.fft.ifftn(shifted, dim=axes, norm="ortho"), dim=axes)
    return found


def fft2c(images: Tensor) -> Tensor:
    """Images ``(..., H, W)``, real or complex, to k-space; DC lies at ``(H // 2, W // 2)``.

    >>> fft2c(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))[0].tolist()
    [(-1+0j), (1+1j), (5+0j), (1-1j)]
    """
    return fftc(images, PLANE)


def ifft2c(kspace: Tensor) -> Tensor:
    """k-space ``(..., H, W)`` to complex images."""
    return ifftc(kspace, PLANE)


def fft3c(images: Tensor) -> Tensor:
    """Volumes ``(..., D, H, W)`` to k-space."""
    return fftc(images, SPACE)


def ifft3c(kspace: Tensor) -> Tensor:
    """k-space ``(..., D, H, W)`` to complex volumes."""
    return ifftc(kspace, SPACE)


def zero_filled(kspace: Tensor, mask: Tensor, *, volume: bool = False) -> Tensor:
    """Complex images of the acquired columns alone.

    Args:
        kspace: ``(B, [C], [D], H, W)`` complex.
        mask: ``(B, W)`` acquired columns.
        volume: Transform along depth too (geometry `volume3d`).
    """
    return ifftc(kspace * _spread(mask, kspace.ndim), SPACE if volume else PLANE)


def basis_images(size: int, *, device: torch.device | None = None) -> Tensor:
    """Row c is the inverse transform of a k-space that is 1 at c and 0 elsewhere: ``(W, W)`` complex64."""
    one = torch.eye(size, dtype=torch.complex128, device="cpu")
    return ifftc(one, (-1,)).to(device=device, dtype=torch.complex64)


class ColumnReconstruction:
    """Zero-filled reconstruction by columns, without a two-dimensional transform a step.

    The readout is transformed once; then column c adds ``lines[:, c] ⊗ basis[c]``, a matrix of rank one, to
    the image, which is what the full inverse transform of the mask with c would add.

    Args:
        kspace: ``(B, [C], [D], H, W)`` complex, fully sampled.
        volume: Transform along depth too: a column is then a ky line across all kz.

    Attributes:
        lines: ``(B, W, [C], [D], H)``, each column transformed along the readout.
        basis: ``(W, W)``, see `basis_images`.
    """

    def __init__(self, kspace: Tensor, *, volume: bool = False) -> None:
        self.volume = volume
        self.lines = self._transformed(kspace)
        self.basis = basis_images(kspace.shape[-1], device=kspace.device).to(self.lines.dtype)

    def images(self, mask: Tensor) -> Tensor:
        """Images ``(B, [C], [D], H, W)`` of the columns in a mask ``(B, W)``, from the beginning."""
        return ifftc(self.lines.movedim(1, -1) * _spread(mask, self.lines.ndim), (-1,))

    def add(self, images: Tensor, columns: Tensor, weight: Tensor | None = None) -> Tensor:
        """Add a column to each image, in place; return the images.

        Args:
            images: ``(B, [C], [D], H, W)`` complex.
            columns: ``(B,)`` int64.
            weight: ``(B,)``; 0 leaves an image as it is, -1 takes its column out again. None is 1 for all.
        """
        lines = self.lines[torch.arange(len(columns), device=columns.device), columns]
        if weight is not None:
            lines = lines * weight.to(lines.dtype).view(-1, *[1] * (lines.ndim - 1))
        rows = self.basis[columns].view(len(columns), *[1] * (images.ndim - 2), -1)
        return images.addcmul_(lines.unsqueeze(-1), rows)

    def with_each(self, images: Tensor, columns: Tensor) -> Tensor:
        """What each image would be with each of some further columns; `images` stay as they are.

        Args:
            images: ``(B, [C], [D], H, W)`` complex.
            columns: ``(B, K)`` int64.

        Returns:
            ``(B, K, [C], [D], H, W)``.
        """
        count, candidates = columns.shape
        lines = self.lines[torch.arange(count, device=columns.device).unsqueeze(1), columns]
        rows = self.basis[columns].view(count, candidates, *[1] * (images.ndim - 2), -1)
        return torch.addcmul(images.unsqueeze(1), lines.unsqueeze(-1), rows)

    def replace(self, index: Tensor, kspace: Tensor) -> None:
        """Put other k-space ``(n, [C], [D], H, W)`` in the place of some items ``(n,)`` of the batch."""
        self.lines[index] = self._transformed(kspace)

    def _transformed(self, kspace: Tensor) -> Tensor:
        return ifftc(kspace, SPACE[:-1] if self.volume else PLANE[:-1]).movedim(-1, 1).contiguous()


class PointReconstruction:
    """Zero-filled reconstruction of volumes by points (ky, kz), each a whole readout line.

    Args:
        kspace: ``(B, [C], D, H, W)`` complex; D is kz, W is ky.
    """

    def __init__(self, kspace: Tensor) -> None:
        self.hybrid = ifftc(kspace, (-2,))
        self.across = basis_images(kspace.shape[-1], device=kspace.device).to(self.hybrid.dtype)
        self.along = basis_images(kspace.shape[-3], device=kspace.device).to(self.hybrid.dtype)

    def images(self, mask: Tensor) -> Tensor:
        """Volumes of the points in a mask ``(B, D, W)``, from the beginning."""
        shape = (mask.shape[0], *[1] * (self.hybrid.ndim - 4), mask.shape[1], 1, mask.shape[2])
        return ifftc(self.hybrid * mask.view(shape), (-3, -1))

    def add(self, images: Tensor, depths: Tensor, columns: Tensor) -> Tensor:
        """Add the point (kz, ky) = (`depths`, `columns`), each ``(B,)``, in place; return the volumes."""
        count = len(columns)
        first = torch.arange(count, device=columns.device)
        lines = self.hybrid.movedim((-3, -1), (1, 2))[first, depths, columns]  # (B, [C], H)
        plane = self.along[depths].unsqueeze(-1) * self.across[columns].unsqueeze(-2)  # (B, D, W)
        plane = plane.view(count, *[1] * (images.ndim - 4), plane.shape[1], 1, plane.shape[2])
        return images.addcmul_(lines.unsqueeze(-2).unsqueeze(-1), plane)


def _spread(mask: Tensor, axes: int) -> Tensor:
    """A mask ``(B, W)`` over arrays of that many axes."""
    return mask.view(mask.shape[0], *[1] * (axes - 2), mask.shape[-1])
