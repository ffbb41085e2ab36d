"""Networks on 2D images: the U-Net of RL4Seg, a small one for CPUs, and a ResNet that gives one number.

All are built by the keys `in_channels`, `out_channels` and their own, take ``(N, in_channels, H, W)`` of any
size, and give raw outputs: the U-Nets ``(N, out_channels, H, W)``, the ResNet ``(N, out_channels)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError


class UNet(nn.Module):
    """The U-Net of actor, critic and reward network: six levels, two 3×3 convolutions each.

    A level is twice convolution, batch normalisation and ReLU; levels are joined by 2×2 max pooling and by
    2×2 transposed convolutions that halve the channels, and the decoder sees ``[skip, up]``. Where a size is
    odd, what comes from below is padded with zeros to the skip. Weights of convolutions start Xavier-uniform.

    Args:
        in_channels: Channels of the image, and of the action where a reward is judged.
        out_channels: Channels of the output.
        init_channels: Channels of the second level; the first has half, each further one twice as many.
        levels: Resolutions, at least 2.
        dropout: Probability after each ReLU.

    Parameters with the defaults: 7,781,363 for 1→3, 7,781,329 for 1→1, 7,781,473 for 2→1.

    Deviation: images with a side below ``2 ** (levels - 1)`` are padded with zeros; the original refuses
    them.

    In training mode with batch statistics a batch of one image needs a side of ``2 ** levels``, because one
    value cannot be normalised.

    Source: Ronneberger et al. 2015; vital, models/segmentation/unet.py.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 3,
        init_channels: int = 32,
        levels: int = 6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if init_channels < 2 or init_channels % 2 or levels < 2:
            raise ConfigError(
                "rl4seg.unet",
                why=f"init_channels is {init_channels} and levels is {levels}",
                do="init_channels must be even and positive, levels at least 2",
            )
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        widths = [init_channels // 2 * 2**level for level in range(levels)]
        self.smallest = 2 ** (levels - 1)
        self.encoder = nn.ModuleList(
            _block(before, after, dropout)
            for before, after in zip([self.in_channels, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * width, width, kernel_size=2, stride=2) for width in reversed(widths[:-1])
        )
        self.decoder = nn.ModuleList(_block(2 * width, width, dropout) for width in reversed(widths[:-1]))
        self.head = nn.Conv2d(widths[0], self.out_channels, kernel_size=1)
        _xavier(self)

    def forward(self, image: Tensor) -> Tensor:
        """Give ``(N, out_channels, H, W)`` for ``(N, in_channels, H, W)``."""
        height, width = image.shape[2:]
        maps = _padded(image, max(height, self.smallest), max(width, self.smallest))
        skips: list[Tensor] = []
        for index, block in enumerate(self.encoder):
            maps = block(maps if index == 0 else self.pool(maps))
            skips.append(maps)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            skip = skips.pop()
            maps = block(torch.cat([skip, _padded(up(maps), *skip.shape[2:])], dim=1))
        logits: Tensor = self.head(maps)
        return logits[:, :, :height, :width]


class SmallUNet(nn.Module):
    """A U-Net that trains in minutes on a CPU, for images of 64² to 128² pixels.

    The image is folded into channels (pixel-unshuffle) so that the first level already has half the
    resolution, and the output is unfolded again. Otherwise as `UNet`.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output.
        channels: Channels of each level, at least two levels.
        fold: Side of the squares that are folded into channels; 1 folds nothing.

    Images whose sides are no multiples of ``fold * 2 ** (levels - 1)`` are padded by repeating their border,
    and the output is cropped. 319,548 parameters for 1→3.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 3,
        channels: Sequence[int] = (16, 32, 64, 64),
        fold: int = 2,
    ) -> None:
        super().__init__()
        widths = [int(width) for width in channels]
        if len(widths) < 2 or min(widths) < 1 or fold < 1:
            raise ConfigError(
                "rl4seg.unet_small",
                why=f"channels are {widths} and fold is {fold}",
                do="two or more positive numbers of channels, and a fold of at least 1",
            )
        self.in_channels, self.out_channels, self.fold = int(in_channels), int(out_channels), int(fold)
        self.multiple = self.fold * 2 ** (len(widths) - 1)
        folded = self.fold**2
        self.encoder = nn.ModuleList(
            _block(before, after)
            for before, after in zip([in_channels * folded, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(low, high, 2, stride=2) for low, high in pairs)
        self.decoder = nn.ModuleList(_block(2 * high, high) for _, high in pairs)
        self.head = nn.Conv2d(widths[0], out_channels * folded, kernel_size=1)
        _xavier(self)

    def forward(self, image: Tensor) -> Tensor:
        """Give ``(N, out_channels, H, W)`` for ``(N, in_channels, H, W)``."""
        height, width = image.shape[2:]
        full = [-(-size // self.multiple) * self.multiple for size in (height, width)]
        if full != [height, width]:
            image = F.pad(image, (0, full[1] - width, 0, full[0] - height), mode="replicate")
        maps = F.pixel_unshuffle(image, self.fold)
        skips: list[Tensor] = []
        for index, block in enumerate(self.encoder):
            maps = block(maps if index == 0 else self.pool(maps))
            skips.append(maps)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            maps = block(torch.cat([skips.pop(), up(maps)], dim=1))
        return F.pixel_shuffle(self.head(maps), self.fold)[:, :, :height, :width]


class ResNet18(nn.Module):
    """ResNet-18 with a 7×7 first convolution of stride 2 without bias, for one number of an image.

    MONAI's network; 11,170,753 parameters for 1→1, as torchvision's with one input channel. Any size works:
    the image is halved five times with padding and averaged. In training mode a batch of one image must be
    larger than 32 pixels on a side, because one value cannot be normalised.

    Args:
        in_channels: Channels of the image.
        out_channels: Numbers given.

    Deviation: MONAI's implementation instead of torchvision's; same layers, same initialisation.

    Source: He et al. 2016; RL4Echo, rewardnet/reward_net.py.
    """

    def __init__(self, *, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        from monai.networks.nets.resnet import resnet18

        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.network: nn.Module = resnet18(
            spatial_dims=2,
            n_input_channels=in_channels,
            num_classes=out_channels,
            conv1_t_size=7,
            conv1_t_stride=2,
            bias_downsample=False,
        )

    def forward(self, image: Tensor) -> Tensor:
        """Give ``(N, out_channels)`` for ``(N, in_channels, H, W)``."""
        numbers: Tensor = self.network(image)
        return numbers


def _block(before: int, after: int, dropout: float = 0.0) -> nn.Sequential:
    """Twice 3×3 convolution, batch normalisation, ReLU and, if asked for, dropout."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        if dropout > 0.0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def _xavier(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(module.weight)


def _padded(maps: Tensor, height: int, width: int) -> Tensor:
    """Pad with zeros at the far borders to ``(height, width)``."""
    below, right = height - maps.shape[2], width - maps.shape[3]
    return F.pad(maps, (0, right, 0, below)) if below or right else maps
