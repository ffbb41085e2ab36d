"""Networks on windows of frames: the 3D U-Net of RL4Seg3D, and a small one for CPUs.

All are built by the keys `in_channels`, `out_channels` and their own, take ``(N, in_channels, X, Y, T)``, and
give raw outputs ``(N, out_channels, X, Y, T)``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError, RuntimeFault

Triple = tuple[int, int, int]

KERNELS: tuple[Triple, ...] = ((3, 3, 1), *((3, 3, 3),) * 5)
STRIDES: tuple[Triple, ...] = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))
SLOPE = 0.01


class ConvLayer(nn.Module):
    """Convolution, instance normalisation with weights, leaky ReLU."""

    def __init__(self, before: int, after: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        padding = _triple([int((k - s + 1) / 2) for k, s in zip(kernel, stride, strict=True)], least=0)
        self.conv = nn.Conv3d(before, after, kernel, stride=stride, padding=padding)
        self.norm = nn.InstanceNorm3d(after, affine=True)

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, before, …)`` to ``(N, after, …)``."""
        return F.leaky_relu(self.norm(self._convolved(maps)), SLOPE, inplace=True)

    def _convolved(self, maps: Tensor) -> Tensor:
        """Convolve; in bf16 on a CPU, not where one frame is left of two.

        There, convolutions of stride 2 with matrix units (oneDNN, seen in torch 2.13) read memory that is not
        theirs: their output is wrong or not finite. Two frames of zeros behind avoid the case and change
        nothing of the first frame of the output.
        """
        fragile = maps.shape[-1] <= 2 and self.conv.stride[-1] == 2 and self.conv.kernel_size[-1] == 3
        if fragile and maps.device.type == "cpu" and _in_bf16(maps):
            padded: Tensor = self.conv(F.pad(maps, (0, 4 - maps.shape[-1])))
            return padded[..., :1]
        result: Tensor = self.conv(maps)
        return result


