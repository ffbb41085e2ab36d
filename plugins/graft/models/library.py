"""Students that MONAI owns, with graft's taps and deep supervision added from outside.

MONAI is imported where a network is made: that takes three CPU seconds, which runs of other students need
not pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.graft.models.outputs import StudentOutput, captured


class _TappedNetwork(nn.Module):
    """A network of the library, its taps, and segmentation heads on its decoder stages.

    Args:
        network: The library's network; its forward gives logits.
        taps: Modules whose raw output is distilled, by name, as paths inside `network`.
        stages: Decoder stages with their channels, second-highest resolution first; each gets a head
            under deep supervision.
    """

    divisor: tuple[int, int, int] = (1, 1, 1)

    def __init__(
        self,
        network: nn.Module,
        *,
        taps: dict[str, str],
        stages: Sequence[tuple[str, int]],
        feature_channels: dict[str, int],
        in_channels: int,
        out_channels: int,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.network = network
        self.in_channels, self.out_channels = in_channels, out_channels
        self.deep_supervision = deep_supervision
        self.feature_channels = feature_channels
        self._taps = dict(taps)
        self._stages = [path for path, _ in stages] if deep_supervision else []
        heads = [nn.Conv3d(width, out_channels, 1) for _, width in stages] if deep_supervision else []
        self.heads = nn.ModuleList(heads)

    def padded(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Return the ``(D, H, W)`` that the library's network runs on for an input of this size."""
        raise DataError(f"input of shape {tuple(size)}", why=f"{type(self).__name__} defines no padding")

    def forward(self, image: Tensor) -> StudentOutput:
        """Segment ``(B, in_channels, D, H, W)``; see `StudentOutput`."""
        size = tuple(image.shape[2:])
        full = self.padded(size)
        image = F.pad(
            image, [v for have, want in zip(size[::-1], full[::-1], strict=True) for v in (0, want - have)]
        )
        paths = {**self._taps, **{path: path for path in self._stages}}
        with captured({name: self.network.get_submodule(path) for name, path in paths.items()}) as found:
            logits = [self.network(image)]
        logits += [head(found[path]) for head, path in zip(self.heads, self._stages, strict=True)]
        return StudentOutput(
            [_cropped(item, size, full) for item in logits],
            {name: _cropped(found[name], size, full) for name in self._taps},
        )


def _cropped(values: Tensor, size: Sequence[int], full: Sequence[int]) -> Tensor:
    """Cut the padding off a map of any resolution: keep the share that the image fills, rounded up."""
    keep = [-(-have * want // whole) for have, want, whole in zip(values.shape[2:], size, full, strict=True)]
    return values[:, :, : keep[0], : keep[1], : keep[2]]


class UNet3D(_TappedNetwork):
    """A plain 3D U-Net: two 3×3×3 convolutions a stage, max pooling, transposed convolutions.

    MONAI's BasicUNet. Differences from the original's: convolutions have a bias, and the up-sampling pads by
    replication.

    Args:
        features: Channels of the five stages; the original's light variant has 32, 64, 128, 256, 512.

    Source: models/unet3d.py of the original.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 2,
        deep_supervision: bool = False,
        features: Sequence[int] = (64, 128, 256, 512, 1024),
    ) -> None:
        if len(features) != 5:
            raise ConfigError("graft.unet3d", why=f"features must have five numbers, got {list(features)}")
        from monai.networks.nets.basic_unet import BasicUNet

        widths = [int(width) for width in features]
        network = BasicUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            features=(*widths, widths[0]),
            act=("ReLU", {"inplace": True}),
            norm=("instance", {"affine": True}),
        )
        super().__init__(
            network,
            taps={"neg1": "upcat_1.convs.conv_1.conv", "neg2": "upcat_2.convs.conv_1.conv"},
            stages=[(f"upcat_{k}", _width(network, f"upcat_{k}.convs.conv_1.conv")) for k in (2, 3, 4)],
            feature_channels={"neg1": widths[0], "neg2": _width(network, "upcat_2.convs.conv_1.conv")},
            in_channels=in_channels,
            out_channels=out_channels,
            deep_supervision=deep_supervision,
        )

    def padded(self, size: Sequence[int]) -> tuple[int, int, int]:
        """At least 16 voxels along each axis survive four poolings; shorter axes are padded with zeros."""
        depth, height, width = (max(int(value), 16) for value in size)
        if depth == height == width == 16:
            # One voxel in the deepest stage cannot be normalised.
            width = 32
        return depth, height, width


class SwinUNETRStudent(_TappedNetwork):
    """MONAI's Swin-UNETR; inputs are padded with zeros to multiples of 32 and the result is cropped.

    The original wrote its own network without window partitioning; this is the published one.

    Args:
        feature_size: Channels of the first stage, a multiple of 12.

    Source: Hatamizadeh et al. 2022; replaces models/swin_unetr3d.py of the original.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 2,
        deep_supervision: bool = False,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        use_checkpoint: bool = False,
    ) -> None:
        if feature_size < 12 or feature_size % 12:
            raise ConfigError(
                "graft.swin_unetr", why=f"feature_size must be a multiple of 12, got {feature_size}"
            )
        if len(depths) != 4 or len(num_heads) != 4:
            raise ConfigError("graft.swin_unetr", why="depths and num_heads must have four numbers each")
        from monai.networks.nets.swin_unetr import SwinUNETR

        network = SwinUNETR(
            in_channels=in_channels,
            out_channels=out_channels,
            feature_size=feature_size,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            use_checkpoint=use_checkpoint,
            spatial_dims=3,
        )
        super().__init__(
            network,
            taps={"neg1": "decoder1.conv_block.conv2", "neg2": "decoder2.conv_block.conv2"},
            stages=[(f"decoder{k}", feature_size * 2 ** (k - 2)) for k in (2, 3, 4, 5)],
            feature_channels={"neg1": feature_size, "neg2": feature_size},
            in_channels=in_channels,
            out_channels=out_channels,
            deep_supervision=deep_supervision,
        )

    def padded(self, size: Sequence[int]) -> tuple[int, int, int]:
        """Five halvings need multiples of 32; one voxel in the deepest stage cannot be normalised."""
        depth, height, width = (32 * max(1, -(-int(value) // 32)) for value in size)
        if depth == height == width == 32:
            width = 64
        return depth, height, width


def _width(network: nn.Module, path: str) -> int:
    """Output channels of a convolution inside a network."""
    return cast("nn.Conv3d", network.get_submodule(path)).out_channels
