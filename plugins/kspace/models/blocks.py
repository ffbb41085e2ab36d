"""What the networks share: layers of 2 or 3 dimensions, padding to a size that can be halved, derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError


class Layers(NamedTuple):
    """The classes of layers for one number of spatial dimensions."""

    conv: type[nn.Module]
    transposed: type[nn.Module]
    batch_norm: type[nn.Module]
    instance_norm: type[nn.Module]
    dropout: type[nn.Module]
    max_pool: type[nn.Module]
    upsampling: str


_LAYERS = {
    2: Layers(
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.BatchNorm2d,
        nn.InstanceNorm2d,
        nn.Dropout2d,
        nn.MaxPool2d,
        "bilinear",
    ),
    3: Layers(
        nn.Conv3d,
        nn.ConvTranspose3d,
        nn.BatchNorm3d,
        nn.InstanceNorm3d,
        nn.Dropout3d,
        nn.MaxPool3d,
        "trilinear",
    ),
}


def layers(spatial_dims: int, what: str) -> Layers:
    """Return the layers of 2 or 3 spatial dimensions.

    Raises:
        ConfigError: Another number of dimensions.
    """
    if spatial_dims not in _LAYERS:
        raise ConfigError(what, why=f"spatial_dims is {spatial_dims}", do="2 or 3")
    return _LAYERS[spatial_dims]


def padded(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Pad maps ``(B, C, *S)`` with zeros at both ends of each axis to `size`; the odd one comes last."""
    pads: list[int] = []
    for have, want in zip(reversed(maps.shape[2:]), reversed(size), strict=True):
        pads += [(want - have) // 2, want - have - (want - have) // 2]
    return F.pad(maps, pads) if any(pads) else maps


def cropped(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `padded`."""
    for axis, (have, want) in enumerate(zip(maps.shape[2:], size, strict=True), start=2):
        if have != want:
            maps = maps.narrow(axis, (have - want) // 2, want)
    return maps


def multiples(size: Sequence[int], multiple: int, *, least: int = 1) -> list[int]:
    """Round each side up to a multiple, and to at least `least` of them."""
    return [max(-(-side // multiple), least) * multiple for side in size]


def where_positive(grad: Tensor, maps: Tensor) -> Tensor:
    """Derivative of a rectified map, in place: that of the map where it is not 0."""
    found: Tensor = torch.ops.aten.threshold_backward.grad_input(grad, maps, 0, grad_input=grad)
    return found
