"""Smooth random fields, Gaussian smoothing and resampling in the plane, for whole batches at once.

Everything random is drawn by one generator for each sample, named by a seed and the sample's key, on the CPU;
what is computed from it runs where the images are. Spatial axes are (X, Y) or (X, Y, T): all that is done in
the plane is done alike, or changing smoothly, in all frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.errors import ConfigError, did_you_mean
from medrl.core.rng import numpy_generator

Range = tuple[float, float]
T = TypeVar("T")


def generators(seed: int, name: str, keys: Sequence[object]) -> list[np.random.Generator]:
    """One generator for each key; the draws of one sample do not depend on its neighbours."""
    return [numpy_generator(seed, name, key) for key in keys]


def uniform(unit: NDArray[Any], limits: Range) -> NDArray[np.float32]:
    """Map numbers of [0, 1) to a range."""
    return (limits[0] + (limits[1] - limits[0]) * unit).astype(np.float32)


def log_uniform(unit: NDArray[Any], limits: Range) -> NDArray[np.float32]:
    """Map numbers of [0, 1) to a range of positive numbers, evenly in their logarithm."""
    low, high = np.log(limits[0]), np.log(limits[1])
    return np.asarray(np.exp(low + (high - low) * unit), dtype=np.float32)


def column(values: NDArray[Any], dims: int, device: torch.device) -> Tensor:
    """A number for each sample as ``(N, 1, ..., 1)`` with `dims` axes."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)
    return tensor.view(-1, *[1] * (dims - 1))


