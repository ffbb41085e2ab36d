"""k-space of magnitude images: a smooth phase, noise, and a displaced centre, the same for a case every time.

The k-space of a real image is Hermitian: columns k and -k have the same energy, and half of the lines tell
nothing new about the magnitude. Measured k-space has a phase; `Simulation.phase` gives simulated k-space one.
What remains an inverse crime is said by `caveats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, did_you_mean
from medrl.core.rng import torch_generator

from .fourier import fft2c

__all__ = ["Phase", "Scope", "Simulation", "caveats", "shifted", "simulate", "simulate_scan", "smooth_phase"]

Phase = Literal["none", "smooth"]
Scope = Literal["slice", "scan"]


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How magnitude images become k-space.

    Attributes:
        phase: `smooth` = a random quadratic polynomial; `none` leaves the images real.
        amplitude: Largest phase in radians.
        noise_std: Standard deviation of real and of imaginary part, images being in [0, 1].
        shift_k: Columns up to which the k-space centre is displaced to either side.
        scope: Whether each `slice` has a phase of its own or all slices of a `scan` share one, as geometry
            `volume3d` needs. The displacement is always that of a scan.

    Raises:
        ConfigError: A value is unknown or negative.
    """

    phase: Phase = "smooth"
    amplitude: float = 1.5
    noise_std: float = 0.0
    shift_k: float = 0.0
    scope: Scope = "slice"

    def __post_init__(self) -> None:
        for value, known in ((self.phase, get_args(Phase)), (self.scope, get_args(Scope))):
            if value not in known:
                raise ConfigError("simulation", why=f"'{value}': {did_you_mean(value, known)}")
        if min(self.amplitude, self.noise_std, self.shift_k) < 0:
            raise ConfigError("simulation", why="amplitude, noise_std and shift_k are not negative")


def smooth_phase(count: int, shape: tuple[int, int], amplitude: float, generator: torch.Generator) -> Tensor:
    """Random quadratic phases ``(count, H, W)`` in radians; each reaches amplitude/2 to amplitude."""
    y, x = torch.meshgrid(*(_places(size) for size in shape), indexing="ij")
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])
    drawn = torch.rand(count, len(terms) + 1, generator=generator)
    phase = torch.einsum("nt,thw->nhw", 2.0 * drawn[:, 1:] - 1.0, terms)
    largest = phase.abs().flatten(1).amax(dim=1).clamp_min(1e-6)
    reach = amplitude * (0.5 + 0.5 * drawn[:, 0])
    return phase * (reach / largest).view(-1, 1, 1)


