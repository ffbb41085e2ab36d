"""Sliding-window inference beside MONAI's on the same network, volume and windows.

Prints CPU seconds on one thread (the smallest of several alternating runs in one process) and the peak
resident memory above the level before the call (each in a process of its own, because the peak of a
process never falls). A ratio below 1 means that medrl needs less.

    OMP_NUM_THREADS=1 python benchmarks/sliding_window.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

CASES: dict[str, tuple[tuple[int, int, int], int, str, float]] = {
    # volume (D, H, W), classes, network, overlap; the patch is 64³
    "U-Net, 2 classes": ((96, 128, 128), 2, "unet", 0.5),
    "one convolution, 2 classes": ((160, 224, 224), 2, "conv", 0.5),
    "one convolution, 8 classes": ((160, 224, 224), 8, "conv", 0.5),
    "one convolution, overlap 0.75": ((96, 128, 128), 2, "conv", 0.75),
    "nothing but blending, 2 classes": ((160, 224, 224), 2, "none", 0.5),
}
PATCH = (64, 64, 64)


def network(kind: str, classes: int):  # noqa: ANN201
    """Return a network in evaluation mode."""
    import torch

    torch.manual_seed(0)
    if kind == "unet":
        from monai.networks.nets import UNet

        return UNet(3, 1, classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=1).eval()
    if kind == "conv":
        return torch.nn.Conv3d(1, classes, 3, padding=1).eval()
    return lambda windows: windows.expand(-1, classes, -1, -1, -1).clone()


def call(library: str, kind: str, classes: int, overlap: float, volume):  # noqa: ANN001, ANN201
    """Run one inference without gradient."""
    import torch

    net = network(kind, classes)
    with torch.no_grad():
        if library == "medrl":
            from medrl.core.inference import sliding_window

            return sliding_window(net, volume, PATCH, overlap=overlap, batch=1)
        from monai.inferers import sliding_window_inference

        return sliding_window_inference(volume, PATCH, 1, net, overlap=overlap, mode="gaussian")


def peak_mib(library: str, name: str) -> float:
    """Return how far the peak memory rises during one call, in MiB, measured in this process."""
    import torch

    torch.set_num_threads(1)
    size, classes, kind, overlap = CASES[name]
    call(library, kind, classes, overlap, torch.zeros(1, 1, 64, 64, 80))  # imports and buffers first
    volume = torch.randn(1, 1, *size)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the present level
    before = _status("VmRSS")
    call(library, kind, classes, overlap, volume)
    return (_status("VmHWM") - before) / 1024


def cpu_seconds(name: str, repeats: int = 7) -> dict[str, float]:
    """Return the CPU seconds of both libraries, alternating."""
    import torch

    torch.set_num_threads(1)
    size, classes, kind, overlap = CASES[name]
    volume = torch.randn(1, 1, *size)
    best = {"medrl": float("inf"), "monai": float("inf")}
    for library in best:
        call(library, kind, classes, overlap, volume[..., :64, :64, :80])
    for _ in range(repeats):
        for library in best:
            start = time.process_time()
            call(library, kind, classes, overlap, volume)
            best[library] = min(best[library], time.process_time() - start)
    return best


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def _child(*arguments: str) -> object:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        print(json.dumps(peak_mib(*sys.argv[1:])))
        return
    print(f"{'':34s} {'CPU seconds':>24s}   {'peak memory, MiB':>24s}")
    print(f"{'':34s} {'medrl':>8s}{'MONAI':>8s}{'ratio':>8s}   {'medrl':>8s}{'MONAI':>8s}{'ratio':>8s}")
    for name in CASES:
        seconds = cpu_seconds(name)
        peak = {library: float(str(_child(library, name))) for library in ("medrl", "monai")}
        print(
            f"{name:34s} {seconds['medrl']:8.2f}{seconds['monai']:8.2f}"
            f"{seconds['medrl'] / seconds['monai']:8.2f}   "
            f"{peak['medrl']:8.0f}{peak['monai']:8.0f}{peak['medrl'] / peak['monai']:8.2f}"
        )


if __name__ == "__main__":
    main()
