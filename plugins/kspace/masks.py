"""Which columns: centre blocks, random masks for training and validation, and orders that need no policy.

A mask is ``(B, W)`` bool, True where a column is acquired. `free` is ``(B, W)`` bool, True where a column may
still be acquired: not acquired before, and no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.core.rng import torch_generator

__all__ = [
    "apply_order",
    "centre_block",
    "density_mask",
    "density_masks",
    "equispaced_columns",
    "initial_mask",
    "low_to_high_order",
    "random_order",
    "training_masks",
    "triangular",
    "validation_masks",
    "variable_density_order",
]


def centre_block(width: int, count: int) -> tuple[int, int]:
    """First column of the middle `count` of `width`, and the column after the last.

    Source: ASMR, fastMRI and active-mri-acquisition agree on ``(N - n + 1) // 2``.

    >>> centre_block(64, 4), centre_block(368, 30), centre_block(8, 2)
    ((30, 34), (169, 199), (3, 5))
    """
    if not 0 <= count <= width:
        raise ConfigError("centre lines", why=f"{count} of {width} columns")
    start = (width - count + 1) // 2
    return start, start + count


def initial_mask(width: int, count: int, batch: int = 1, *, padding: Tensor | None = None) -> Tensor:
    """The mask before the first action ``(B, W)``: the centre block, without padding columns.

    Args:
        width: Columns.
        count: Columns of the centre block; ASMR begins with none.
        batch: Rows of the mask; ignored with `padding`.
        padding: ``(B, W)`` bool, columns that hold no measurement.
    """
    mask = torch.zeros(batch if padding is None else len(padding), width, dtype=torch.bool)
    first, last = centre_block(width, count)
    mask[:, first:last] = True
    return mask if padding is None else mask.to(padding.device) & ~padding


def triangular(count: int) -> Tensor:
    """Weights 1, 2, …, 2, 1 of that many columns, float64; an odd number has one peak.

    Source: ASMR masks/vds.py ``get_prior``.

    >>> triangular(6).tolist(), triangular(5).tolist()
    ([1.0, 2.0, 3.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 2.0, 1.0])
    """
    place = torch.arange(count, dtype=torch.float64)
    return torch.minimum(place, count - 1 - place) + 1.0


def density_mask(
    width: int, fraction: float, generator: torch.Generator, *, padding: Tensor | None = None
) -> Tensor:
    """One random mask ``(W,)`` that is denser in the middle; see `density_masks`."""
    fractions = torch.tensor([fraction], dtype=torch.float64)
    return density_masks(width, fractions, generator, padding=None if padding is None else padding[None])[0]


def density_masks(
    width: int, fractions: Tensor, generator: torch.Generator, *, padding: Tensor | None = None
) -> Tensor:
    """Random masks that are denser in the middle, one for each fraction.

    Of L columns that may be acquired, round(L·f) are: the round(L·f/2) in the middle, the rest drawn without
    replacement with triangular weights over those that remain. Halves are rounded to even, as Python does.

    Args:
        width: Columns.
        fractions: ``(B,)`` in [0, 1].
        generator: Source of randomness.
        padding: ``(B, W)`` bool, columns that are never acquired.

    Returns:
        ``(B, W)`` bool.

    Source: ASMR arms_module.py ``mask_kspace``, masks/vds.py.
    """
    batch = len(fractions)
    legal = torch.ones(batch, width, dtype=torch.bool) if padding is None else ~padding.cpu()
    shares = fractions.cpu().double()
    columns = legal.sum(dim=1).double()
    totals = torch.round(columns * shares).long()
    masks = torch.zeros_like(legal)
    for item, count in enumerate(torch.round(columns * shares / 2.0).long().tolist()):
        first, last = centre_block(width, count)
        masks[item, first:last] = True
    masks &= legal
    order = variable_density_order(legal & ~masks, generator)
    return apply_order(masks, order, (totals - masks.sum(dim=1)).clamp_min(0))


def training_masks(
    count: int,
    width: int,
    generator: torch.Generator,
    *,
    low: float = 0.05,
    high: float = 1.0,
    padding: Tensor | None = None,
) -> Tensor:
    """Random masks ``(count, W)`` to train reward models on: `density_masks` with f ~ U(low, high)."""
    if not 0.0 <= low <= high <= 1.0:
        raise ConfigError("sampling rates", why=f"{low} to {high}", do="rise within 0 to 1")
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    return density_masks(width, low + (high - low) * share, generator, padding=padding)


def validation_masks(
    ids: Sequence[str],
    width: int,
    *,
    accelerations: Sequence[float] = (1, 4, 8, 16),
    seed: int = 0,
    padding: Tensor | None = None,
) -> Tensor:
    """The same masks in every validation ``(N, W)``: each image by its name, accelerations in turn.

    Args:
        ids: Names of the images; the mask of one does not depend on the others, but for its turn.
        width: Columns.
        accelerations: All columns divided by the acquired ones; 1 is full sampling.
        seed: Of the masks.
        padding: ``(N, W)`` bool.
    """
    if not accelerations or min(accelerations) < 1:
        raise ConfigError("accelerations", why=f"{list(accelerations)}", do="numbers from 1 upwards")
    masks = [
        density_mask(
            width,
            1.0 / accelerations[number % len(accelerations)],
            torch_generator(seed, "kspace", "validation mask", name),
            padding=None if padding is None else padding[number],
        )
        for number, name in enumerate(ids)
    ]
    return torch.stack(masks) if masks else torch.zeros(0, width, dtype=torch.bool)


def low_to_high_order(free: Tensor, initial: int = 0) -> Tensor:
    """Columns outwards from the initial block, right and left in turn ``(B, W)``; -1 where none is left.

    With 4 initial columns of 64 it begins 34, 29, 35, 28; with none it begins at DC: 32, 33, 31.

    Args:
        free: ``(B, W)`` bool.
        initial: Columns of the initial block, whose middle is the middle of the order.
    """
    width = free.shape[-1]
    first, last = centre_block(width, initial)
    middle = (first + last - 1) / 2.0 if initial else float(width // 2)
    offset = torch.arange(width, dtype=torch.float64, device=free.device) - middle
    # Of two columns at one distance the right one comes first.
    key = (offset.abs() * 4.0 - (offset > 0).double()).expand(free.shape)
    return _by_key(key, free)


def random_order(free: Tensor, generator: torch.Generator) -> Tensor:
    """Free columns in random order ``(B, W)``; -1 where none is left."""
    return _by_key(torch.rand(free.shape, generator=generator, dtype=torch.float64).to(free.device), free)


def variable_density_order(free: Tensor, generator: torch.Generator) -> Tensor:
    """Free columns drawn one after the other with triangular weights over them ``(B, W)``; then -1.

    Every beginning of the order is a draw without replacement, as ``numpy.random.choice`` makes it.
    """
    rank = free.cpu().long().cumsum(dim=1).double() - 1.0
    count = free.cpu().sum(dim=1, keepdim=True).double()
    weight = (torch.minimum(rank, count - 1.0 - rank) + 1.0).clamp_min(1.0)
    # The smallest of exponential variables with these rates is a weighted draw; the next smallest, the next.
    clock = torch.empty(free.shape, dtype=torch.float64).exponential_(generator=generator) / weight
    return _by_key(clock.to(free.device), free)


def equispaced_columns(free: Tensor, budget: int) -> Tensor:
    """`budget` columns spread evenly over the free ones ``(B, budget)``, outer ones included; -1 beyond.

    The first and the last free column take part; for one column it is the first.

    Raises:
        ConfigError: `budget` is not positive.
    """
    if budget < 1:
        raise ConfigError("budget", why=f"{budget} columns")
    places = _by_key(torch.arange(free.shape[1], device=free.device).expand(free.shape), free)
    count = free.sum(dim=1, keepdim=True).double()
    taken = torch.minimum(count, torch.full_like(count, budget))
    number = torch.arange(budget, dtype=torch.float64, device=free.device)
    at = torch.round(number * (count - 1.0) / (taken - 1.0).clamp_min(1.0)).long()
    chosen = places.gather(1, at.clamp(0, free.shape[1] - 1))
    return torch.where(number < taken, chosen, -1)


def apply_order(mask: Tensor, order: Tensor, budget: int | Tensor) -> Tensor:
    """Add the first `budget` columns of an order to a mask; return a new mask.

    Args:
        mask: ``(B, W)`` bool.
        order: ``(B, n)`` int64; -1 is no column.
        budget: One number, or ``(B,)``.
    """
    limit = torch.as_tensor(budget, device=mask.device).reshape(-1, 1)
    taken = (torch.arange(order.shape[1], device=mask.device) < limit) & (order >= 0)
    # Column W takes what is not taken.
    wide = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
    wide.scatter_(1, torch.where(taken, order, mask.shape[1]), True)
    return wide[:, :-1].clone()


def _by_key(key: Tensor, free: Tensor) -> Tensor:
    """Free columns in rising order of a key, then -1."""
    order = torch.where(free, key.double(), torch.inf).argsort(dim=1, stable=True)
    number = torch.arange(free.shape[1], device=free.device)
    return torch.where(number < free.sum(dim=1, keepdim=True), order, -1)