def normals(streams: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal numbers ``(N, *shape)``, float32, from the generator of each sample."""
    drawn = [stream.standard_normal(tuple(shape), dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(drawn))


def smooth_field(knots: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate coarse values smoothly.

    Args:
        knots: ``(N, P, g, g)`` or ``(N, P, g, g, t)``.
        shape: (X, Y) or (X, Y, T).

    Returns:
        ``(N, P, *shape)``; bicubic in the plane, linear in time.
    """
    n, p = knots.shape[:2]
    if knots.dim() == 4:
        flat = F.interpolate(knots, size=tuple(shape[:2]), mode="bicubic", align_corners=True)
        return flat if len(shape) == 2 else flat.unsqueeze(-1).expand(n, p, *shape)
    times = knots.shape[-1]
    planes = knots.movedim(-1, 2).reshape(n, p * times, *knots.shape[2:4])
    planes = F.interpolate(planes, size=tuple(shape[:2]), mode="bicubic", align_corners=True)
    planes = planes.view(n, p, times, -1).movedim(2, -1).reshape(n, -1, times)
    frames = F.interpolate(planes, size=shape[2], mode="linear", align_corners=times > 1)
    return frames.reshape(n, p, shape[0], shape[1], shape[2])


def smooth(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian smoothing in the plane, with a width of its own for each sample.

    Args:
        images: ``(N, C, *S)``.
        sigma: ``(N,)`` in pixels; 0 leaves a sample alone.

    Near the border the weights inside the image are scaled to sum to one.
    """
    if not bool((sigma > 0).any()):
        return images
    sigma = sigma.reshape(-1).to(images.device)
    rows, columns = _gaussian(images.shape[2], sigma), _gaussian(images.shape[3], sigma)
    if images.dim() == 4:
        return rows[:, None] @ images @ columns[:, None].mT
    planes = images.movedim(-1, 2)
    return (rows[:, None, None] @ planes @ columns[:, None, None].mT).movedim(2, -1)


def correlated(noise: Tensor, sigma: Tensor) -> Tensor:
    """Correlate standard normal numbers over `sigma` pixels in the plane, keeping each one's variance of 1.

    Args:
        noise: ``(N, C, *S)`` independent standard normal numbers.
        sigma: ``(N,)`` in pixels; 0 leaves a sample alone.
    """
    smoothed = smooth(noise, sigma)
    sigma = sigma.reshape(-1).to(noise.device)
    shape = (-1, 1, *noise.shape[2:4], *[1] * (noise.dim() - 4))
    rows, columns = (_gaussian(size, sigma).square().sum(dim=-1) for size in noise.shape[2:4])
    variance = (rows[:, :, None] * columns[:, None, :]).view(shape)
    return smoothed / variance.sqrt()


def coordinates(shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates of pixels from −1 at the first to 1 at the last, along x ``(X, 1)`` and y ``(1, Y)``."""
    x, y = (torch.linspace(-1.0, 1.0, size, device=device) for size in shape[:2])
    return x[:, None], y[None, :]


def sample_labels(masks: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Take labels at other places of the same frame, the nearest pixel each; beyond the border the border's.

    Args:
        masks: ``(N, *S)`` any integer type.
        x: ``(N, *S)`` where to look along the first axis, −1 to 1.
        y: ``(N, *S)`` the same along the second axis.
    """
    width, height = masks.shape[1:3]
    at_x = ((x + 1.0) * (0.5 * (width - 1))).round_().clamp_(0, width - 1).to(torch.int64)
    at_y = ((y + 1.0) * (0.5 * (height - 1))).round_().clamp_(0, height - 1).to(torch.int64)
    index = at_x * height + at_y
    if masks.dim() == 3:
        flat = masks.reshape(masks.shape[0], -1)
        return flat.gather(1, index.reshape(masks.shape[0], -1)).view(masks.shape)
    flat = masks.reshape(masks.shape[0], width * height, masks.shape[3])
    return flat.gather(1, index.reshape(flat.shape)).view(masks.shape)


def sample_images(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Take intensities at other places of the same frame, linearly interpolated; 0 beyond the border.

    Args:
        images: ``(N, C, *S)``.
        x: ``(N, *S)`` where to look along the first axis, −1 to 1, the same for all frames.
        y: ``(N, *S)`` the same along the second axis.
    """
    flat = images if images.dim() == 4 else images.movedim(-1, 2).flatten(1, 2)
    if x.dim() == 4:
        x, y = x[..., 0], y[..., 0]
    # The last axis of the grid names the last axis of the image first.
    grid = torch.stack((y, x), dim=-1).to(flat)
    moved = torch.nn.functional.grid_sample(flat, grid, padding_mode="zeros", align_corners=True)
    if images.dim() == 4:
        return moved
    frames = images.shape[-1]
    return moved.reshape(*images.shape[:2], frames, *moved.shape[2:]).movedim(2, -1)


def checked_range(name: str, limits: Range | None, low: float, high: float, *, positive: bool = False) -> str:
    """Say what is wrong with a range, or nothing."""
    if limits is None:
        return ""
    values = tuple(limits)
    good = len(values) == 2 and low <= values[0] <= values[1] <= high and not (positive and values[0] <= 0)
    return "" if good else f"{name} is {list(values)}, expected two ordered numbers in [{low:g}, {high:g}]"


def refuse(what: str, *problems: str) -> None:
    """Raise a ConfigError that lists the problems that are not empty, if there is one."""
    found = [problem for problem in problems if problem]
    if found:
        raise ConfigError(what, why="settings that make no sense", problems=found)


def from_params(kind: Callable[..., T], params: Mapping[str, Any], what: str) -> T:
    """Build a dataclass of settings from plain values, such as a block of a YAML file.

    Lists become tuples; a mapping given for a field that is such a dataclass itself is built likewise.

    Raises:
        ConfigError: A key is unknown; near matches are named. Or a value is refused.
    """
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    unknown = [f"{name}: {did_you_mean(name, known)}" for name in params if name not in known]
    if unknown:
        raise ConfigError(what, why="unknown settings", problems=unknown)
    values: dict[str, Any] = {}
    for name, value in params.items():
        default = known[name].default
        if is_dataclass(default) and isinstance(value, Mapping):
            values[name] = from_params(type(default), value, f"{what}.{name}")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(what, why=str(error)) from error


def _gaussian(size: int, sigma: Tensor) -> Tensor:
    """Smoothing matrices ``(N, size, size)``, rows summing to one; nothing beyond 5 standard deviations."""
    places = torch.arange(size, device=sigma.device)
    distance = places.to(torch.float32) / sigma.clamp_min(1e-3)[:, None]
    weights = torch.exp(-0.5 * distance.clamp_max(6.0).square()) * (distance <= 5.0)
    table = weights[:, (places[:, None] - places[None, :]).abs()]
    return table / table.sum(dim=-1, keepdim=True)
