"""The plain U-Nets that graft offers by name.

| name | channels | parameters (3 inputs, 2 outputs) | multiples of (D, H, W) |
|-|-|-|-|
| fullres | 32, 64, 128, 256, 320, 320, 320 | 44,577,932 | 4, 64, 64 |
| medium | 48, 96, 192, 384, 480, 480, 480 | 100,285,644 | 4, 64, 64 |
| large | 64, 128, 256, 512, 640, 640, 640 | 178,272,524 | 4, 64, 64 |
| brats | 32, 64, 128, 256, 320, 320 (4 inputs, 3 outputs) | 31,198,991 | 32, 32, 32 |
| tiny | 8, 16, 32, 64 | 323,366 | 2, 8, 8 |
"""

from __future__ import annotations

from collections.abc import Sequence

from medrl.core.errors import ConfigError
from medrl.plugins.graft.models.plain import PlainConvUNet, Size

_FLAT: Size = (1, 3, 3)
_CUBE: Size = (3, 3, 3)
_KEEP: Size = (1, 1, 1)
_PLANE: Size = (1, 2, 2)
_HALF: Size = (2, 2, 2)

FULLRES_KERNELS: tuple[Size, ...] = (_FLAT, _FLAT, _CUBE, _CUBE, _CUBE, _CUBE, _CUBE)
FULLRES_STRIDES: tuple[Size, ...] = (_KEEP, _PLANE, _PLANE, _HALF, _HALF, _PLANE, _PLANE)


class FullResUNet(PlainConvUNet):
    """nnU-Net's 3d_fullres network for 20 slices of 256×256: 7 stages, 44.6 M parameters.

    Source: specification §3; plans of Dataset301 in models/fullres_3d_unet.py.
    """

    default_features: Sequence[int] = (32, 64, 128, 256, 320, 320, 320)

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 2,
        deep_supervision: bool = False,
        features: Sequence[int] | None = None,
        neg2: str = "decoder",
        init: str = "he",
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            features=features or self.default_features,
            kernels=FULLRES_KERNELS,
            strides=FULLRES_STRIDES,
            deep_supervision=deep_supervision,
            neg2=neg2,
            init=init,
        )


class MediumUNet(FullResUNet):
    """The fullres network with 1.5 times the channels, 100.3 M parameters.

    The original taps neg2 at the bottleneck here (``neg2="bottleneck"``).
    """

    default_features = (48, 96, 192, 384, 480, 480, 480)


class LargeUNet(FullResUNet):
    """The fullres network with twice the channels, 178.3 M parameters.

    The original taps neg2 at the bottleneck here (``neg2="bottleneck"``).
    """

    default_features = (64, 128, 256, 512, 640, 640, 640)


class BratsUNet(PlainConvUNet):
    """nnU-Net's network for 4-channel brain tumours: 6 stages of cubic kernels, all axes halved.

    The original taps neg2 at the first convolution of the last stage (``neg2="first_conv"``).
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 3,
        deep_supervision: bool = False,
        features: Sequence[int] = (32, 64, 128, 256, 320, 320),
        neg2: str = "decoder",
        init: str = "he",
    ) -> None:
        stages = len(features)
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            features=features,
            kernels=[_CUBE] * stages,
            strides=[_KEEP, *[_HALF] * (stages - 1)],
            deep_supervision=deep_supervision,
            neg2=neg2,
            init=init,
        )


class TinyUNet(PlainConvUNet):
    """4 stages for CPUs and tests: 323,366 parameters with 3 inputs and 2 outputs.

    Kernels 1×3×3 in the first two stages and 3×3×3 in the last two; strides 1×1×1, 1×2×2, 1×2×2, 2×2×2.

    Args:
        kernels: Kernel of each stage, where the default does not suit (isotropic voxels: all 3×3×3).
        strides: Stride of each stage's first convolution.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 2,
        deep_supervision: bool = False,
        features: Sequence[int] = (8, 16, 32, 64),
        kernels: Sequence[Sequence[int]] | None = None,
        strides: Sequence[Sequence[int]] | None = None,
        neg2: str = "decoder",
        init: str = "he",
    ) -> None:
        stages = len(features)
        if stages < 2:
            raise ConfigError("graft.tiny", why="features must name at least two stages")
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            features=features,
            kernels=kernels or [_FLAT if stage < 2 else _CUBE for stage in range(stages)],
            strides=strides or [_KEEP, *[_PLANE if stage < 3 else _HALF for stage in range(1, stages)]],
            deep_supervision=deep_supervision,
            neg2=neg2,
            init=init,
        )
