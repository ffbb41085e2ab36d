"""nnU-Net's plain convolutional U-Net with its own tensor names, and taps for feature distillation.

The keys of `state_dict()` equal those of nnU-Net's PlainConvUNet without its aliases
(``encoder.stages.S.0.convs.J.conv.weight``, ``decoder.stages.S.convs.J.norm.bias``,
``decoder.transpconvs.S.weight``, ``decoder.seg_layers.S.weight``), so that trained weights map one to one.

Source: specification §3; Isensee et al. 2021; models/fullres_3d_unet.py of the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError, DataError
from medrl.plugins.graft.models.outputs import StudentOutput

Size = tuple[int, int, int]

NEG2_TAPS = ("decoder", "bottleneck", "first_conv")


class ConvNormAct(nn.Module):
    """Convolution, instance normalisation (affine, 1e-5), LeakyReLU(0.01)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Size, stride: Size) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding)
        self.norm = nn.InstanceNorm3d(out_channels, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activated output and the raw output of the convolution, both ``(B, C, D, H, W)``."""
        raw: Tensor = self.conv(x)
        return self.nonlin(self.norm(raw)), raw


class ConvStack(nn.Module):
    """Convolutions of one stage; the first may downsample."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Size, stride: Size, count: int) -> None:
        super().__init__()
        first = ConvNormAct(in_channels, out_channels, kernel, stride)
        rest = [ConvNormAct(out_channels, out_channels, kernel, (1, 1, 1)) for _ in range(count - 1)]
        self.convs = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the stage's output and the raw output of each of its convolutions."""
        raws: list[Tensor] = []
        for block in self.convs:
            x, raw = block(x)
            raws.append(raw)
        return x, raws


class Encoder(nn.Module):
    """The contracting path; one output for each stage."""

    def __init__(
        self,
        in_channels: int,
        features: Sequence[int],
        kernels: Sequence[Size],
        strides: Sequence[Size],
        convs: Sequence[int],
    ) -> None:
        super().__init__()
        widths = [in_channels, *features]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(ConvStack(widths[s], widths[s + 1], kernels[s], strides[s], convs[s]))
                for s in range(len(features))
            )
        )

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the stage outputs, highest resolution first, and the raw last convolution."""
        skips: list[Tensor] = []
        raws: list[Tensor] = []
        for stage in self.stages:
            (block,) = stage.children()
            x, raws = block(x)
            skips.append(x)
        return skips, raws[-1]


class Decoder(nn.Module):
    """The expanding path: stage 0 is the deepest; each stage has its own segmentation layer."""

    def __init__(
        self,
        features: Sequence[int],
        kernels: Sequence[Size],
        strides: Sequence[Size],
        convs: Sequence[int],
        out_channels: int,
    ) -> None:
        super().__init__()
        stages, transpconvs, seg_layers = [], [], []
        for s in range(1, len(features)):
            below, width = features[-s], features[-(s + 1)]
            transpconvs.append(nn.ConvTranspose3d(below, width, strides[-s], strides[-s]))
            stages.append(ConvStack(2 * width, width, kernels[-(s + 1)], (1, 1, 1), convs[s - 1]))
            seg_layers.append(nn.Conv3d(width, out_channels, 1))
        self.stages = nn.ModuleList(stages)
        self.transpconvs = nn.ModuleList(transpconvs)
        self.seg_layers = nn.ModuleList(seg_layers)

    def forward(self, skips: list[Tensor], every_scale: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return logits from high to low resolution and the raw convolutions of each stage, deepest first."""
        x = skips[-1]
        logits: list[Tensor] = []
        taps: list[list[Tensor]] = []
        for s, (up, stage, head) in enumerate(
            zip(self.transpconvs, self.stages, self.seg_layers, strict=True)
        ):
            x, raws = stage(torch.cat((up(x), skips[-(s + 2)]), dim=1))
            taps.append(raws)
            if every_scale or s == len(self.stages) - 1:
                logits.append(head(x))
        return logits[::-1], taps


