"""Surface distances beside MONAI's: CPU seconds on one thread and equality of the values.

OMP_NUM_THREADS=1 python benchmarks/surface_distance.py
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

SPACING = (0.8, 0.8, 2.0)


def ball(size: int, shift: int, radius: float) -> NDArray[np.bool_]:
    """Return a ball in a cube of `size` voxels, moved by `shift`."""
    grid = np.ogrid[:size, :size, :size]
    centres = (size // 2 - shift, size // 2 - 2 * shift, size // 2)
    return np.asarray(sum((axis - at) ** 2 for axis, at in zip(grid, centres, strict=True)) <= radius**2)


def cases() -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Return pairs of masks from easy to awkward."""
    rng = np.random.default_rng(0)
    far = np.zeros((160, 160, 160), dtype=bool)
    other = far.copy()
    far[5:30, 5:30, 5:30] = True
    other[130:155, 130:155, 130:155] = True
    noise = rng.random((64, 64, 64)) < 0.3
    return {
        "balls, radius 20": (ball(64, 1, 18), ball(64, 0, 20)),
        "balls, radius 45": (ball(128, 1, 43), ball(128, 0, 45)),
        "balls, radius 90": (ball(200, 1, 88), ball(200, 0, 90)),
        "two cubes far apart": (far, other),
        "noise, 30 % of 64³": (noise, rng.random((64, 64, 64)) < 0.3),
    }


def main() -> None:
    """Print the table."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    from medrl.core.metrics import hd95, nsd

    torch.set_num_threads(1)
    print(f"{'':24s} {'HD95, CPU seconds':>26s}   {'NSD, CPU seconds':>26s}   largest difference")
    print(f"{'':24s} {'medrl':>9s}{'MONAI':>9s}{'ratio':>8s}   {'medrl':>9s}{'MONAI':>9s}{'ratio':>8s}")
    for name, (pred, ref) in cases().items():
        a, b = (torch.from_numpy(mask)[None, None].float() for mask in (pred, ref))
        options = {"include_background": True, "spacing": SPACING}
        pairs = {
            "hd95": (
                lambda pred=pred, ref=ref: hd95(pred, ref, SPACING),
                lambda a=a, b=b, options=options: compute_hausdorff_distance(
                    a, b, percentile=95, **options
                ).item(),
            ),
            "nsd": (
                lambda pred=pred, ref=ref: nsd(pred, ref, SPACING),
                lambda a=a, b=b, options=options: compute_surface_dice(
                    a, b, [1.0], use_subvoxels=True, **options
                ).item(),
            ),
        }
        line, worst = f"{name:24s} ", 0.0
        for ours, theirs in pairs.values():
            seconds, values = [], []
            for call in (ours, theirs):
                call()
                start = time.process_time()
                values.append(call())
                seconds.append(time.process_time() - start)
            worst = max(worst, abs(values[0] - values[1]))
            line += f"{seconds[0]:9.3f}{seconds[1]:9.3f}{seconds[0] / seconds[1]:8.2f}   "
        print(line + f"{worst:.1e}")


if __name__ == "__main__":
    main()
