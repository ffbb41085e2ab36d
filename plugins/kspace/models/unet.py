"""The U-Net of milesial, which the reward model of the original is, in two or three dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.models.blocks import Layers, layers, multiples, padded

LEVELS = 5


class UNet(nn.Module):
    """Five levels of two 3×3 convolutions without bias, each followed by batch normalisation and ReLU.

    Levels are joined by max pooling and by transposed convolutions that halve the channels, or by linear
    interpolation; the decoder sees ``[skip, up]``. Names of weights are those of milesial's implementation
    (``inc.double_conv.0.weight``, ``down1.maxpool_conv.1.double_conv.0.weight``, …).

    Args:
        in_channels: Channels of the image.
        out_channels: Classes.
        base: Channels of the first level; each further one has twice as many.
        bilinear: Interpolate instead of transposed convolutions; the deep levels are half as wide.
        dropout: Probability that a whole channel is dropped after each level.
        spatial_dims: 2 or 3.

    31,036,676 parameters for 1→4, 17,262,020 with `bilinear`.

    Deviation: images with a side below 16 are padded with zeros; `dropout` and `spatial_dims` are new.

    Source: Ronneberger et al. 2015; milesial/Pytorch-UNet, which the seed repository copies.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 4,
        base: int = 64,
        bilinear: bool = False,
        dropout: float = 0.0,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        if base < 1 or (bilinear and base % 2):
            raise ConfigError(
                "kspace.unet", why=f"base is {base}", do="a positive number, even with bilinear upsampling"
            )
        kit = layers(spatial_dims, "kspace.unet")
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        one, two, three, four, five = (base * 2**level for level in range(LEVELS))
        less = 2 if bilinear else 1
        self.inc = _DoubleConv(in_channels, one, kit=kit, dropout=dropout)
        self.down1 = _Down(one, two, kit=kit, dropout=dropout)
        self.down2 = _Down(two, three, kit=kit, dropout=dropout)
        self.down3 = _Down(three, four, kit=kit, dropout=dropout)
        self.down4 = _Down(four, five // less, kit=kit, dropout=dropout)
        self.up1 = _Up(five, four // less, kit=kit, bilinear=bilinear, dropout=dropout)
        self.up2 = _Up(four, three // less, kit=kit, bilinear=bilinear, dropout=dropout)
        self.up3 = _Up(three, two // less, kit=kit, bilinear=bilinear, dropout=dropout)
        self.up4 = _Up(two, one, kit=kit, bilinear=bilinear, dropout=dropout)
        self.outc = _Named("conv", kit.conv(one, out_channels, kernel_size=1))

    def forward(self, image: Tensor) -> Tensor:
        """Give logits ``(B, out_channels, *S)`` for ``(B, in_channels, *S)``."""
        size = image.shape[2:]
        smallest = 2 ** (LEVELS - 1)
        full = [side if side >= smallest else multiples([side], smallest)[0] for side in size]
        first = self.inc(_far_padded(image, full))
        second = self.down1(first)
        third = self.down2(second)
        fourth = self.down3(third)
        maps = self.up1(self.down4(fourth), fourth)
        maps = self.up4(self.up3(self.up2(maps, third), second), first)
        logits: Tensor = self.outc(maps)
        for axis, side in enumerate(size, start=2):
            logits = logits.narrow(axis, 0, side)
        return logits


class _Named(nn.Module):
    """One module under a name of its own, as the original wraps it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, module)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self._name)(maps)
        return out


class _DoubleConv(nn.Module):
    def __init__(
        self, before: int, after: int, *, kit: Layers, middle: int | None = None, dropout: float
    ) -> None:
        super().__init__()
        middle = middle or after
        parts: list[nn.Module] = [
            kit.conv(before, middle, kernel_size=3, padding=1, bias=False),
            kit.batch_norm(middle),
            nn.ReLU(inplace=True),
            kit.conv(middle, after, kernel_size=3, padding=1, bias=False),
            kit.batch_norm(after),
            nn.ReLU(inplace=True),
        ]
        if dropout > 0.0:
            parts.append(kit.dropout(dropout))
        self.double_conv = nn.Sequential(*parts)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.double_conv(maps)
        return out


class _Down(nn.Module):
    def __init__(self, before: int, after: int, *, kit: Layers, dropout: float) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            kit.max_pool(2), _DoubleConv(before, after, kit=kit, dropout=dropout)
        )

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = self.maxpool_conv(maps)
        return out


class _Up(nn.Module):
    def __init__(self, before: int, after: int, *, kit: Layers, bilinear: bool, dropout: float) -> None:
        super().__init__()
        self._mode = kit.upsampling if bilinear else ""
        if not bilinear:
            self.up = kit.transposed(before, before // 2, kernel_size=2, stride=2)
        middle = before // 2 if bilinear else None
        self.conv = _DoubleConv(before, after, kit=kit, middle=middle, dropout=dropout)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        if self._mode:
            deep = F.interpolate(deep, scale_factor=2, mode=self._mode, align_corners=True)
        else:
            deep = self.up(deep)
        out: Tensor = self.conv(torch.cat([skip, padded(deep, skip.shape[2:])], dim=1))
        return out


def _far_padded(image: Tensor, size: list[int]) -> Tensor:
    """Pad with zeros at the far borders."""
    pads = [
        v
        for have, want in zip(reversed(image.shape[2:]), reversed(size), strict=True)
        for v in (0, want - have)
    ]
    return F.pad(image, pads) if any(pads) else image
