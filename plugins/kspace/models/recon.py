"""The U-Net of fastMRI, which removes the aliasing of a zero-filled image, and data consistency after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.models.blocks import cropped, multiples, padded

Transform = Callable[[Tensor], Tensor]

DARK = 1e-4
"""Share of the largest magnitude below which a pixel has no phase."""


class ReconUNet(nn.Module):
    """Predicts what is to be added to a zero-filled magnitude image.

    Blocks are 3×3 convolution without bias, instance normalisation, LeakyReLU(0.2) and dropout, twice; levels
    are joined by average pooling and by 2×2 transposed convolutions. The image is normalised by its own mean
    and standard deviation, and the output is scaled back and added to it.

    Args:
        in_channels: Must be 1: one magnitude image.
        out_channels: Must be 1.
        base: Channels of the first level.
        levels: Poolings.
        dropout: Probability that a channel is dropped.

    7,756,097 parameters with the defaults.

    Deviation: images are padded with zeros to multiples of ``2 ** levels``, at least two of them, because
    one value cannot be normalised (fastMRI pads odd sizes on the way up).

    Source: Zbontar et al. 2018; fastmri/models/unet.py.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 1,
        base: int = 32,
        levels: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if in_channels != 1 or out_channels != 1 or base < 1 or levels < 1:
            raise ConfigError(
                "kspace.recon_unet",
                why=f"{in_channels} input and {out_channels} output channels, base {base}, {levels} levels",
                do="one channel in and out, and at least one channel and level",
            )
        self.in_channels = self.out_channels = 1
        self.levels = int(levels)
        widths = [base * 2**level for level in range(levels)]
        self.encoder = nn.ModuleList(
            _block(before, after, dropout) for before, after in zip([1, *widths], widths, strict=False)
        )
        self.middle = _block(widths[-1], widths[-1] * 2, dropout)
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(width * 2, width, 2, stride=2, bias=False),
                nn.InstanceNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            )
            for width in reversed(widths)
        )
        self.decoder = nn.ModuleList(_block(width * 2, width, dropout) for width in reversed(widths))
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Give improved magnitudes ``(B, 1, H, W)`` of zero-filled ones ``(B, 1, H, W)``, not negative."""
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        deviation = image.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        size = image.shape[2:]
        maps = padded((image - mean) / deviation, multiples(size, 2**self.levels, least=2))
        skips: list[Tensor] = []
        for block in self.encoder:
            skips.append(block(maps))
            maps = F.avg_pool2d(skips[-1], 2)
        maps = self.middle(maps)
        for up, block in zip(self.up, self.decoder, strict=True):
            maps = block(torch.cat([up(maps), skips.pop()], dim=1))
        return (image + cropped(self.head(maps), size) * deviation).clamp_min(0.0)


def consistent(
    magnitude: Tensor,
    zero_filled: Tensor,
    measured: Tensor,
    mask: Tensor,
    *,
    to_k: Transform,
    to_image: Transform,
) -> Tensor:
    """Put measured lines back into a predicted image.

    The prediction takes the phase of the zero-filled image, goes to k-space, and there every acquired line
    is replaced by what was measured.

    Args:
        magnitude: Predicted, ``(B, *S)``, real.
        zero_filled: ``(B, *S)``, complex.
        measured: ``(B, [C], *S)``, complex; zero where nothing was acquired.
        mask: Boolean, broadcastable to `measured`; true where something was acquired.
        to_k: From images ``(B, *S)`` to k-space like `measured`.
        to_image: From k-space like `measured` to images ``(B, *S)``.

    Returns:
        Complex images ``(B, *S)``.
    """
    size = zero_filled.abs()
    # Where the zero-filled image is dark its phase is noise, and the prediction is damped.
    dark = DARK * size.flatten(1).amax(dim=1).view(-1, *[1] * (size.ndim - 1))
    phase = zero_filled / (size + dark).clamp_min(torch.finfo(size.dtype).tiny)
    return to_image(torch.where(mask, measured, to_k(magnitude * phase)))


def _block(before: int, after: int, dropout: float) -> nn.Sequential:
    parts: list[nn.Module] = []
    for channels in (before, after):
        parts += [
            nn.Conv2d(channels, after, 3, padding=1, bias=False),
            nn.InstanceNorm2d(after),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Dropout2d(dropout),
        ]
    return nn.Sequential(*parts)
