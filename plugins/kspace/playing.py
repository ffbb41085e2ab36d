"""The environment of lines on phantoms, for whoever has no run: to check it, to play it, to learn on it."""

from __future__ import annotations

import torch

from medrl.core import rng
from medrl.core.errors import ConfigError
from medrl.core.phantoms.cardiac import draw, draw_anatomy

from .cases import Cases, initial_lines, possible_lines
from .env import KSpaceEnv
from .fourier import fft2c
from .observer import CaseObserver
from .rewards import Mode, OfImage, Quality, Reward


def lines(
    *,
    num_envs: int = 4,
    cases: int = 8,
    size: int = 32,
    init_center: int = 4,
    budget: int = 8,
    reward: Mode = "delta",
    quality: OfImage = "ssim",
    zero_filled: bool = False,
    seed: int = 0,
) -> KSpaceEnv:
    """Acquire lines of drawn hearts; paid is the quality of the zero-filled reconstruction.

    Runs make the environment of their own cases and networks, see `KSpaceEnv`.

    Args:
        num_envs: Episodes at once.
        cases: Hearts to choose from.
        size: Pixels along both axes, at least 16.
        init_center: Lines around the centre that are there before the first action.
        budget: Lines to choose in an episode.
        reward: ``delta`` or ``terminal``.
        quality: ``ssim``, ``nmse`` or ``psnr``.
        zero_filled: Also observe the image.
        seed: Of hearts and episodes.

    Raises:
        ConfigError: The numbers do not fit each other.
    """
    if cases < 1 or size < 16:
        raise ConfigError("kspace.lines", why=f"{cases} cases of {size} pixels", do="at least 1, and 16")
    generator = rng.numpy_generator(seed, "kspace", "phantoms")
    images = torch.stack(
        [torch.from_numpy(draw(draw_anatomy(generator), (size, size))[0]) for _ in range(cases)]
    )
    drawn = Cases(
        ids=tuple(f"heart{number}" for number in range(cases)),
        kspace=fft2c(images.to(torch.complex64)),
        target=images,
        labels=None,
        possible=possible_lines(cases, size),
        initial=initial_lines(cases, size, init_center),
    )
    paid = Reward(Quality(image_weight=1.0, label_weight=0.0, of_image=quality), mode=reward)
    return KSpaceEnv(
        CaseObserver(drawn),
        paid,
        num_envs=num_envs,
        budgets=[budget],
        observe=("zf",) if zero_filled else (),
        seed=seed,
    )
