"""Speed of the scores of spars, in CPU-seconds of one thread.

Measures windows a CPU-second: the compact network at 256 × 256 × 180 with windows of 48 × 48 × 24, all at
once and window by window; the same at 64 × 64 × 48; the fraction head, from whose dense map all windows
follow; the way of the original, where every window is enlarged to 256 × 256 × 180 for its network; and the
forward of that network as it is, fused, and fused in bfloat16. Weights are random; only time is measured::

    python benchmarks/spars_scoring.py
    python benchmarks/spars_scoring.py --only large,faithful --json scoring.json
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from medrl.plugins.spars.boxsum import integral, lattice_means
from medrl.plugins.spars.lattice import Lattice
from medrl.plugins.spars.mil.maps import CellNetwork, ClusterMap
from medrl.plugins.spars.models import CompactNet, FaithfulNet, FusedFaithfulNet
from medrl.plugins.spars.scoring import CompactScorer, FaithfulScorer, FractionScorer

LARGE, SMALL = (256, 256, 180), (64, 64, 48)
WINDOWS = {LARGE: (48, 48, 24), SMALL: (16, 16, 8)}
STRIDE = (4, 4, 4)


def seconds(work: Callable[[], Any], *, rounds: int = 3, warm: bool = True) -> float:
    """Median CPU-seconds of some work."""
    if warm:
        work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def volume_of(shape: tuple[int, int, int]) -> Tensor:
    """Random voxels."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def corners_of(shape: tuple[int, int, int], count: int) -> Tensor:
    """Random corners on the lattice."""
    window, source = WINDOWS[shape], torch.Generator().manual_seed(1)
    free = [(size - part) // 4 + 1 for size, part in zip(shape, window, strict=True)]
    return 4 * torch.stack([torch.randint(n, (count,), generator=source) for n in free], dim=1)


def compact(shape: tuple[int, int, int], count: int, batches: Sequence[int]) -> dict[str, Any]:
    """All windows at once beside window by window, for the compact network."""
    torch.manual_seed(0)
    scorer = CompactScorer(CompactNet()).eval()
    volume, window = volume_of(shape), WINDOWS[shape]
    windows = scorer.lattice(volume, window, STRIDE).numel()
    dense = seconds(lambda: scorer.lattice(volume, window, STRIDE), warm=False)
    found = {"windows": windows, "dense_cpu_s": dense, "dense_per_cpu_s": windows / dense}
    corners = corners_of(shape, count)
    for batch in batches:
        scorer.batch = batch
        spent = seconds(lambda: scorer.windows(volume, corners, window))
        found[f"by_window_{batch}_per_cpu_s"] = count / spent
    best = max(value for name, value in found.items() if name.startswith("by_window"))
    found["ratio"] = found["dense_per_cpu_s"] / best
    return found


def fraction(shape: tuple[int, int, int]) -> dict[str, Any]:
    """All windows from the dense map of the fraction head, clusters and gate included."""
    torch.manual_seed(0)
    presence = ClusterMap(3, 320)
    presence.centres.normal_()
    scorer = FractionScorer(CellNetwork(), presence)
    scorer.level.fill_(0.5)
    volume, window = volume_of(shape), WINDOWS[shape]
    lattice = Lattice.of(shape, window, STRIDE, "centre")

    def work() -> Tensor:
        return lattice_means(integral(scorer.dense(volume)), lattice)

    spent = seconds(work, rounds=1, warm=False)
    windows = work().numel()
    return {"windows": windows, "dense_cpu_s": spent, "dense_per_cpu_s": windows / spent}


def original(count: int = 2) -> dict[str, Any]:
    """Windows one by one through the network of the original, each enlarged, without any fusing."""
    torch.manual_seed(0)
    network = FaithfulNet().eval()
    scorer = FaithfulScorer(network)
    volume, window = volume_of(LARGE), WINDOWS[LARGE]
    corners = corners_of(LARGE, count)

    def plain() -> None:
        with torch.no_grad():
            for corner in corners:
                scorer.window_logits(volume, corner[None], window)

    spent = seconds(plain, rounds=1, warm=False)
    fast = seconds(lambda: scorer.windows(volume, corners, window), rounds=1, warm=False)
    return {"per_cpu_s": count / spent, "fused_per_cpu_s": count / fast, "ratio": spent / fast}


def faithful(rounds: int = 3) -> dict[str, Any]:
    """Forward of the original network: plain, fused, fused in bfloat16."""
    torch.manual_seed(0)
    network = FaithfulNet().eval()
    images = volume_of(LARGE)[None, None]
    fused, half = FusedFaithfulNet(network), FusedFaithfulNet(network, torch.bfloat16)

    def plain() -> None:
        with torch.no_grad():
            network(images)

    found = {
        "plain_cpu_s": seconds(plain, rounds=rounds),
        "fused_cpu_s": seconds(lambda: fused(images), rounds=rounds),
        "bf16_cpu_s": seconds(lambda: half(images), rounds=rounds),
    }
    found["ratio"] = found["plain_cpu_s"] / found["fused_cpu_s"]
    found["ratio_bf16"] = found["plain_cpu_s"] / found["bf16_cpu_s"]
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "large": lambda: compact(LARGE, 32, (1, 8)),
    "small": lambda: compact(SMALL, 256, (1, 16, 64)),
    "fraction_large": lambda: fraction(LARGE),
    "fraction_small": lambda: fraction(SMALL),
    "original": original,
    "faithful": faithful,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--json", type=Path, help="also write the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"no part {name}; there are {', '.join(PARTS)}")
        found[name] = PARTS[name]()
        print(name, " ".join(f"{key}={value:.4g}" for key, value in found[name].items()), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB; torch {torch.__version__}, {torch.get_num_threads()} thread")
    if options.json is not None:
        options.json.write_text(json.dumps({**found, "peak_gib": peak}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
