"""Each rank its own cases in every epoch; all get the same number, some cases twice where they do not divide.

For machines whose ranks each read from a disk of their own. On one machine the memory map makes it needless:
all ranks share the pages of all files.

Source: upstream dataset/fixed_subset_sampler.py, whose last rank gets fewer cases, or a negative number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from medrl.core.runtime import ResumableLoader

if TYPE_CHECKING:
    from collections.abc import Callable

    from medrl.core.runtime import Runtime

T = TypeVar("T")


def fixed_subset(items: Sequence[T], rank: int, world_size: int) -> tuple[T, ...]:
    """The cases of one rank: k = ceil(n/R) from position k·rank on, wrapping around.

    >>> [fixed_subset(range(10), rank, 4) for rank in range(4)]
    [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 0, 1)]
    """
    share = -(-len(items) // world_size)
    return tuple(items[(rank * share + offset) % len(items)] for offset in range(share))


def fixed_loader(
    rt: Runtime,
    samples: TorchDataset[Any],
    count: int,
    *,
    batch_size: int,
    name: str,
    collate: Callable[[list[Any]], Any] | None = None,
) -> ResumableLoader[Any]:
    """A shuffled loader of this rank's fixed subset of `count` samples.

    Register it in the checkpoint: ``rt.checkpoint.register(batches=loader)``; its position is the same on
    every rank. The order within the subset is new in each epoch.
    """
    own = fixed_subset(range(count), rt.rank, rt.world_size)
    train = rt.job.config.train
    return ResumableLoader(
        Subset(samples, own),
        batch_size=batch_size,
        shuffle=True,
        seed=int(train.seed),
        collate=collate,
        workers=int(train.workers),
        timeout_s=float(train.timeout_s),
        pin_memory=rt.device.type == "cuda",
        name=f"{name} of rank {rt.rank}",
    )
