"""Verdicts on label maps: single maps, stacks of frames, batches, and the part of a batch that is valid."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError, RuntimeFault

from .label_map import LabelMap
from .measures import measure, passes
from .rules import Rules

if TYPE_CHECKING:
    from torch import Tensor

    Mask: TypeAlias = NDArray[Any] | Tensor
    Masks: TypeAlias = NDArray[Any] | Tensor | Sequence[NDArray[Any] | Tensor]

T = TypeVar("T")
CHUNKS_A_WORKER = 4


@dataclass(frozen=True)
class Report:
    """The verdict on one label map.

    Attributes:
        valid: Whether every rule passed.
        values: Measured value of each rule, in the order of the rules; NaN where nothing could be measured.
        failed: Names of the rules that did not pass.
    """

    valid: bool
    values: Mapping[str, float]
    failed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; NaN becomes None."""
        values = {name: None if math.isnan(value) else value for name, value in self.values.items()}
        return {"valid": self.valid, "failed": list(self.failed), "values": values}


def check(mask: Mask, rules: Rules, spacing: Sequence[float] | None = None) -> Report:
    """Measure every rule on one label map.

    Args:
        mask: `(X, Y)` whole numbers of any type, on any device; further axes of length 1 are dropped.
        rules: From `load_rules`.
        spacing: `(2,)` pixel size in mm along X and Y; only areas in mm² need it.

    Returns:
        A verdict for every map, also for empty ones.

    Raises:
        DataError: This is no two-dimensional label map, or it holds values that the rules refuse.
        ConfigError: A rule needs the spacing and none is given.
    """
    labels = _label_map(mask, rules, spacing)
    values = {rule.name: measure(labels, rule) for rule in rules.rules}
    failed = tuple(rule.name for rule in rules.rules if not rule.passes(values[rule.name]))
    return Report(valid=not failed, values=values, failed=failed)


def is_valid(mask: Mask, rules: Rules, spacing: Sequence[float] | None = None) -> bool:
    """Return `check(...).valid` faster: it ends at the first rule that fails, the quick ones first."""
    labels = _label_map(mask, rules, spacing)
    return all(passes(labels, rule) for rule in rules.cheapest_first())


def check_stack(
    mask: Mask, rules: Rules, axis: int = -1, spacing: Sequence[float] | None = None
) -> list[Report]:
    """Check each frame of a stack, such as `(X, Y, T)` with `axis` -1.

    Args:
        mask: Three axes or more; after one index along `axis`, axes of length 1 are dropped.
        rules: From `load_rules`.
        axis: Axis of the frames.
        spacing: `(2,)` pixel size in mm along the two axes of a frame.

    Raises:
        DataError: The frames are not two-dimensional.
    """
    stack = _array(mask)
    if stack.ndim < 3:
        raise DataError("the stack", why=f"has shape {stack.shape}, expected frames of two dimensions")
    return [check(frame, rules, spacing) for frame in np.moveaxis(stack, axis, 0)]


def check_batch(
    masks: Masks,
    rules: Rules,
    workers: int | Executor = 0,
    spacing: Sequence[float] | None = None,
) -> list[Report]:
    """Check many label maps.

    Args:
        masks: `(N, X, Y)`, or a sequence of maps that may differ in size.
        rules: From `load_rules`.
        workers: Processes; they are started for this call, which pays from about a thousand maps. A pool of
            `worker_pool` that is kept is used as it is. 0 works in this process.
        spacing: `(2,)` pixel size in mm along X and Y, common to all.

    Returns:
        One report for each map, in their order.
    """
    return _spread(partial(_check_all, rules=rules, spacing=spacing), _arrays(masks), workers)


def validity_rate(
    masks: Masks,
    rules: Rules,
    workers: int | Executor = 0,
    spacing: Sequence[float] | None = None,
) -> float:
    """Return the part of the label maps that is valid; NaN for none. Arguments as in `check_batch`."""
    verdicts = _spread(partial(_valid_all, rules=rules, spacing=spacing), _arrays(masks), workers)
    return sum(verdicts) / len(verdicts) if verdicts else math.nan


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Start processes that `check_batch` and `validity_rate` can use again and again.

    Raises:
        RuntimeFault: One of them died.
    """
    # spawn: a forked copy of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise RuntimeFault(
            "a process that checks label maps died",
            why="the system ended it, or it could not start",
            do='use fewer workers, or 0; a script that uses workers needs `if __name__ == "__main__":`',
        ) from error


def _spread(
    work: Callable[[Sequence[NDArray[Any]]], list[T]],
    masks: Sequence[NDArray[Any]],
    workers: int | Executor,
) -> list[T]:
    """Do the work on all masks, here or by processes, in order."""
    if isinstance(workers, Executor):
        count = getattr(workers, "_max_workers", 1)
        size = max(1, math.ceil(len(masks) / (CHUNKS_A_WORKER * count)))
        chunks = [masks[start : start + size] for start in range(0, len(masks), size)]
        return [item for done in workers.map(work, chunks) for item in done]
    if workers <= 0 or len(masks) < 2:
        return work(masks)
    with worker_pool(min(workers, len(masks))) as pool:
        return _spread(work, masks, pool)


def _check_all(masks: Sequence[NDArray[Any]], rules: Rules, spacing: Sequence[float] | None) -> list[Report]:
    return [check(mask, rules, spacing) for mask in masks]


def _valid_all(masks: Sequence[NDArray[Any]], rules: Rules, spacing: Sequence[float] | None) -> list[bool]:
    return [is_valid(mask, rules, spacing) for mask in masks]


def _array(mask: Mask) -> NDArray[Any]:
    """Return a NumPy array of an array or tensor; a tensor's memory is shared where it is on the CPU."""
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu().numpy()
    return np.asarray(mask)


def _arrays(masks: Masks) -> list[NDArray[Any]]:
    """Return one array a mask; a tensor of many leaves its device at once."""
    if isinstance(masks, Sequence):
        return [_array(mask) for mask in masks]
    return list(_array(masks))


def _label_map(mask: Mask, rules: Rules, spacing: Sequence[float] | None) -> LabelMap:
    array = _plane(_array(mask))
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    elif array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # NaN and infinite values differ from whatever they become
            whole = array.astype(np.int64)
        if not np.array_equal(whole, array):
            raise DataError("the label map", why="holds values that are not whole numbers")
        array = whole
    elif array.dtype.kind not in "iu":
        raise DataError("the label map", why=f"holds {array.dtype}, expected whole numbers")
    size = None if spacing is None else (float(spacing[0]), float(spacing[1]))
    return LabelMap(array, rules, size)


def _plane(array: NDArray[Any]) -> NDArray[Any]:
    """Drop axes of length 1, the last ones first, until two axes are left."""
    shape = list(array.shape)
    for axis in reversed(range(array.ndim)):
        if len(shape) > 2 and shape[axis] == 1:
            del shape[axis]
    if len(shape) != 2:
        raise DataError("the label map", why=f"has shape {array.shape}, expected two dimensions")
    return array.reshape(shape)
