"""A moving picture of a sequence with the outlines of its labels."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.volume.write import write_bytes

from .io import EchoSequence, scaled

COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66))
"""Colours that people with colour-vision deficiency tell apart (Okabe and Ito 2008)."""
FRAMES_A_SECOND = 10.0
LEAST_SIDE = 160
"""Pixels of the shorter side; smaller frames are enlarged by a whole number."""


def draw_frames(
    sequence: EchoSequence, labels: NDArray[np.uint8], names: Mapping[str, int]
) -> NDArray[np.uint8]:
    """Draw `(T, Y, X, 3)`: x to the right, y down, square pixels, outlines of each label in its colour.

    Small frames are enlarged to a shorter side of at least `LEAST_SIDE`.
    """
    from scipy import ndimage

    images = np.round(scaled(sequence.frames) * 255).astype(np.uint8)
    values = [value for value in names.values() if value != 0]
    pictures = np.repeat(np.transpose(images, (2, 1, 0))[..., np.newaxis], 3, axis=-1)
    for t in range(images.shape[-1]):
        for number, value in enumerate(values):
            mask = value == labels[..., t].T
            edge = mask & ~ndimage.binary_erosion(mask)
            pictures[t][edge] = COLOURS[number % len(COLOURS)]
    square = _square(pictures, sequence.spacing_mm)
    times = -(-LEAST_SIDE // min(square.shape[1:3]))
    return square.repeat(times, axis=1).repeat(times, axis=2) if times > 1 else square


def write_movie(
    path: Path, sequence: EchoSequence, labels: NDArray[np.uint8], names: Mapping[str, int], *, kind: str
) -> None:
    """Write a GIF, or an MP4 where there is ffmpeg.

    Ten frames a second, or the rate of the file where it is slower.

    Raises:
        ConfigError: ffmpeg is not installed.
        RuntimeFault: It failed, or the file cannot be written.
    """
    pictures = draw_frames(sequence, labels, names)
    rate = FRAMES_A_SECOND
    if sequence.frame_time_s is not None:
        rate = min(rate, 1.0 / sequence.frame_time_s)
    content = _gif(pictures, rate) if kind == "gif" else _mp4(pictures, rate)
    write_bytes(path, content, suffix=f".{kind}")


def require_ffmpeg() -> str:
    """Return the path of ffmpeg: that of this machine, or that of the extra `video`.

    Raises:
        ConfigError: It is not installed.
    """
    found = shutil.which("ffmpeg")
    if found is not None:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return str(get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:  # RuntimeError: the package came without its program
        raise ConfigError(
            "--mp4",
            why="the program ffmpeg is not installed",
            do="pip install 'medrl[video]', which brings it, or use --gif",
        ) from error


def _gif(pictures: NDArray[np.uint8], rate: float) -> bytes:
    from PIL import Image

    frames = [Image.fromarray(picture).quantize(64) for picture in pictures]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=max(round(1000.0 / rate), 20),
        loop=0,
    )
    return buffer.getvalue()


def _mp4(pictures: NDArray[np.uint8], rate: float) -> bytes:
    """Encode with ffmpeg; sides are cut to even numbers, which most players need."""
    import tempfile

    program = require_ffmpeg()
    height, width = (size - size % 2 for size in pictures.shape[1:3])
    frames = np.ascontiguousarray(pictures[:, :height, :width])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "movie.mp4"
        done = subprocess.run(  # noqa: S603 - a fixed program, and numbers
            [
                program, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
                "-r", f"{rate:g}", "-i", "-", "-pix_fmt", "yuv420p", str(target),
            ],
            input=frames.tobytes(),
            capture_output=True,
            check=False,
        )  # fmt: skip
        if done.returncode != 0 or not target.is_file():
            raise RuntimeFault(
                "ffmpeg failed", why=done.stderr.decode(errors="replace")[:300], do="use --gif"
            )
        return target.read_bytes()


def _square(pictures: NDArray[np.uint8], spacing_mm: tuple[float, float]) -> NDArray[np.uint8]:
    """Repeat rows or columns so that pixels are square."""
    small = min(spacing_mm)
    for axis, spacing in ((2, spacing_mm[0]), (1, spacing_mm[1])):
        count = pictures.shape[axis]
        wanted = max(1, round(count * spacing / small))
        if wanted != count:
            pictures = pictures.take(np.arange(wanted) * count // wanted, axis=axis)
    return pictures
