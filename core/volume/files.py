"""Reading a whole file, up to a limit."""

from __future__ import annotations

from pathlib import Path

from medrl.core.errors import DataError


def read_limited(path: Path, limit: int) -> bytes:
    """Return the bytes of a file of at most `limit` bytes; compressed voxels never take more than plain ones.

    Raises:
        DataError: The file is larger; nothing was read.
    """
    size = path.stat().st_size
    if size > limit:
        raise DataError(
            str(path),
            why=f"a file of {size / 2**30:.1f} GiB; the limit is {limit / 2**30:.1f} GiB of voxels",
            do="crop or resample the image",
        )
    return path.read_bytes()
