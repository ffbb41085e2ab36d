"""From acquired lines to an image, and from the image to what a segmentation network makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.coils import cg_sense, combine, expand
from medrl.plugins.kspace.fourier import fftc, ifftc
from medrl.plugins.kspace.models import FusedCompact, ReconUNet, consistent, fused

Reconstruction: TypeAlias = Literal["zf", "sense"] | ReconUNet


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """What can be seen of B acquisitions.

    Attributes:
        image: ``(B, [D], H, W)``, complex, or real where coils were combined by root sum of squares.
        logits: ``(B, K, [D], H, W)`` float32, or None without a segmentation network.
        prediction: ``(B, [D], H, W)`` float32, the magnitude with all lines as the network expects it.
        deep: ``(B, F)`` float32, of stacks ``(B, D, F)``: mean of the deepest features, or None.
        gradient: ``(B, [D], H, W)`` float32, derivative of the summed pixel entropy by the magnitude, or
            None.
        absolute: `magnitude`, where it is known already.
        probs: `probabilities`, where they are known already.
        spread: `entropy`, where it is known already.
    """

    image: Tensor
    logits: Tensor | None = None
    prediction: Tensor | None = None
    deep: Tensor | None = None
    gradient: Tensor | None = None
    absolute: Tensor | None = None
    probs: Tensor | None = None
    spread: Tensor | None = None

    @property
    def magnitude(self) -> Tensor:
        """``(B, [D], H, W)`` float32."""
        return self.image.abs().float() if self.absolute is None else self.absolute

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, ``(B, K, [D], H, W)``.

        Raises:
            ConfigError: There is no segmentation network.
        """
        if self.probs is not None:
            return self.probs
        if self.logits is None:
            raise ConfigError("segmentation", why="there is no segmentation network", do="set seg.model")
        return torch.softmax(self.logits, dim=1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the classes in each pixel, ``(B, [D], H, W)``."""
        if self.spread is not None:
            return self.spread
        return -torch.xlogy(self.probabilities, self.probabilities).sum(dim=1)

    def put(self, index: Tensor, other: View) -> View:
        """Replace some acquisitions ``(n,)`` in place, and return the view."""
        for item in fields(self):
            own, new = getattr(self, item.name), getattr(other, item.name)
            if own is not None:
                own[index] = new
        return self

    def select(self, index: Tensor) -> View:
        """Some of the acquisitions."""
        return replace(self, **{name: value[index] for name, value in self._there().items()})

    def _there(self) -> dict[str, Tensor]:
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


class Imaging:
    """Reconstruct and segment; the networks are frozen and in evaluation mode.

    Args:
        segmenter: Gives logits ``(n, K, H, W)`` of magnitude images ``(n, 1, H, W)``, with one more axis for
            geometry ``volume3d``: a tensor, or a sequence whose first is at full resolution. With a method
            ``both`` it also predicts the image (`CompactNet`).
        reconstruction: ``zf``, zero-filled; ``sense``, by conjugate gradients, for coils with
            sensitivities; or a network, followed by data consistency.
        autocast: Type of the networks' arithmetic; transforms and metrics stay in float32.
        channels_last: Memory format of the networks, faster on many CPUs and GPUs.
        pixels: Pixels that go through a network at once; 0 is as many as suit the device: on CPUs few, whose
            maps stay in the cache.
    """

    def __init__(
        self,
        segmenter: nn.Module | None = None,
        *,
        reconstruction: Reconstruction = "zf",
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        pixels: int = 0,
    ) -> None:
        if isinstance(reconstruction, str) and reconstruction not in ("zf", "sense"):
            raise ConfigError("recon", why=f"unknown: {reconstruction!r}", do="zf, sense or a network")
        self.segmenter = segmenter
        self.reconstruction = reconstruction
        self.autocast, self.pixels = autocast, int(pixels)
        self.channels_last = bool(channels_last)
        for network in (segmenter, reconstruction):
            if isinstance(network, nn.Module):
                network.eval().requires_grad_(requires_grad=False)
                if channels_last and not _three_dimensional(network):
                    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def settle(self, network: nn.Module | None) -> None:
        """Segment with a copy of a network whose weights are final, made for speed; see `models.fused`."""
        if network is None:
            return
        fast = fused(network).requires_grad_(requires_grad=False)
        if self.channels_last and not _three_dimensional(fast):
            fast.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.segmenter = fast

    @property
    def classes(self) -> int:
        """K, the classes of the segmentation network; 0 without one."""
        return 0 if self.segmenter is None else int(getattr(self.segmenter, "out_channels", 0))

    @property
    def predicts(self) -> bool:
        """Whether the segmentation network predicts the image."""
        return bool(getattr(self.segmenter, "reconstructs", False))

    @property
    def deep(self) -> int:
        """Length of its deepest features."""
        return int(getattr(self.segmenter, "bottleneck", 0))

    @property
    def incremental(self) -> bool:
        """Whether an image with one more line is the image before plus that line."""
        return isinstance(self.reconstruction, str) and self.reconstruction == "zf"

    def reconstruct(
        self, cases: Cases, index: Tensor, mask: Tensor, coil_images: Tensor | None = None
    ) -> Tensor:
        """The image ``(B, [D], H, W)`` of acquired lines.

        Args:
            cases: The cases.
            index: ``(B,)``.
            mask: ``(B, A)``.
            coil_images: Zero-filled images ``(B, [C], [D], H, W)``, if they are known already.
        """
        sensitivities = None
        if cases.sensitivities is not None:
            sensitivities = cases.rows("sensitivities", index)
        if self.incremental and coil_images is not None:
            return combine(coil_images, sensitivities) if cases.coils else coil_images
        measured = cases.measured(index, mask)
        if isinstance(self.reconstruction, str) and self.reconstruction == "sense":
            if sensitivities is None or cases.points:
                raise ConfigError(
                    "recon sense",
                    why="it needs several coils with sensitivities, and whole lines",
                    do="set recon to zf",
                )
            return cg_sense(measured, mask.to(measured.device), sensitivities, volume=cases.volume)
        images = ifftc(measured, cases.dims) if coil_images is None else coil_images
        zero_filled = combine(images, sensitivities) if cases.coils else images
        if isinstance(self.reconstruction, str):
            return zero_filled
        return self._improved(self.reconstruction, cases, zero_filled, measured, mask, sensitivities)

    def look(self, image: Tensor, cases: Cases, *, gradient: bool = False) -> View:
        """Segment images ``(B, [D], H, W)``.

        Args:
            image: Complex or real.
            cases: Say what the axes mean.
            gradient: Also take the derivative of the entropy.
        """
        if self.segmenter is None:
            return View(image=image)
        per = image[0].numel() if cases.volume else int(image.shape[-1] * image.shape[-2])
        absolute = image.abs().float()
        flat = absolute.unsqueeze(1) if cases.volume else absolute.reshape(-1, 1, *image.shape[-2:])
        network, count = self.segmenter, max(1, self._pixels(image) // per)
        parts = [self._segment(network, part, gradient) for part in torch.split(flat, count)]
        logits, prediction, deep, slope, probs, entropy = (
            _joined(column) for column in zip(*parts, strict=True)
        )
        if image.ndim == 4 and not cases.volume:
            shape = tuple(image.shape[:2])
            logits, probs = (_stacked(maps, shape) for maps in (logits, probs))
            deep = None if deep is None else deep.view(*shape, -1)
        return View(
            image=image,
            logits=logits,
            prediction=None if prediction is None else prediction.reshape(image.shape),
            deep=deep,
            gradient=None if slope is None else slope.reshape(image.shape),
            absolute=absolute,
            probs=probs,
            spread=None if entropy is None else entropy.reshape(image.shape),
        )

    def _segment(self, network: nn.Module, image: Tensor, gradient: bool) -> tuple[Tensor | None, ...]:
        if gradient and isinstance(network, FusedCompact):
            with self._precision(image):
                made = network.sloped(image)
            prediction = None if made.prediction is None else made.prediction[:, 0]
            pooled = made.deep.flatten(2).mean(dim=2)
            return made.logits, prediction, pooled, made.slope, made.probabilities, made.entropy
        with torch.set_grad_enabled(gradient):
            if gradient:
                image = image.detach().requires_grad_()
            logits, prediction, deep = self._run(network, image)
            log_probs = torch.log_softmax(logits, dim=1)
            probs = log_probs.exp()
            entropy = -(log_probs * probs).sum(dim=1)
            slope = None
            if gradient:
                (slope,) = torch.autograd.grad(entropy.sum(), image)
        found = (logits, prediction, deep, slope, probs, entropy)
        return tuple(None if item is None else item.detach() for item in found)

    def _pixels(self, image: Tensor) -> int:
        return self.pixels or (2**17 if image.device.type == "cpu" else 2**22)

    def _precision(self, image: Tensor) -> torch.autocast:
        return torch.autocast(image.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _run(self, network: nn.Module, image: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.channels_last and image.ndim == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        with self._precision(image):
            both = getattr(network, "both", None)
            if both is None:
                return logits_of(network(image)).float(), None, None
            logits, prediction, deep = both(image)
        pooled = deep.float().flatten(2).mean(dim=2)
        return logits.float(), None if prediction is None else prediction[:, 0].float(), pooled

    def _improved(
        self,
        network: ReconUNet,
        cases: Cases,
        zero_filled: Tensor,
        measured: Tensor,
        mask: Tensor,
        sensitivities: Tensor | None,
    ) -> Tensor:
        if cases.coils and sensitivities is None:
            raise ConfigError(
                "recon unet",
                why="several coils need sensitivities for data consistency",
                do="set recon to zf",
            )
        flat = zero_filled.abs().reshape(-1, 1, *zero_filled.shape[-2:])
        with self._precision(flat):
            per = max(1, self._pixels(flat) // flat[0].numel())
            magnitude = torch.cat([network(part) for part in torch.split(flat, per)]).float()
        return consistent(
            magnitude.view(zero_filled.shape),
            zero_filled,
            measured,
            cases.spread(mask.to(measured.device)),
            to_k=lambda x: fftc(x if sensitivities is None else expand(x, sensitivities), cases.dims),
            to_image=lambda y: (
                combine(ifftc(y, cases.dims), sensitivities) if cases.coils else ifftc(y, cases.dims)
            ),
        )


def logits_of(result: Any) -> Tensor:
    """Logits at full resolution of whatever a segmentation network returns.

    Raises:
        ConfigError: It returns something else.
    """
    found = getattr(result, "logits", result)
    if isinstance(found, Sequence) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ConfigError(
            "segmentation network",
            why=f"its forward returned {type(result).__name__}, not logits",
            do="choose a segmentation model, for example kspace.unet",
        )
    return found


def _stacked(maps: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Maps ``(B·D, K, H, W)`` as ``(B, K, D, H, W)``."""
    return None if maps is None else maps.view(*shape, *maps.shape[1:]).movedim(2, 1)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    if len(there) < 2:
        return there[0] if there else None
    return torch.cat(there)


def _three_dimensional(network: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv3d) for module in network.modules())
