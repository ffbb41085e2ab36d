"""The classifier of the original, and a form of it that computes the same numbers faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError

CHANNELS = (8, 16, 32, 64)
HIDDEN = (1600, 800, 400, 128)
INPUT = (256, 256, 180)
_STRIDES = (1, 2, 2, 2)
_FLAT = (3, 3, 2)


class FaithfulNet(nn.Module):
    """Presence classifier of the original: four blocks without padding, five fully connected layers.

    Input ``(B, 1, 256, 256, 180)``, or any size that leaves 3 × 3 × 2 voxels; two logits, of which index 1
    means presence. Parameters: 3,570,738.

    Source: catalinatan/SPARS, ``net_global.py`` at 0f4c84e; three pools, as in the code.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, *CHANNELS)
        self.convs = nn.ModuleList(
            nn.Conv3d(sizes[k], sizes[k + 1], 3, stride=stride) for k, stride in enumerate(_STRIDES)
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(size) for size in CHANNELS)
        widths = (CHANNELS[-1] * _FLAT[0] * _FLAT[1] * _FLAT[2], *HIDDEN, 2)
        self.linears = nn.ModuleList(nn.Linear(widths[k], widths[k + 1]) for k in range(len(widths) - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, 2)`` of images ``(B, 1, X, Y, Z)``.

        Raises:
            ConfigError: The size does not leave 3 × 3 × 2 voxels.
        """
        check_size(images.shape[2:])
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            images = F.relu(norm(conv(images)))
            if number < len(CHANNELS) - 1:
                images = F.max_pool3d(images, 2, 2)
        return _dense_layers(images, self.linears)


class FusedFaithfulNet(nn.Module):
    """`FaithfulNet` for scoring: batch norm folded, pooling before ReLU, channels last; same logits.

    Args:
        network: Whose weights are taken; it is not changed.
        dtype: Of the convolutions; bfloat16 is faster where the processor has it, and less exact.
    """

    def __init__(self, network: FaithfulNet, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.convs = nn.ModuleList()
        for conv, norm in zip(network.convs, network.norms, strict=True):
            self.convs.append(folded(cast("nn.Conv3d", conv), cast("nn.BatchNorm3d", norm)).to(dtype))
        self.linears = nn.ModuleList()
        for layer in cast("Iterable[nn.Linear]", network.linears):
            copy = nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device)
            copy.load_state_dict(layer.state_dict())
            self.linears.append(copy)
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.requires_grad_(requires_grad=False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, 2)`` float32 of images ``(B, 1, X, Y, Z)``."""
        check_size(images.shape[2:])
        images = images.to(self.dtype, memory_format=torch.channels_last_3d)
        for number, conv in enumerate(self.convs):
            images = conv(images)
            if number < len(CHANNELS) - 1:
                # ReLU is monotone, so that it commutes with the maximum, and has an eighth to do afterwards.
                images = F.max_pool3d(images, 2, 2)
            images = images.relu_()
        return _dense_layers(images.float(), self.linears)


def folded(conv: nn.Conv3d, norm: nn.BatchNorm3d) -> nn.Conv3d:
    """Return a convolution that does what a convolution and a batch norm of fixed statistics do."""
    made = nn.Conv3d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        device=conv.weight.device,
    )
    mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
    scale = norm.weight.detach().double() / torch.sqrt(variance.double() + norm.eps)
    bias = 0.0 if conv.bias is None else conv.bias.detach().double()
    with torch.no_grad():
        made.weight.copy_(conv.weight.detach().double() * scale.view(-1, 1, 1, 1, 1))
        cast("Tensor", made.bias).copy_((bias - mean.double()) * scale + norm.bias.detach().double())
    return made


def feature_size(size: Sequence[int]) -> tuple[int, ...]:
    """Voxels that the last block leaves of an input of this size; 0 where it ends before."""
    found = []
    for extent in size:
        left = int(extent)
        for number, stride in enumerate(_STRIDES):
            left = (left - 3) // stride + 1 if left >= 3 else 0
            if number < len(_STRIDES) - 1:
                left //= 2
        found.append(left)
    return tuple(found)


def check_size(size: Sequence[int]) -> None:
    """Refuse a size that the fully connected layers do not take.

    Raises:
        ConfigError: Axes x and y must have 236 to 299 voxels, axis z 172 to 235.
    """
    if feature_size(size) != _FLAT:
        raise ConfigError(
            "spars.faithful",
            why=f"an input of {' × '.join(str(int(n)) for n in size)} voxels does not leave 3 × 3 × 2",
            do="enlarge windows to 256 × 256 × 180 (236 to 299 along x and y, 172 to 235 along z), "
            "or use spars.compact, which takes any size",
        )


def _dense_layers(images: Tensor, layers: nn.ModuleList) -> Tensor:
    rows = images.flatten(1)
    for number, layer in enumerate(layers):
        rows = layer(rows)
        if number < len(layers) - 1:
            rows = F.relu(rows)
    return rows
