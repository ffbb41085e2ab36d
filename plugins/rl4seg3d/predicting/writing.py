"""Probabilities of a sequence as one file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import RuntimeFault
from medrl.core.volume.write import write_bytes

from ..io import EchoSequence, to_grid


def write_probabilities(path: Path, probabilities: NDArray[np.float32], sequence: EchoSequence) -> None:
    """Write `(K, X, Y, T)` as ``probabilities`` of an ``.npz``, with the axes of the file and its affine.

    Raises:
        RuntimeFault: It could not be written, or does not read back equal.
    """
    array = np.stack([to_grid(one, sequence) for one in probabilities])
    array = array[:, 0] if array.shape[1] == 1 else array
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probabilities=array, affine=sequence.volume.affine)

    def verify(written: Path) -> None:
        with np.load(written, allow_pickle=False) as found:
            same = np.array_equal(found["probabilities"], array)
        if not same:
            raise RuntimeFault(f"{path} does not read back as it was written", do="check the disk")

    write_bytes(path, buffer.getvalue(), suffix=".npz", verify=verify)
