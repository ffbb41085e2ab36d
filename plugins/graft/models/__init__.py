"""Student networks: nnU-Net's plain U-Net in several sizes, and two of MONAI's networks.

Every student takes ``(B, in_channels, D, H, W)`` and returns a `StudentOutput`. All are built by the same
keys: `in_channels`, `out_channels`, `deep_supervision` and their own, and have the attributes `divisor`
(``(D, H, W)`` sizes must be multiples of it) and `feature_channels` (``{"neg1": …, "neg2": …}``).
"""

from medrl.plugins.graft.models.library import SwinUNETRStudent, UNet3D
from medrl.plugins.graft.models.outputs import LogitsOnly, StudentOutput, as_output, tap
from medrl.plugins.graft.models.plain import PlainConvUNet
from medrl.plugins.graft.models.variants import BratsUNet, FullResUNet, LargeUNet, MediumUNet, TinyUNet

__all__ = [
    "BratsUNet",
    "FullResUNet",
    "LargeUNet",
    "LogitsOnly",
    "MediumUNet",
    "PlainConvUNet",
    "StudentOutput",
    "SwinUNETRStudent",
    "TinyUNet",
    "UNet3D",
    "as_output",
    "tap",
]
