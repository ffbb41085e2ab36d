"""UNeXt: three convolution stages and two stages of shifted multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.models.blocks import cropped, multiples, padded

SHIFTS = 5


class UNeXt(nn.Module):
    """A light segmentation network: convolutions where resolution is high, shifted perceptrons below.

    Args:
        in_channels: Channels of the image.
        out_channels: Classes.
        widths: Channels of the three convolution stages and the two token stages.

    1,471,972 parameters for 3→4.

    Deviation: `in_channels` counts (the original always takes 3), and images are padded with zeros to
    multiples of 32.

    Source: Valanarasu and Patel 2022; archs.py of the seed repository.
    """

    default_widths: Sequence[int] = (16, 32, 128, 160, 256)

    def __init__(
        self, *, in_channels: int = 1, out_channels: int = 4, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        chosen = [int(width) for width in (widths or self.default_widths)]
        if len(chosen) != 5 or min(chosen) < SHIFTS:
            raise ConfigError(
                "kspace.unext", why=f"widths are {chosen}", do=f"five numbers of at least {SHIFTS}"
            )
        uneven = [width for width in chosen[2:] if -(-width // -(-width // SHIFTS)) != SHIFTS]
        if uneven:
            raise ConfigError(
                "kspace.unext",
                why=f"{uneven[0]} channels do not part into {SHIFTS} groups that are shifted",
                do=f"multiples of {SHIFTS}, or more than {(SHIFTS - 1) ** 2}, as the last three widths",
            )
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        one, two, three, four, five = chosen
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.MaxPool2d(2), nn.ReLU())
            for a, b in ((in_channels, one), (one, two), (two, three))
        )
        self.embed = nn.ModuleList([_PatchEmbedding(three, four), _PatchEmbedding(four, five)])
        self.blocks = nn.ModuleList([_ShiftedBlock(four), _ShiftedBlock(five)])
        self.norms = nn.ModuleList([nn.LayerNorm(four), nn.LayerNorm(five)])
        self.decoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b))
            for a, b in ((five, four), (four, three), (three, two), (two, one))
        )
        self.decoder_blocks = nn.ModuleList([_ShiftedBlock(four), _ShiftedBlock(three)])
        self.decoder_norms = nn.ModuleList([nn.LayerNorm(four), nn.LayerNorm(three)])
        self.last = nn.Conv2d(one, one, 3, padding=1)
        self.head = nn.Conv2d(one, out_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Give logits ``(B, out_channels, H, W)`` for ``(B, in_channels, H, W)``."""
        size = image.shape[2:]
        maps = padded(image, multiples(size, 32))
        skips: list[Tensor] = []
        for stage in self.encoder:
            maps = stage(maps)
            skips.append(maps)
        for embed, block, norm in zip(self.embed, self.blocks, self.norms, strict=True):
            maps = _normalised(block(embed(maps)), norm)
            skips.append(maps)
        skips.pop()
        for stage, block, norm in zip(self.decoder, self.decoder_blocks, self.decoder_norms, strict=False):
            maps = _doubled(stage(maps)) + skips.pop()
            maps = _normalised(block(maps), norm)
        for stage in list(self.decoder)[len(self.decoder_blocks) :]:
            maps = _doubled(stage(maps)) + skips.pop()
        return cropped(self.head(_doubled(self.last(maps))), size)


class SmallUNeXt(UNeXt):
    """UNeXt-S: 253,588 parameters for 3→4."""

    default_widths = (8, 16, 32, 64, 128)


class _ShiftedMLP(nn.Module):
    """Shift the channels against each other along height, mix them; then the same along width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        maps = _linear(_shifted(maps, axis=2), self.fc1)
        maps = F.gelu(self.depthwise(maps))
        return _linear(_shifted(maps, axis=3), self.fc2)


class _ShiftedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = _ShiftedMLP(width)
        self.apply(_initialised)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = maps + self.mlp(_normalised(maps, self.norm))
        return out


class _PatchEmbedding(nn.Module):
    """Overlapping 3×3 patches with stride 2, as tokens."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(before, after, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(after)
        self.apply(_initialised)

    def forward(self, maps: Tensor) -> Tensor:
        return _normalised(self.projection(maps), self.norm)


def _shifted(maps: Tensor, *, axis: int) -> Tensor:
    """Roll five groups of channels ``(B, C, H, W)`` by -2 … 2 along an axis, zeros coming in."""
    pad = SHIFTS // 2
    wide = F.pad(maps, (pad, pad, pad, pad))
    parts = torch.chunk(wide, SHIFTS, dim=1)
    rolled = torch.cat(
        [torch.roll(part, step, dims=axis) for part, step in zip(parts, range(-pad, pad + 1), strict=True)], 1
    )
    return rolled[:, :, pad : pad + maps.shape[2], pad : pad + maps.shape[3]]


def _linear(maps: Tensor, layer: nn.Module) -> Tensor:
    """Apply a layer of the channels in every pixel."""
    out: Tensor = layer(maps.movedim(1, -1)).movedim(-1, 1)
    return out


_normalised = _linear


def _doubled(maps: Tensor) -> Tensor:
    return F.relu(F.interpolate(maps, scale_factor=2, mode="bilinear"))


def _initialised(module: nn.Module) -> None:
    """Initialise as the original: truncated normals for linear layers, fan-out normals for convolutions."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
