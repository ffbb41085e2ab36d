"""The compact network for evaluation alone, with the derivative of its entropy worked out by hand."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.plugins.kspace.models.blocks import cropped, multiples, padded, where_positive
from medrl.plugins.kspace.models.compact import CompactNet, folded


class Sloped(NamedTuple):
    """What `FusedCompact.sloped` gives, all float32.

    Attributes:
        logits: ``(B, K, H, W)``.
        prediction: ``(B, 1, H, W)``, or None.
        deep: ``(B, F, h, w)``, the deepest features.
        probabilities: Softmax of the logits.
        entropy: ``(B, H, W)`` of each pixel.
        slope: ``(B, 1, H, W)``, derivative of the summed entropy by the image.
    """

    logits: Tensor
    prediction: Tensor | None
    deep: Tensor
    probabilities: Tensor
    entropy: Tensor
    slope: Tensor


class FusedCompact(nn.Module):
    """A trained `CompactNet`, frozen: batch normalisation is in the convolutions, maps are channels last.

    Under autocast weights and maps have that type, products are summed and results are given in float32.

    Args:
        network: Copied; its training goes on without effect on this one.
    """

    weight0: Tensor

    def __init__(self, network: CompactNet) -> None:
        super().__init__()
        plain = cast("CompactNet", folded(network))
        self.in_channels, self.out_channels = network.in_channels, network.out_channels
        self.fold, self.multiple = network.fold, network.multiple
        self.reconstructs, self.bottleneck = network.reconstructs, network.bottleneck
        self.levels = len(plain.encoder)
        layers = [
            layer
            for block in [*plain.encoder, *plain.decoder, plain.head]
            for layer in block.modules()
            if isinstance(layer, nn.Conv2d)
        ]
        for number, layer in enumerate(layers):
            bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
            self.register_buffer(f"weight{number}", layer.weight.detach().clone(), persistent=False)
            self.register_buffer(f"bias{number}", bias.detach().clone(), persistent=False)
        self._made: dict[tuple[torch.dtype, torch.device], _Weights] = {}

    def forward(self, image: Tensor) -> Tensor:
        """Give logits ``(B, out_channels, H, W)`` for ``(B, in_channels, H, W)``."""
        return self.both(image)[0]

    @torch.no_grad()
    def both(self, image: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Give logits, the predicted image and the deepest features; see `CompactNet.both`."""
        weights = self._weights(image)
        with torch.autocast(image.device.type, enabled=False):
            maps, kept = self._maps(image, weights)
            out = F.pixel_shuffle(weights.head(maps).float(), self.fold)
        return (*self._results(cropped(out, image.shape[2:])), kept.deep)

    @torch.no_grad()
    def sloped(self, image: Tensor) -> Sloped:
        """Give the same, and the derivative of the entropy of the classes."""
        weights = self._weights(image)
        with torch.autocast(image.device.type, enabled=False):
            maps, kept = self._maps(image, weights)
            # Softmax and its derivative are of each pixel: they do without unfolding.
            out = weights.head_rows(maps)
            log_probs = torch.log_softmax(out[:, : self.out_channels], dim=1)
            probs = log_probs.exp()
            terms = log_probs.mul_(probs)
            negative = terms.sum(dim=1, keepdim=True)
            logits, prediction = self._results(self._unfolded(out, maps, image))
            seen = self._unfolded(probs, maps, image), self._unfolded(-negative, maps, image)[:, 0]
            by_logits = terms.addcmul_(probs, negative, value=-1.0)
            inside = self._inside(image)
            if inside is not None:
                by_logits = by_logits * inside
            slope = -self._backward(weights.back_rows(by_logits, maps), kept, weights).float()
        return Sloped(logits, prediction, kept.deep.float(), *seen, cropped(slope, image.shape[2:]))

    def _weights(self, image: Tensor) -> _Weights:
        kind = image.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight0.dtype
        where = (dtype, self.weight0.device)
        if where not in self._made:
            self._made[where] = _Weights(self, dtype)
        return self._made[where]

    def _maps(self, image: Tensor, weights: _Weights) -> tuple[Tensor, _Kept]:
        """The maps before the last layer, and what the derivative needs."""
        maps = padded(image, multiples(image.shape[2:], self.multiple))
        maps = _last(F.pixel_unshuffle(maps.to(weights.dtype), self.fold))
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        places: list[Tensor] = []
        for level in range(self.levels):
            if level:
                maps, place = F.max_pool2d(maps, 2, return_indices=True)
                places.append(place)
            firsts.append(weights.apply(maps, 2 * level).relu_())
            maps = weights.apply(firsts[-1], 2 * level + 1).relu_()
            seconds.append(maps)
        rising: list[Tensor] = []
        for step in range(self.levels - 1):
            maps = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
            maps = weights.join(seconds[self.levels - 2 - step], maps, step).relu_()
            rising.append(maps)
        return maps, _Kept(firsts, seconds, places, rising)

    def _backward(self, grad: Tensor, kept: _Kept, weights: _Weights) -> Tensor:
        """Derivative by the padded image, from that by the maps before the last layer."""
        skips: list[Tensor] = []
        for step in reversed(range(self.levels - 1)):
            grad = where_positive(grad, kept.rising[step])
            both = weights.back(grad, 2 * self.levels + step)
            width = kept.seconds[self.levels - 2 - step].shape[1]
            skips.append(both[:, :width])
            grad = _last(both[:, width:])
            small = (kept.rising[step - 1] if step else kept.seconds[-1]).shape
            grad = torch.ops.aten.upsample_bilinear2d_backward(
                grad, list(grad.shape[2:]), list(small), False, 2.0, 2.0
            )
        # The skips are of levels 0, 1, ...; the deepest level has none.
        for level in reversed(range(self.levels)):
            if level < self.levels - 1:
                grad = grad.add_(skips[level])
            grad = where_positive(grad, kept.seconds[level])
            grad = weights.back(grad, 2 * level + 1)
            grad = where_positive(grad, kept.firsts[level])
            grad = weights.back(grad, 2 * level)
            if level:
                above = kept.seconds[level - 1]
                grad = torch.ops.aten.max_pool2d_with_indices_backward(
                    grad, above, [2, 2], [2, 2], [0, 0], [1, 1], False, kept.places[level - 1]
                )
        found: Tensor = F.pixel_shuffle(grad, self.fold)
        return found

    def _results(self, whole: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits and prediction."""
        logits = whole[:, : self.out_channels]
        return logits, (whole[:, self.out_channels :] if self.reconstructs else None)

    def _unfolded(self, rows: Tensor, maps: Tensor, image: Tensor) -> Tensor:
        """Values ``(B, n, fold² · h · w)`` as images ``(B, n, H, W)``."""
        folded_maps = rows.view(len(rows), -1, *maps.shape[2:])
        return cropped(F.pixel_shuffle(folded_maps, self.fold), image.shape[2:])

    def _inside(self, image: Tensor) -> Tensor | None:
        """1 where the folded pixels are of the image and 0 where they were padded; None without padding."""
        size = multiples(image.shape[2:], self.multiple)
        if list(image.shape[2:]) == size:
            return None
        ones = padded(image.new_ones(1, 1, *image.shape[2:]), size)
        return F.pixel_unshuffle(ones, self.fold).view(1, 1, -1).float()


class _Kept(NamedTuple):
    """Rectified maps of a forward pass, by level, and where each maximum was."""

    firsts: list[Tensor]
    seconds: list[Tensor]
    places: list[Tensor]
    rising: list[Tensor]

    @property
    def deep(self) -> Tensor:
        return self.seconds[-1]


class _Weights:
    """The weights in one type; transposed as well, for the derivative."""

    def __init__(self, network: FusedCompact, dtype: torch.dtype) -> None:
        self.dtype = dtype
        count = 3 * network.levels
        given = [getattr(network, f"weight{number}").to(dtype) for number in range(count)]
        self.biases = [getattr(network, f"bias{number}").to(dtype) for number in range(count)]
        self.weights = [_last(weight) for weight in given]
        self.turned = [_last(weight.transpose(0, 1).flip(2, 3)) for weight in given[:-1]]
        widths = [layer.shape[0] for layer in given[1 : 2 * network.levels : 2]]
        self.joined = [
            tuple(_last(part) for part in layer.split([width, layer.shape[1] - width], dim=1))
            for layer, width in zip(given[2 * network.levels : -1], widths[-2::-1], strict=True)
        ]
        self.joined_biases = self.biases[2 * network.levels : -1]
        self.square = network.fold**2
        self.last = given[-1].flatten(1)
        self.last_bias = self.biases[-1].float().unsqueeze(1)

    def apply(self, maps: Tensor, number: int) -> Tensor:
        return F.conv2d(maps, self.weights[number], self.biases[number], padding=1)

    def join(self, skip: Tensor, raised: Tensor, step: int) -> Tensor:
        """Convolve two maps as if they were one, which spares joining them."""
        of_skip, of_raised = self.joined[step]
        maps = F.conv2d(raised, of_raised, self.joined_biases[step], padding=1)
        return maps.add_(F.conv2d(skip, of_skip, padding=1))

    def head(self, maps: Tensor) -> Tensor:
        return F.conv2d(maps, self.weights[-1], self.biases[-1])

    def back(self, grad: Tensor, number: int) -> Tensor:
        return F.conv2d(grad, self.turned[number], padding=1)

    def head_rows(self, maps: Tensor) -> Tensor:
        """The last layer, float32, ``(B, n, fold² · h · w)``."""
        rows = maps.movedim(1, -1).flatten(1, 2).transpose(1, 2)
        out = torch.matmul(self.last, rows).float().add_(self.last_bias)
        return out.view(len(maps), -1, self.square * rows.shape[2])

    def back_rows(self, grad: Tensor, maps: Tensor) -> Tensor:
        """Derivative by maps ``(B, C, h, w)``, from that by the first of `head_rows`."""
        rows = grad.view(len(grad), -1, maps.shape[2] * maps.shape[3]).to(self.dtype).transpose(1, 2)
        by_maps = torch.matmul(rows, self.last[: rows.shape[2]])
        return by_maps.view(len(grad), *maps.shape[2:], -1).movedim(-1, 1)


def _last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def fused(network: nn.Module) -> nn.Module:
    """Return a copy of a trained segmentation network for evaluation, as fast as it can be.

    `CompactNet` becomes `FusedCompact`; in others batch normalisation joins the convolutions, see `folded`.
    The result equals the network in evaluation mode up to rounding.
    """
    if isinstance(network, CompactNet):
        return FusedCompact(network)
    return network if isinstance(network, FusedCompact) else folded(network)
