"""A segmentation network for CPUs that also predicts the fully sampled image."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.models.blocks import cropped, multiples, padded


class CompactNet(nn.Module):
    """A U-Net on folded pixels with one more output: the image as it would be with all lines.

    The image is folded into channels (pixel-unshuffle), so that the first level already has half the
    resolution. Levels have two convolutions going down and one going up, each with batch normalisation and
    ReLU, and are joined by max pooling and bilinear upsampling.

    Args:
        in_channels: Channels of the image.
        out_channels: Classes.
        widths: Channels of each level, at least two levels.
        fold: Side of the squares that are folded into channels; 1 folds nothing.
        reconstructs: Whether to predict the image as well.

    Attributes:
        reconstructs: Whether `both` gives an image.
        bottleneck: Channels of `Parts.deep`.

    42,392 parameters for 1→4.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 4,
        widths: Sequence[int] = (12, 24, 32),
        fold: int = 2,
        reconstructs: bool = True,
    ) -> None:
        super().__init__()
        sizes = [int(width) for width in widths]
        if len(sizes) < 2 or min(sizes) < 1 or fold < 1:
            raise ConfigError(
                "kspace.compact",
                why=f"widths are {sizes} and fold is {fold}",
                do="two or more positive widths, and a fold of at least 1",
            )
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.fold, self.reconstructs = int(fold), bool(reconstructs)
        self.multiple = self.fold * 2 ** (len(sizes) - 1)
        self.bottleneck = sizes[-1]
        square = self.fold**2
        self.encoder = nn.ModuleList(
            nn.Sequential(*_block(before, after), *_block(after, after))
            for before, after in zip([in_channels * square, *sizes], sizes, strict=False)
        )
        pairs = list(zip(reversed(sizes[1:]), reversed(sizes[:-1]), strict=True))
        self.decoder = nn.ModuleList(nn.Sequential(*_block(low + high, high)) for low, high in pairs)
        self.head = nn.Conv2d(sizes[0], (self.out_channels + int(self.reconstructs)) * square, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Give logits ``(B, out_channels, H, W)`` for ``(B, in_channels, H, W)``."""
        return self.both(image)[0]

    def both(self, image: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Give logits, the predicted image and the deepest features.

        Returns:
            Logits ``(B, out_channels, H, W)``; image ``(B, 1, H, W)``, or None without `reconstructs`;
            features ``(B, bottleneck, h, w)``.
        """
        size = image.shape[2:]
        maps = F.pixel_unshuffle(padded(image, multiples(size, self.multiple)), self.fold)
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            maps = block(F.max_pool2d(maps, 2) if level else maps)
            skips.append(maps)
        deep = skips.pop()
        for block in self.decoder:
            maps = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
            maps = block(torch.cat([skips.pop(), maps], dim=1))
        out = cropped(F.pixel_shuffle(self.head(maps), self.fold), size)
        logits = out[:, : self.out_channels]
        return logits, (out[:, self.out_channels :] if self.reconstructs else None), deep


def folded(network: nn.Module) -> nn.Module:
    """Return a copy for evaluation in which batch normalisation is part of the convolutions before it.

    Only pairs that follow each other in a Sequential are joined; the rest stays as it is. The result equals
    the network in evaluation mode up to rounding.
    """
    twin = copy.deepcopy(network).eval()
    for module in twin.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for name, (first, second) in enumerate(zip(list(module), list(module)[1:], strict=False)):
            if isinstance(first, (nn.Conv2d, nn.Conv3d)) and isinstance(
                second, (nn.BatchNorm2d, nn.BatchNorm3d)
            ):
                module[name] = fuse_conv_bn_eval(first, second)
                module[name + 1] = nn.Identity()
    return twin.requires_grad_(requires_grad=False)


def _block(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
