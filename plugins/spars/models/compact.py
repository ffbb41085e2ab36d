"""A small network for windows of any size at native resolution, and its dense form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError

from .faithful import CHANNELS, folded

Size = tuple[int, int, int]

STRIDE = 4
"""Voxels of a cell of the last block."""
MARGIN = 8
"""Voxels before a window that its score depends on: 1 + 2 + 4 of the three convolutions, as whole cells."""
BEYOND = 4
"""Voxels behind a window that its score depends on; fewer, because of the strides."""
_STRIDED = 2


class CompactNet(nn.Module):
    """Padded blocks that give two logits for each cell of 4³ voxels; a window has the mean of its cells.

    The channels are those of the original. Because the mean over a window is taken last, the scores of all
    windows of a volume are box means of one map (`cells`).

    Borders: what lies within 8 voxels before and 4 behind a window is seen, so that a window scored alone,
    from a crop with that margin, has the same score as in the dense map. Beyond the border of the volume
    convolutions see zeros, in both forms. Windows need corners on the lattice of 4 voxels for this; others
    are scored on a lattice shifted with them, which is the same as cutting the volume off before it.

    Deviation: the first two blocks have stride 2 and no pooling, further ones no stride, so that windows of
    any size have cells; and the last convolution has kernel 1, which keeps the margin small.

    Args:
        in_channels: Of the images.
        out_channels: Logits; index 1 means presence.
        channels: Of the blocks.
    """

    def __init__(
        self, in_channels: int = 1, out_channels: int = 2, channels: Sequence[int] = CHANNELS
    ) -> None:
        super().__init__()
        if len(channels) < _STRIDED + 1:
            raise ConfigError("spars.compact", why=f"channels {list(channels)}", do="give at least three")
        sizes = (in_channels, *channels)
        kernels = [3, 3, 3, *([1] * (len(channels) - 3))]
        self.convs = nn.ModuleList(
            nn.Conv3d(sizes[k], sizes[k + 1], size, stride=2 if k < _STRIDED else 1, padding=size // 2)
            for k, size in enumerate(kernels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(size) for size in channels)
        self.head = nn.Conv3d(sizes[-1], out_channels, 1)

    def cells(self, images: Tensor) -> Tensor:
        """Logits ``(B, K, X / 4, Y / 4, Z / 4)`` of the whole cells of images ``(B, C, X, Y, Z)``.

        In evaluation batch norm is folded, which changes nothing but the time.
        """
        fast = not self.training and not torch.is_grad_enabled()
        whole = [int(size) // STRIDE * STRIDE for size in images.shape[2:]]
        images = images[:, :, : whole[0], : whole[1], : whole[2]]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if fast:
                images = folded(cast(nn.Conv3d, conv), cast(nn.BatchNorm3d, norm))(images)
            else:
                images = norm(conv(images))
            images = F.relu(images, inplace=fast)
        found: Tensor = self.head(images)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)`` of windows that fill the images ``(B, C, X, Y, Z)``."""
        return self.cells(images).float().mean(dim=(2, 3, 4))


def check_window(window: Sequence[int]) -> Size:
    """Return the window in cells.

    Raises:
        ConfigError: It is not made of whole cells.
    """
    if any(int(size) < STRIDE or int(size) % STRIDE for size in window):
        raise ConfigError(
            "score.window",
            why=f"{list(window)} voxels are not whole cells of spars.compact",
            do=f"choose multiples of {STRIDE}",
        )
    return int(window[0]) // STRIDE, int(window[1]) // STRIDE, int(window[2]) // STRIDE