def shifted(images: Tensor, columns: Tensor) -> Tensor:
    """Displace the k-space centre of images ``(N, H, W)`` by some columns ``(N,)``, fractions included.

    A linear phase in the image; positive is towards higher columns.
    """
    width = images.shape[-1]
    place = (torch.arange(width, device=images.device) - width // 2) / width
    angle = 2.0 * torch.pi * columns.to(images.device, torch.float32).view(-1, 1, 1) * place
    return images * torch.polar(torch.ones_like(angle), angle)


def simulate(
    images: Tensor, simulation: Simulation, generator: torch.Generator, *, shift: Tensor | None = None
) -> Tensor:
    """k-space ``(N, H, W)`` complex64 of magnitude images ``(N, H, W)``; every image is drawn for by itself.

    Args:
        images: In [0, 1].
        simulation: How.
        generator: A CPU generator; all random numbers come from it.
        shift: ``(N,)`` columns by which the centres are displaced, in addition to what is drawn.
    """
    count, height, width = images.shape
    seen = images.to(torch.complex64)
    if simulation.phase == "smooth":
        phase = smooth_phase(count, (height, width), simulation.amplitude, generator).to(images.device)
        seen = seen * torch.polar(torch.ones_like(phase), phase)
    displaced = torch.zeros(count) if shift is None else shift.cpu().float()
    if simulation.shift_k > 0:
        displaced = displaced + simulation.shift_k * (2.0 * torch.rand(count, generator=generator) - 1.0)
    return _measured(seen, displaced, simulation.noise_std, [generator] * count)


def simulate_scan(
    images: Tensor,
    simulation: Simulation,
    *,
    seed: int,
    case: str,
    frames: Sequence[str],
    slices: Sequence[int],
    shift: float = 0.0,
) -> Tensor:
    """k-space of the slices of a case, by its name: no other case, and no other slice of it, matters.

    Args:
        images: ``(N, H, W)`` in [0, 1].
        simulation: How.
        seed: Of all cases.
        case: Its name.
        frames: ``(N,)``, the frame of each slice; each frame has a displacement of its own.
        slices: ``(N,)``, the number of each slice.
        shift: Columns by which every centre is displaced, in addition to what is drawn.

    Returns:
        ``(N, H, W)`` complex64.
    """
    shape = (int(images.shape[1]), int(images.shape[2]))
    names = list(zip(frames, slices, strict=True))
    seen = images.to(torch.complex64)
    if simulation.phase == "smooth" and names:
        own = simulation.scope == "slice"
        phase = torch.cat(
            [
                smooth_phase(
                    1,
                    shape,
                    simulation.amplitude,
                    torch_generator(seed, "kspace", "phase", case, frame, number if own else ""),
                )
                for frame, number in names
            ]
        )
        seen = seen * torch.polar(torch.ones_like(phase), phase)
    displaced = torch.full((len(names),), float(shift))
    if simulation.shift_k > 0:
        drawn = {
            frame: float(torch.rand(1, generator=torch_generator(seed, "kspace", "shift", case, frame)))
            for frame in set(frames)
        }
        displaced += simulation.shift_k * (2.0 * torch.tensor([drawn[frame] for frame in frames]) - 1.0)
    sources = [torch_generator(seed, "kspace", "noise", case, frame, number) for frame, number in names]
    return _measured(seen, displaced, simulation.noise_std, sources)


def caveats(simulation: Simulation | None) -> tuple[str, ...]:
    """What a report must say of its k-space; None stands for measured k-space.

    Source: specification §10, point 12.
    """
    if simulation is None:
        return ("The k-space was measured; the target is its reconstruction from all lines.",)
    found = [
        "The k-space is simulated from magnitude images (an inverse crime): interpolation and filtering by "
        "the scanner, 8-bit storage where the images come from PNG, one coil, and no motion between lines "
        "make it easier than a measurement."
    ]
    if simulation.phase == "none":
        found.append(
            "The images have no phase, so columns k and -k carry the same energy, which flatters results."
        )
    else:
        found.append(
            f"The images have a random smooth phase of at most {simulation.amplitude:g} rad; the phase of "
            "measured images has more detail."
        )
    if simulation.noise_std > 0:
        found.append(f"Complex Gaussian noise of standard deviation {simulation.noise_std:g} was added.")
    if simulation.shift_k > 0:
        found.append(
            f"The k-space centre was displaced by up to ±{simulation.shift_k:g} columns in each scan."
        )
    return tuple(found)


def _measured(
    images: Tensor, displaced: Tensor, noise_std: float, sources: Sequence[torch.Generator]
) -> Tensor:
    """Displace, transform, add noise."""
    if bool((displaced != 0).any()):
        images = shifted(images, displaced)
    kspace = fft2c(images)
    if noise_std > 0:
        shape = (2, *images.shape[1:])
        noise = torch.stack([torch.randn(shape, generator=source) for source in sources])
        kspace = kspace + noise_std * torch.complex(noise[:, 0], noise[:, 1]).to(kspace.device)
    return kspace


def _places(size: int) -> Tensor:
    """Places of pixels in [-1, 1)."""
    return (torch.arange(size) - size / 2) / (size / 2)
