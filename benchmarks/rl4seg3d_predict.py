"""Speed and memory of `medrl predict rl4seg3d --tta`.

    python benchmarks/rl4seg3d_predict.py beside [--size 256] [--frames 24] [--precision bf16]
    python benchmarks/rl4seg3d_predict.py growth [--size 128] [--base 8] [--frames 8,32,128]

`beside` compares with the plain way: 25 passes over the whole volume in fp32, every window of the padded
sequence, the probabilities of every view kept until the mean is taken. An untrained network tosses a coin in
many voxels, so both ways use one that is first fitted for a few steps to the regions of the phantom. `growth`
predicts sequences of growing length. Each measurement has a process of its own; memory is its largest
resident
set.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medrl.plugins.rl4seg3d.models import UNet3d
from medrl.plugins.rl4seg3d.predicting import Segmenter
from medrl.plugins.rl4seg3d.tta import views
from medrl.plugins.rl4seg3d.windows import plan_time, weight_map, window_starts

CPU = torch.device("cpu")


def sequence(size: int, frames: int) -> Tensor:
    """A beating ring in speckle `(X, Y, T)`."""
    noise = torch.rand(size, size, frames, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-1, 1, size)[:, None, None]
    y = torch.linspace(-1, 1, size)[None, :, None]
    beat = 0.1 * torch.cos(2 * torch.pi * torch.arange(frames) / 20)[None, None]
    radius = (x**2 + (y / 1.4) ** 2).sqrt()
    level = torch.where(radius < 0.35 + beat, 0.1, torch.where(radius < 0.55 + beat, 0.9, 0.4))
    return (level * (0.6 + 0.8 * noise)).clamp(0, 1)


def truth(size: int, frames: int) -> Tensor:
    """Labels of `sequence`."""
    x = torch.linspace(-1, 1, size)[:, None, None]
    y = torch.linspace(-1, 1, size)[None, :, None]
    beat = 0.1 * torch.cos(2 * torch.pi * torch.arange(frames) / 20)[None, None]
    radius = (x**2 + (y / 1.4) ** 2).sqrt()
    return torch.where(radius < 0.35 + beat, 1, torch.where(radius < 0.55 + beat, 2, 0))


def fit(path: Path, base: int, steps: int) -> None:
    """Fit a network for some steps on small windows and save it."""
    torch.manual_seed(0)
    network = UNet3d(base_filters=base)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=2e-3)
    images, labels = sequence(64, 4)[None, None], truth(64, 4)[None]
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), path)


def load(path: Path, base: int) -> UNet3d:
    """Load what `fit` saved."""
    network = UNet3d(base_filters=base)
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def plain_way(network: nn.Module, images: Tensor, limit: int) -> Tensor:
    """Every view over the whole padded volume in fp32, all kept."""
    plan = plan_time(images.shape[-1])
    padded = images[..., list(plan.frames)]
    weights = weight_map(*images.shape[:2])
    kept = []
    for view in views(*images.shape[:2])[:limit]:
        volume = view.apply(padded[None])
        total = torch.zeros(3, *padded.shape)
        count = torch.zeros(padded.shape)
        for start in window_starts(padded.shape[-1]):
            part = slice(start, start + 4)
            total[..., part] += weights * network(volume[None, ..., part])[0]
            count[..., part] += weights
        kept.append(view.invert((total / count).softmax(dim=0)))
    inner = slice(plan.first, plan.first + plan.length)
    return torch.stack(kept).mean(dim=0)[..., inner].argmax(dim=0).to(torch.uint8)


def streamed(network: nn.Module, images: Tensor, precision: str, limit: int) -> Tensor:
    """Our way."""
    from medrl.plugins.rl4seg3d.predicting import segmenting

    if limit < 25:
        segmenting.views = lambda width, height: views(width, height)[:limit]  # type: ignore[assignment]
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    dtype = torch.bfloat16 if precision == "bf16" else None
    labels = torch.zeros(images.shape, dtype=torch.uint8)
    for t, probabilities in Segmenter(device=CPU, dtype=dtype).probabilities(network, images, tta=limit > 1):
        labels[..., t] = torch.from_numpy(probabilities.argmax(axis=0))
    return labels


def one(options: argparse.Namespace) -> None:
    """One measurement, in this process; prints JSON."""
    torch.set_num_threads(options.threads)
    network = load(options.weights, options.base)
    images = sequence(options.size, int(options.frames))
    start, cpu = time.perf_counter(), time.process_time()
    if options.way == "plain":
        labels = plain_way(network, images, options.views)
    else:
        labels = streamed(network, images, options.precision, options.views)
    found: dict[str, Any] = {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    np.save(options.out, labels.numpy())
    print(json.dumps(found))


def measure(folder: Path, options: argparse.Namespace, way: str, frames: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    out = folder / f"{way}_{frames}.npy"
    command = [
        sys.executable, __file__, "one", "--way", way, "--weights", str(folder / "net.pt"), "--out", str(out),
        "--size", str(options.size), "--frames", str(frames), "--threads", str(options.threads),
        "--precision", options.precision, "--base", str(options.base), "--views", str(options.views),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "labels": np.load(out)}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["beside", "growth", "one"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", default="24")
    parser.add_argument("--base", type=int, default=32, help="filters of the first level")
    parser.add_argument("--views", type=int, default=25, help="fewer for a quick look")
    parser.add_argument("--steps", type=int, default=30, help="steps of fitting")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--way", choices=["plain", "ours"], default="ours")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "one":
        one(options)
        return
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fit(folder / "net.pt", options.base, options.steps)
        facts = f"{options.views} views, {options.threads} thread(s), base {options.base}"
        print(f"{options.size}² pixels, {facts}\n")
        print("| way | frames | CPU s | wall s | peak MB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        ways = ["plain", "ours"] if options.what == "beside" else ["ours"]
        found = []
        for frames in (int(word) for word in str(options.frames).split(",")):
            for way in ways:
                row = measure(folder, options, way, frames)
                found.append(row)
                name = way if way == "plain" else f"medrl, {options.precision}"
                print(f"| {name} | {frames} | {row['cpu']:.1f} | {row['wall']:.1f} | {row['peak_mb']:.0f} |")
        if options.what == "beside":
            plain, ours = found[:2]
            same = float((plain["labels"] == ours["labels"]).mean())
            print(f"\n{plain['cpu'] / ours['cpu']:.2f} times less CPU time, ", end="")
            print(f"{ours['peak_mb'] / plain['peak_mb']:.2f} of the memory, labels equal in {same:.4%}")


if __name__ == "__main__":
    main()