class ConvBlock(nn.Module):
    """Two convolution layers; the first has the stride."""

    def __init__(self, before: int, after: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.conv1 = ConvLayer(before, after, kernel, stride)
        self.conv2 = ConvLayer(after, after, kernel)

    def forward(self, maps: Tensor) -> Tensor:
        """Apply both layers."""
        result: Tensor = self.conv2(self.conv1(maps))
        return result


class UpBlock(nn.Module):
    """Transposed convolution, skip connection, two convolution layers."""

    def __init__(self, below: int, after: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.transp_conv = nn.ConvTranspose3d(below, after, stride, stride=stride, bias=False)
        self.conv_block = ConvBlock(2 * after, after, kernel)

    def forward(self, maps: Tensor, skip: Tensor) -> Tensor:
        """Bring `maps` to the resolution of `skip` and join them, ``[up, skip]``."""
        result: Tensor = self.conv_block(torch.cat([self.transp_conv(maps), skip], dim=1))
        return result


class OutputBlock(nn.Module):
    """A 1×1×1 convolution without bias."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(before, after, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map features to outputs."""
        result: Tensor = self.conv(maps)
        return result


class UNet3d(nn.Module):
    """The U-Net of actor, critic and reward networks; names of its weights are those of the original.

    Parameters with the defaults, supervision heads included: 30,431,104 for 1→3, 30,429,504 for 1→1,
    30,429,792 for 2→1. Sizes must be multiples of 32 in the plane and of 4 in time (`divisor`).

    Args:
        in_channels: Channels of the image, and of the action where a reward is judged.
        out_channels: Channels of the output.
        base_filters: Channels of the first level; each further one has twice as many, at most ten times.
        filters: Channels of each level instead.
        kernels: Kernel of each level of the encoder; the decoder uses those below its own.
        strides: Stride of each level.
        deep_supervision: In training mode, give ``[full, level 1, level 2]`` and train their heads.

    Deviation: with deep supervision the heads of lower levels are trained; the original leaves them frozen at
    random values, so that half of that loss means nothing. Without it they are frozen and unused as there.

    Raises:
        ConfigError: The levels do not fit each other.

    Source: Isensee et al. 2021 (nnU-Net); patchless-nnUnet, models/components/unet.py.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 3,
        base_filters: int = 32,
        filters: Sequence[int] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
        strides: Sequence[Sequence[int]] | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        sizes = [_triple(size) for size in (kernels or KERNELS)]
        steps = [_triple(step) for step in (strides or STRIDES)]
        widths = [int(width) for width in filters or _widths(base_filters, len(steps))]
        if not len(sizes) == len(steps) == len(widths) or len(widths) < 3 or min(widths) < 1:
            raise ConfigError(
                "rl4seg3d.unet3d",
                why=f"{len(widths)} filters, {len(sizes)} kernels and {len(steps)} strides, filters {widths}",
                do="give as many of each, three or more, with one filter or more",
            )
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.filters, self.kernels, self.strides = widths, sizes, steps
        self.deep_supervision = deep_supervision
        products = [1, 1, 1]
        for step in steps:
            products = [product * one for product, one in zip(products, step, strict=True)]
        self.divisor: Triple = (products[0], products[1], products[2])
        self.input_block = ConvBlock(self.in_channels, widths[0], sizes[0], steps[0])
        inner = range(1, len(widths) - 1)
        self.downsamples = nn.ModuleList(
            ConvBlock(widths[level - 1], widths[level], sizes[level], steps[level]) for level in inner
        )
        self.bottleneck = ConvBlock(widths[-2], widths[-1], sizes[-1], steps[-1])
        self.upsamples = nn.ModuleList(
            UpBlock(widths[level], widths[level - 1], sizes[level], steps[level])
            for level in range(len(widths) - 1, 0, -1)
        )
        self.output_block = OutputBlock(widths[0], self.out_channels)
        self.deep_supervision_heads = nn.ModuleList(
            OutputBlock(widths[level], self.out_channels) for level in inner
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        used = 2 if deep_supervision else 0
        for head in list(self.deep_supervision_heads)[used:]:
            head.requires_grad_(requires_grad=False)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Give ``(N, out_channels, X, Y, T)`` for ``(N, in_channels, X, Y, T)``.

        Raises:
            RuntimeFault: A size is no multiple of `divisor`, or one voxel would be left at the bottom, which
                cannot be normalised.
        """
        if any(size % step for size, step in zip(image.shape[2:], self.divisor, strict=True)):
            raise RuntimeFault(
                "the network",
                why=f"an image of {tuple(image.shape[2:])}, sizes must be multiples of {self.divisor}",
                do="pad the image, or cut it into windows of so many frames",
            )
        if tuple(image.shape[2:]) == self.divisor:
            raise RuntimeFault(
                "the network",
                why=f"an image of {self.divisor} leaves one voxel at the lowest level, which has no variance",
                do="pad the image",
            )
        skips: list[Tensor] = [self.input_block(image)]
        for block in self.downsamples:
            skips.append(block(skips[-1]))
        maps: Tensor = self.bottleneck(skips[-1])
        levels: list[Tensor] = []
        for block in self.upsamples:
            maps = block(maps, skips.pop())
            levels.append(maps)
        output: Tensor = self.output_block(maps)
        if not (self.deep_supervision and self.training):
            return output
        return [output, *(self.deep_supervision_heads[k](levels[-2 - k]) for k in range(2))]


class SmallUNet3d(nn.Module):
    """A U-Net that trains in minutes on a CPU, for sequences of any size and length.

    Pixels of a frame are folded into channels, so that the first level already has half the resolution; the
    time axis is never made coarser. The first level sees single frames, the others three. Otherwise as
    `UNet3d`.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output.
        channels: Channels of each level, two or more.
        fold: Side of the squares that are folded into channels.

    Frames whose sides are no multiples of ``fold * 2 ** (levels - 1)`` are padded by repeating their border,
    and the output is cropped.
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
                "rl4seg3d.unet3d_small",
                why=f"channels are {widths} and fold is {fold}",
                do="two or more positive numbers of channels, and a fold of at least 1",
            )
        self.in_channels, self.out_channels, self.fold = int(in_channels), int(out_channels), int(fold)
        self.multiple = self.fold * 2 ** (len(widths) - 1)
        folded = self.fold**2
        self.input_block = ConvBlock(in_channels * folded, widths[0], (3, 3, 1))
        self.downsamples = nn.ModuleList(
            ConvBlock(before, after, (3, 3, 3), (2, 2, 1)) for before, after in itertools.pairwise(widths)
        )
        self.upsamples = nn.ModuleList(
            UpBlock(below, after, (3, 3, 3), (2, 2, 1))
            for below, after in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.output_block = OutputBlock(widths[0], out_channels * folded)
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Give ``(N, out_channels, X, Y, T)`` for ``(N, in_channels, X, Y, T)``."""
        width, height = image.shape[2:4]
        full = [-(-size // self.multiple) * self.multiple for size in (width, height)]
        if full != [width, height]:
            image = F.pad(image, (0, 0, 0, full[1] - height, 0, full[0] - width), mode="replicate")
        skips: list[Tensor] = [self.input_block(_fold(image, self.fold))]
        for block in self.downsamples:
            skips.append(block(skips[-1]))
        maps = skips.pop()
        for block in self.upsamples:
            maps = block(maps, skips.pop())
        return _unfold(self.output_block(maps), self.fold)[:, :, :width, :height]


def _fold(image: Tensor, side: int) -> Tensor:
    """Fold squares of pixels into channels: ``(N, C, X, Y, T)`` to ``(N, C·side², X/side, Y/side, T)``."""
    n, c, x, y, t = image.shape
    parts = image.reshape(n, c, x // side, side, y // side, side, t).permute(0, 1, 3, 5, 2, 4, 6)
    return parts.reshape(n, c * side * side, x // side, y // side, t)


def _unfold(maps: Tensor, side: int) -> Tensor:
    """Undo `_fold`."""
    n, c, x, y, t = maps.shape
    parts = maps.reshape(n, c // side**2, side, side, x, y, t).permute(0, 1, 4, 2, 5, 3, 6)
    return parts.reshape(n, c // side**2, x * side, y * side, t)


def _in_bf16(maps: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return maps.dtype == torch.bfloat16


def _widths(base: int, levels: int) -> list[int]:
    return [min(base * 2**level, 10 * base) for level in range(levels)]


def _triple(values: Sequence[int], least: int = 1) -> Triple:
    numbers = [int(value) for value in values]
    if len(numbers) != 3 or min(numbers) < least:
        raise ConfigError("rl4seg3d.unet3d", why=f"{numbers} are not three numbers of at least {least}")
    return numbers[0], numbers[1], numbers[2]
