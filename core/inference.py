"""Inference on whole images: sliding window, test-time-augmentation views, ensembles.

The sliding window is MONAI's method with other arithmetic. MONAI sums weighted windows and their weights in
two volumes and divides at the end; here every voxel holds the weighted mean of the windows so far, which
the next window moves by its share of the weight. The share follows from the window grid alone, because
the weights are products over the axes. So there is no volume of weights, and equal windows give exactly
their value, not a rounded one. Measured beside MONAI in ``benchmarks/sliding_window.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, RuntimeFault

Network = Callable[[Tensor], Tensor]
Blend = Literal["gaussian", "constant"]

SIGMA = 0.125
"""Width of the Gaussian window as a part of the patch, as in nnU-Net and MONAI."""


def window_starts(size: int, patch: int, overlap: float) -> list[int]:
    """Return where windows begin on one axis: evenly spread, the first at 0, the last at the end.

    As few windows as the overlap allows; neighbours overlap by at least ``overlap * patch`` voxels
    (rounded in favour of progress).
    """
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1.0 - overlap)))
    count = math.ceil((size - patch) / step) + 1
    return [round(k * (size - patch) / (count - 1)) for k in range(count)]


def sliding_window(
    net: Network,
    volume: Tensor,
    patch: Sequence[int],
    *,
    overlap: float = 0.5,
    batch: int = 1,
    device: torch.device | str | None = None,
    blend: Blend = "gaussian",
    pad_value: float = 0.0,
) -> Tensor:
    """Run a network over a volume in overlapping windows and blend the results.

    Args:
        net: Maps `(b, C, *patch)` to `(b, K, *patch)`, `b` up to `batch`.
        volume: `(B, C, D, H, W)` or `(B, C, H, W)`. An axis shorter than the patch is padded on both
            sides and cut again.
        patch: Window size, one number for each spatial axis.
        overlap: Part of a window that its neighbour covers too, in [0, 1).
        batch: Windows in one call of the network.
        device: Where the network runs; windows are moved there. Left out: where `volume` is.
        blend: ``gaussian`` trusts the centre of a window more than its rim; ``constant`` does not.
        pad_value: Value of padded voxels.

    Returns:
        `(B, K, D, H, W)` on the device of `volume`, float32 (float64 for a float64 network). Without
        gradient.

    Raises:
        ConfigError: Patch, overlap or batch do not fit.
        RuntimeFault: The network returns something else than it should.
    """
    patch = _check(volume, patch, overlap, batch)
    target = torch.device(device) if device is not None else volume.device
    with torch.no_grad():
        padded, inner = _pad(volume, patch, pad_value)
        axes = _plan(padded.shape[2:], patch, overlap, blend, volume.device)
        results = [_one(net, padded[i : i + 1], patch, axes, batch, target) for i in range(volume.shape[0])]
        result = results[0] if len(results) == 1 else torch.cat(results)
        return result[slice(None), slice(None), *inner]


@dataclass(frozen=True)
class View:
    """One way to show an image to a network: mirrored along some spatial axes.

    Attributes:
        axes: Spatial axes, 0 is the first after batch and channel.
    """

    axes: tuple[int, ...] = ()

    def apply(self, images: Tensor) -> Tensor:
        """Mirror `(B, C, ...)`."""
        return images.flip([axis + 2 for axis in self.axes]) if self.axes else images

    def invert(self, outputs: Tensor) -> Tensor:
        """Undo `apply`, exactly: mirroring twice is doing nothing."""
        return self.apply(outputs)


def tta_views(axes: Sequence[int] = (0, 1, 2)) -> tuple[View, ...]:
    """Return the views of test-time augmentation: every combination of mirrored axes, the plain one first.

    Leave out an axis along which the anatomy is not symmetric enough, or give none for the plain view.
    """
    chosen = sorted(set(axes))
    return tuple(
        View(combination) for n in range(len(chosen) + 1) for combination in itertools.combinations(chosen, n)
    )


def augmented(
    net: Network, views: Sequence[View], *, activation: Callable[[Tensor], Tensor] | None = None
) -> Network:
    """Return a network whose output is the mean over the views, each turned back.

    Args:
        net: Maps `(B, C, ...)` to `(B, K, ...)`.
        views: From `tta_views`.
        activation: Applied before the mean, such as a softmax; without one, logits are averaged.
    """
    return ensemble(
        [lambda images, view=view: view.invert(net(view.apply(images))) for view in views],  # type: ignore[misc]
        activation=activation,
    )


def ensemble(nets: Sequence[Network], *, activation: Callable[[Tensor], Tensor] | None = None) -> Network:
    """Return a network whose output is the mean over networks, one after the other.

    Raises:
        ConfigError: There is none.
    """
    members = list(nets)
    if not members:
        raise ConfigError("an ensemble needs at least one network")

    def mean(images: Tensor) -> Tensor:
        found: Tensor | None = None
        for count, net in enumerate(members, start=1):
            output = net(images)
            if activation is not None:
                output = activation(output)
            # The mean so far moves by the share of the new output, so that equal outputs stay as they are.
            found = output if found is None else torch.lerp(found, output, 1.0 / count)
        if found is None:
            raise ConfigError("an ensemble needs at least one network")
        return found

    return mean


@dataclass(frozen=True)
class _Axis:
    """The windows of one axis.

    Attributes:
        starts: Where they begin.
        before: For each window `(patch,)`: weight of the earlier windows over its own, at its voxels.
        total: For each window `(patch,)`: weight of all windows over its own.
    """

    starts: list[int]
    before: list[Tensor]
    total: list[Tensor]


def _plan(
    size: Sequence[int], patch: Sequence[int], overlap: float, blend: Blend, device: torch.device
) -> list[_Axis]:
    axes: list[_Axis] = []
    for length, width in zip(size, patch, strict=True):
        starts = window_starts(length, width, overlap)
        weight = _profile(width, blend)
        line = torch.zeros(length)
        before: list[Tensor] = []
        for start in starts:
            before.append((line[start : start + width] / weight).to(device))
            line[start : start + width] += weight
        total = [(line[start : start + width] / weight).to(device) for start in starts]
        axes.append(_Axis(starts, before, total))
    return axes


def _profile(width: int, blend: Blend) -> Tensor:
    if blend == "constant":
        return torch.ones(width)
    at = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    return torch.exp(-0.5 * (at / (SIGMA * width)) ** 2)


def _share(axes: Sequence[_Axis], position: Sequence[int]) -> Tensor:
    r"""Return the weight of a window over the weight of all windows so far, itself included `(*patch)`.

    Windows come in lexicographic order, and their weights are products over the axes. So the weight so far
    is, with :math:`w, b, t` the own, earlier and total weight of one axis,
    :math:`b_x t_y t_z + w_x (b_y t_z + w_y (b_z + w_z))`. Divided by :math:`w_x w_y w_z` and read from the
    last axis to the first, it needs one volume. Where no window was before, the share is exactly 1.
    """
    last = len(axes) - 1
    so_far = axes[last].before[position[last]] + 1.0
    total = axes[last].total[position[last]]
    for number in range(last - 1, -1, -1):
        axis, k = axes[number], position[number]
        view = (-1,) + (1,) * (last - number)
        so_far = torch.addcmul(so_far, axis.before[k].view(view), total)
        if number:
            total = axis.total[k].view(view) * total
    return so_far.reciprocal_()


def _one(
    net: Network,
    volume: Tensor,
    patch: Sequence[int],
    axes: Sequence[_Axis],
    batch: int,
    target: torch.device,
) -> Tensor:
    """Predict one padded volume `(1, C, *size)`."""
    result: Tensor | None = None
    for positions in _batches(itertools.product(*(range(len(axis.starts)) for axis in axes)), batch):
        boxes: list[tuple[slice, ...]] = [
            tuple(
                slice(axis.starts[k], axis.starts[k] + width)
                for axis, k, width in zip(axes, position, patch, strict=True)
            )
            for position in positions
        ]
        windows = [volume[slice(None), slice(None), *box] for box in boxes]
        outputs = net((windows[0] if len(windows) == 1 else torch.cat(windows)).to(target))
        del windows
        _check_output(outputs, len(boxes), patch)
        dtype = torch.float64 if outputs.dtype == torch.float64 else torch.float32
        if tuple(volume.shape[2:]) == tuple(patch):
            return outputs.to(device=volume.device, dtype=dtype)
        if result is None:
            result = torch.zeros((1, outputs.shape[1], *volume.shape[2:]), dtype=dtype, device=volume.device)
        for position, box, output in zip(positions, boxes, outputs, strict=True):
            place = result[0][slice(None), *box]
            output = output.to(device=result.device, dtype=dtype)
            if any(position):
                place.lerp_(output, _share(axes, position).to(dtype))
            else:
                place.copy_(output)
    if result is None:
        raise RuntimeFault("the volume is empty", why=f"its shape is {tuple(volume.shape)}")
    return result


def _batches(items: Iterable[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _pad(volume: Tensor, patch: Sequence[int], value: float) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad axes shorter than the patch on both sides; return where the volume lies in the result."""
    widths: list[int] = []
    inner: list[slice] = []
    for length, width in zip(volume.shape[2:], patch, strict=True):
        missing = max(0, width - length)
        inner.append(slice(missing // 2, missing // 2 + length))
        widths = [missing // 2, missing - missing // 2, *widths]
    if not any(widths):
        return volume, tuple(inner)
    return torch.nn.functional.pad(volume, widths, value=value), tuple(inner)


def _check(volume: Tensor, patch: Sequence[int], overlap: float, batch: int) -> tuple[int, ...]:
    problems: list[str] = []
    if len(patch) != volume.dim() - 2 or not patch or any(int(width) < 1 for width in patch):
        problems.append(f"patch {tuple(patch)} does not fit a volume of shape {tuple(volume.shape)}")
    if not 0.0 <= overlap < 1.0:
        problems.append(f"overlap is {overlap}, expected 0 or more and less than 1")
    if batch < 1:
        problems.append(f"batch is {batch}, expected 1 or more")
    if problems:
        raise ConfigError("the sliding window", problems=problems)
    return tuple(int(width) for width in patch)


def _check_output(outputs: object, count: int, patch: Sequence[int]) -> None:
    if not isinstance(outputs, Tensor):
        raise RuntimeFault(
            "the network gives no single output",
            why=f"it returned a {type(outputs).__name__}",
            do="wrap it so that it returns the output of full resolution",
        )
    if outputs.dim() != len(patch) + 2 or outputs.shape[0] != count or outputs.shape[2:] != tuple(patch):
        raise RuntimeFault(
            "the output of the network does not fit its input",
            why=f"its shape is {tuple(outputs.shape)}, expected ({count}, K, {', '.join(map(str, patch))})",
        )
