"""A data loader whose position can be saved: the same batches after a resume as without the interruption."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sized
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from medrl.core import rng
from medrl.core.errors import MedrlError, RuntimeFault

T = TypeVar("T")
Key = tuple[int, int]


class ResumableLoader(Generic[T]):
    """Endless batches of one rank's share of a map-style dataset.

    ``next(loader)`` gives the next batch and starts a new epoch by itself; `epoch` gives one pass from the
    beginning, for validation. Every epoch has an order of its own, derived from seed and epoch number. Each
    sample is made with random streams derived from seed, epoch and position: augmentation is the same with
    any number of workers, in a resumed run and after any history of other draws.

    All ranks get the same number of batches of the same sizes. Where samples do not divide evenly, the first
    ones of the epoch's order are taken again; with `drop_last` the incomplete batch is left out.
    `Runtime.gather` collapses the repetitions by case identifier.

    Args:
        dataset: ``__len__`` and ``__getitem__``.
        batch_size: Samples of one rank in a batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        collate: Callable[[list[Any]], T] | None = None,
        drop_last: bool = False,
        workers: int = 0,
        timeout_s: float = 0.0,
        pin_memory: bool = False,
        name: str = "loader",
    ) -> None:
        if not isinstance(dataset, Sized):
            raise RuntimeFault(f"the dataset of '{name}' has no length", do="give it __len__ and __getitem__")
        self.dataset = dataset
        self.size = len(dataset)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.workers = workers
        self.timeout_s = timeout_s
        self.name = name
        self._collate = _Collate(collate or default_collate)
        self._pin_memory = pin_memory
        self._done = 0
        self._order: tuple[int, list[int]] = (-1, [])
        self._endless: Iterator[Any] | None = None
        if self.size == 0 or len(self) == 0:
            raise RuntimeFault(
                f"the dataset of '{name}' gives no batch",
                why=f"{self.size} samples, {world_size} rank(s), batches of {batch_size}",
                do="choose a smaller train.batch_size, or check the split",
            )

    def __len__(self) -> int:
        """Batches of one rank in one epoch."""
        full, rest = divmod(self.size, self.batch_size * self.world_size)
        return full + (0 if self.drop_last or not rest else 1)

    def __iter__(self) -> ResumableLoader[T]:
        return self

    def __next__(self) -> T:
        if self._endless is None:
            self._endless = iter(self._loader(_Batches(self, self._done, endless=True), f"{self.name}"))
        batch = self._fetch(self._endless)
        self._done += 1
        return batch

    def epoch(self, number: int = 0) -> Iterator[T]:
        """Yield the batches of one pass from its beginning; the saved position does not move."""
        batches = iter(self._loader(_Batches(self, number * len(self), endless=False), f"{self.name} epoch"))
        for _ in range(len(self)):
            yield self._fetch(batches)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and batch within it that come next."""
        return divmod(self._done, len(self))

    def state_dict(self) -> dict[str, int]:
        """Return the position."""
        return {"done": self._done, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position; with another number of ranks, to the same part of the epoch."""
        done, batches = int(state["done"]), int(state["batches"])
        epoch, inside = divmod(done, batches)
        self._done = done if batches == len(self) else epoch * len(self) + inside * len(self) // batches
        self.close()

    def close(self) -> None:
        """End the worker processes; the next batch starts new ones at the same position."""
        workers, self._endless = self._endless, None
        shut_down: Callable[[], None] | None = getattr(workers, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def order(self, epoch: int) -> list[int]:
        """Return the order of all samples in an epoch, the same on every rank."""
        if self._order[0] != epoch:
            if self.shuffle:
                generator = rng.torch_generator(self.seed, self.name, "order", epoch)
                self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
            else:
                self._order = epoch, list(range(self.size))
        return self._order[1]

    def batch(self, number: int) -> list[Key]:
        """Return ``(sample, seed)`` of this rank's batch; `number` counts from the start of training."""
        epoch, inside = divmod(number, len(self))
        order = self.order(epoch)
        width = self.batch_size * self.world_size
        start = inside * width
        count = min(width, self.size - start)
        share = -(-count // self.world_size)
        places = [start + self.rank * share + offset for offset in range(share)]
        return [
            (order[place % self.size], rng.derive_seed(self.seed, self.name, epoch, place))
            for place in places
        ]

    # -- private -----------------------------------------------------------------------------------

    def _loader(self, batches: _Batches, name: str) -> DataLoader[Any]:
        return DataLoader(
            _Seeded(self.dataset),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=self._collate,
            pin_memory=self._pin_memory,
            timeout=self.timeout_s if self.workers else 0,
            worker_init_fn=_start_worker if self.workers else None,
            generator=rng.torch_generator(self.seed, name, "workers", self.rank),
        )

    def _fetch(self, batches: Iterator[Any]) -> T:
        try:
            batch = next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            fault = worker_fault(error) if self.workers else None
            if fault is None:
                raise
            raise fault from error
        if isinstance(batch, _Failure):
            raise batch.error
        result: T = batch
        return result


def worker_fault(error: BaseException) -> RuntimeFault | None:
    """Return the handled error where a worker died or gave nothing in time, else None.

    A death shows as torch's own message, or as a connection that breaks off while a batch is handed over.
    """
    text = str(error)
    dead = "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text)
    if dead or (isinstance(error, (ConnectionError, EOFError)) and "Caught" not in text):
        return RuntimeFault(
            "a data-loading worker died",
            why=_first_line(error),
            do="--workers 0 shows the case; if memory or /dev/shm ran out, fewer workers or smaller patches",
        )
    if "DataLoader timed out" in text:
        return RuntimeFault(
            "the data-loading workers gave no batch in time",
            why=_first_line(error),
            do="--workers 0 shows the case; train.timeout_s sets the limit",
        )
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Batches:
    """Batches of ``(sample, seed)`` keys from a position on."""

    def __init__(self, loader: ResumableLoader[Any], start: int, *, endless: bool) -> None:
        self._loader = weakref.proxy(
            loader
        )  # a cycle would delay the end of the workers until garbage collection
        self._start = start
        self._end = None if endless else start + len(loader)

    def __iter__(self) -> Iterator[list[Key]]:
        number = self._start
        while self._end is None or number < self._end:
            yield self._loader.batch(number)
            number += 1


class _Failure:
    """A handled error on its way from a worker: torch would rebuild it from its text alone."""

    def __init__(self, error: MedrlError) -> None:
        self.error = error


class _Seeded(Dataset[Any]):
    """Makes each sample with random streams of its own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> Any:
        index, seed = key
        with rng.isolated(seed):
            try:
                return self.dataset[index]
            except MedrlError as error:
                return _Failure(error)


class _Collate:
    """Collates, unless a sample failed."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
        return self.collate(samples)


def _start_worker(_number: int) -> None:
    """Let the main process answer signals: a worker ignores SIGINT, and obeys only the second SIGTERM.

    Schedulers signal every process. The first SIGTERM is theirs; the main process finishes its step, saves,
    and ends its workers with another one if they do not end by themselves.
    """
    torch.set_num_threads(1)
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle)
