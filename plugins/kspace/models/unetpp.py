"""U-Net++ in the style of nnU-Net, in two or three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.models.blocks import Layers, cropped, layers, multiples, padded

POOLINGS = 5
WIDEST = {2: 480, 3: 320}
"""Most channels of a level, by spatial dimensions."""


class UNetPlusPlus(nn.Module):
    """Nested decoders: node (i, j) sees all earlier nodes of its level and what comes up from (i+1, j-1).

    A block is convolution, dropout if asked for, instance normalisation and LeakyReLU(0.01); two make a
    node. The encoder halves by strided convolution, the decoder doubles by 2×2 transposed convolution.

    Args:
        in_channels: Channels of the image.
        out_channels: Classes.
        base: Channels of the first level; each further one has twice as many, up to 480 (2D) or 320 (3D).
        dropout: Probability that a whole channel is dropped in each block.
        deep_supervision: In training mode, give the logits of all five decoders.
        spatial_dims: 2 or 3.

    24,000,352 parameters with base 32 for 1→4, in both settings of `deep_supervision`.

    Deviation: logits, not the softmax of them; images are padded with zeros to multiples of 32, at least two
    of them, because one value cannot be normalised.

    Source: Zhou et al. 2018; generic_UNetPlusPlus.py of the seed repository.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 4,
        base: int = 32,
        dropout: float = 0.0,
        deep_supervision: bool = True,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        kit = layers(spatial_dims, "kspace.unetpp")
        if base < 1:
            raise ConfigError("kspace.unetpp", why=f"base is {base}", do="a positive number")
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.deep_supervision = bool(deep_supervision)
        widths = [min(base * 2**level, WIDEST[spatial_dims]) for level in range(POOLINGS + 1)]
        self.encoder = nn.ModuleList(
            _node(before, after, kit, dropout, stride=1 if level == 0 else 2)
            for level, (before, after) in enumerate(zip([in_channels, *widths], widths, strict=False))
        )
        self.nodes = nn.ModuleDict()
        self.up = nn.ModuleDict()
        for column in range(1, POOLINGS + 1):
            for level in range(POOLINGS + 1 - column):
                width = widths[level]
                self.up[f"{level}_{column}"] = kit.transposed(
                    widths[level + 1], width, kernel_size=2, stride=2, bias=False
                )
                self.nodes[f"{level}_{column}"] = _node(width * (column + 1), width, kit, dropout)
        self.heads = nn.ModuleList(
            kit.conv(widths[0], out_channels, kernel_size=1, bias=False) for _ in range(POOLINGS)
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Give logits ``(B, out_channels, *S)`` for ``(B, in_channels, *S)``.

        Under deep supervision in training mode they come as a list of five, the last decoder's first, all at
        full resolution; `deep_supervision_weights` says how much each counts.
        """
        size = image.shape[2:]
        maps = padded(image, multiples(size, 2**POOLINGS, least=2))
        rows: list[list[Tensor]] = []
        for block in self.encoder:
            maps = block(maps)
            rows.append([maps])
        for column in range(1, POOLINGS + 1):
            for level in range(POOLINGS + 1 - column):
                below = self.up[f"{level}_{column}"](rows[level + 1][column - 1])
                rows[level].append(self.nodes[f"{level}_{column}"](torch.cat([*rows[level], below], dim=1)))
        if not (self.deep_supervision and self.training):
            return cropped(self.heads[-1](rows[0][-1]), size)
        found = [cropped(head(node), size) for head, node in zip(self.heads, rows[0][1:], strict=True)]
        return found[::-1]


def deep_supervision_weights(count: int) -> list[float]:
    """How much each of `count` outputs counts in the loss: 1, 1/2, 1/4, … divided by their sum.

    >>> deep_supervision_weights(2)
    [0.6666666666666666, 0.3333333333333333]
    """
    raw = [0.5**place for place in range(count)]
    return [value / sum(raw) for value in raw]


def _node(before: int, after: int, kit: Layers, dropout: float, stride: int = 1) -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels, step in ((before, stride), (after, 1)):
        parts.append(kit.conv(channels, after, kernel_size=3, stride=step, padding=1))
        if dropout > 0.0:
            parts.append(kit.dropout(dropout))
        parts += [kit.instance_norm(after, affine=True), nn.LeakyReLU(0.01, inplace=True)]
    return nn.Sequential(*parts)