class PlainConvUNet(nn.Module):
    """A plain U-Net of any depth, kernels and strides.

    Args:
        in_channels: Image channels.
        out_channels: Regions or classes.
        features: Channels of each stage.
        kernels: Kernel ``(kD, kH, kW)`` of each stage, odd.
        strides: Stride of each stage's first convolution; the decoder's transposed convolutions use the same.
        convs: Convolutions a stage: one number, or one for each encoder stage.
        convs_decoder: The same for the decoder's stages; `convs` without its last when left out.
        deep_supervision: Return logits of every decoder stage, high to low resolution.
        neg2: Where the second tap sits: ``decoder`` (last convolution of the second-last decoder stage),
            ``bottleneck`` (last convolution of the encoder) or ``first_conv`` (first convolution of the
            last decoder stage). The original varies it with the model; medrl's default is ``decoder``.
        init: ``he`` (a = 0.01, zero bias) or ``pytorch`` (the original's).

    Attributes:
        divisor: ``(D, H, W)`` sizes must be multiples of it.
        feature_channels: Channels of the taps by name.

    Raises:
        ConfigError: The lists differ in length, or a kernel is even.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        convs: int | Sequence[int] = 2,
        convs_decoder: int | Sequence[int] | None = None,
        deep_supervision: bool = False,
        neg2: str = "decoder",
        init: str = "he",
    ) -> None:
        super().__init__()
        widths = [int(width) for width in features]
        kernel_list, stride_list = [_triple(k) for k in kernels], [_triple(s) for s in strides]
        stages = len(widths)
        encoder_convs = [convs] * stages if isinstance(convs, int) else list(convs)
        if convs_decoder is None:
            convs_decoder = encoder_convs[:-1][::-1]
        decoder_convs = (
            [convs_decoder] * (stages - 1) if isinstance(convs_decoder, int) else list(convs_decoder)
        )
        problems = _problems(
            in_channels, out_channels, widths, kernel_list, stride_list, encoder_convs, decoder_convs
        )
        if neg2 not in NEG2_TAPS:
            problems.append(f"neg2 is '{neg2}', expected one of {', '.join(NEG2_TAPS)}")
        if init not in ("he", "pytorch"):
            problems.append(f"init is '{init}', expected he or pytorch")
        if problems:
            raise ConfigError("plain U-Net", why="its settings do not fit together", problems=problems)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.deep_supervision, self.neg2 = deep_supervision, neg2
        self.divisor: Size = _triple([prod(s[axis] for s in stride_list) for axis in range(3)])
        self.encoder = Encoder(in_channels, widths, kernel_list, stride_list, encoder_convs)
        self.decoder = Decoder(widths, kernel_list, stride_list, decoder_convs, out_channels)
        second = {"decoder": widths[min(1, stages - 1)], "bottleneck": widths[-1], "first_conv": widths[0]}
        self.feature_channels = {"neg1": widths[0], "neg2": second[neg2]}
        if init == "he":
            self.apply(he_init)
        if not deep_supervision:
            # Kept so that weights of a deeply supervised network fit; never used, so never trained.
            for head in self.decoder.seg_layers[:-1]:
                head.requires_grad_(False)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse a spatial shape ``(D, H, W)`` that the strides cannot divide or that ends in one voxel.

        Raises:
            DataError: With the shape, the divisor and what to do.
        """
        if any(size % step for size, step in zip(shape, self.divisor, strict=True)):
            raise DataError(
                f"input of shape {tuple(shape)}",
                why=f"depth, height and width must be multiples of {self.divisor}",
                do="pad or crop the input to a multiple",
            )
        if prod(size // step for size, step in zip(shape, self.divisor, strict=True)) < 2:
            raise DataError(
                f"input of shape {tuple(shape)}",
                why="a single voxel is left in the deepest stage, which instance normalisation cannot use",
                do=f"use at least twice {self.divisor} along one axis",
            )

    def forward(self, image: Tensor) -> StudentOutput:
        """Segment ``(B, in_channels, D, H, W)``; see `StudentOutput`."""
        self.check_shape(image.shape[2:])
        skips, bottom = self.encoder(image)
        logits, taps = self.decoder(skips, self.deep_supervision)
        if self.neg2 == "bottleneck":
            second = bottom
        elif self.neg2 == "first_conv":
            second = taps[-1][0]
        else:
            second = taps[-2][-1] if len(taps) > 1 else bottom
        return StudentOutput(logits, {"neg1": taps[-1][-1], "neg2": second})


def he_init(module: nn.Module) -> None:
    """Draw convolution weights by He's rule for LeakyReLU(0.01) and set their biases to zero."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _triple(values: Sequence[int]) -> Size:
    if len(values) != 3:
        raise ConfigError("plain U-Net", why=f"expected three numbers for (D, H, W), got {list(values)}")
    return int(values[0]), int(values[1]), int(values[2])


def _problems(
    in_channels: int,
    out_channels: int,
    features: list[int],
    kernels: list[Size],
    strides: list[Size],
    convs: list[int],
    convs_decoder: list[int],
) -> list[str]:
    """Say everything that is wrong with the settings of a network."""
    found: list[str] = []
    if in_channels < 1 or out_channels < 1:
        found.append(f"{in_channels} input and {out_channels} output channels; both must be at least 1")
    stages = len(features)
    if stages < 2:
        found.append("fewer than two stages")
    for name, length, expected in (
        ("kernels", len(kernels), stages),
        ("strides", len(strides), stages),
        ("convs", len(convs), stages),
        ("convs_decoder", len(convs_decoder), stages - 1),
    ):
        if length != expected:
            found.append(f"{name} has {length} entries, expected {expected}")
    if any(width < 1 for width in features) or any(count < 1 for count in [*convs, *convs_decoder]):
        found.append("channels and convolutions of each stage must be at least 1")
    if any(size % 2 == 0 or size < 1 for kernel in kernels for size in kernel):
        found.append("kernel sizes must be odd")
    if any(step < 1 for stride in strides for step in stride):
        found.append("strides must be at least 1")
    return found
