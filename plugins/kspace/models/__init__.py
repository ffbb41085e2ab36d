"""Networks of kspace: segmentation of images with missing lines, and reconstruction.

All are built by keys, `in_channels` and `out_channels` among them. Those that segment take images
``(B, in_channels, H, W)`` (with ``spatial_dims=3`` ``(B, in_channels, D, H, W)``) of any size and give logits
``(B, out_channels, H, W)``.
"""

from medrl.plugins.kspace.models.compact import CompactNet, folded
from medrl.plugins.kspace.models.fused import FusedCompact, fused
from medrl.plugins.kspace.models.recon import ReconUNet, consistent
from medrl.plugins.kspace.models.unet import UNet
from medrl.plugins.kspace.models.unetpp import UNetPlusPlus, deep_supervision_weights
from medrl.plugins.kspace.models.unext import SmallUNeXt, UNeXt

__all__ = [
    "CompactNet",
    "FusedCompact",
    "ReconUNet",
    "SmallUNeXt",
    "UNeXt",
    "UNet",
    "UNetPlusPlus",
    "consistent",
    "deep_supervision_weights",
    "folded",
    "fused",
]
