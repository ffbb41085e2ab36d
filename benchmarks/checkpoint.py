"""Saving and loading a checkpoint: plain torch.save and torch.load beside the atomic, verified file of medrl.

Every arm writes the same tensors to the same folder. ``torch.save, fsync`` is plain torch with the one
system call that makes it survive a power cut. medrl hashes while it writes, writes to a temporary
file, syncs file and folder, and renames; it compares the digest before it loads. Rates are medians.

    python benchmarks/checkpoint.py [--megabytes 256] [--repeats 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from medrl.core.checkpoint import load_checkpoint, write_checkpoint


def tensors(megabytes: int) -> dict[str, Tensor]:
    """Random tensors like those of a network: many small, some large."""
    generator = torch.Generator().manual_seed(0)
    left, found = megabytes * 2**20 // 4, {}
    sizes = [64, 320, 1024, 65536, 2**20, 2**22]
    while left > 0:
        size = min(sizes[len(found) % len(sizes)], left)
        found[f"layer{len(found)}.weight"] = torch.randn(size, generator=generator)
        left -= size
    return found


def plain_save(path: Path, states: dict[str, Tensor], *, sync: bool) -> None:
    """torch.save onto the final name."""
    with path.open("wb") as file:
        torch.save({"states": {"model": states}}, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time of an action, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    states = tensors(options.megabytes)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        plain, synced, ours = (Path(scratch) / name for name in ("plain.pt", "synced.pt", "ours.pt"))
        rows = [
            (
                "torch.save, torch.load",
                seconds(lambda: plain_save(plain, states, sync=False), options.repeats),
                seconds(lambda: torch.load(plain, weights_only=True), options.repeats),
            ),
            (
                "torch.save, fsync; torch.load",
                seconds(lambda: plain_save(synced, states, sync=True), options.repeats),
                seconds(lambda: torch.load(synced, weights_only=True), options.repeats),
            ),
            (
                "medrl: atomic, verified",
                seconds(lambda: write_checkpoint(ours, {"model": states}, {"step": 1}), options.repeats),
                seconds(lambda: load_checkpoint(ours), options.repeats),
            ),
        ]
        for name, tensor in load_checkpoint(ours).states["model"].items():
            if not torch.equal(tensor, states[name]):
                raise SystemExit(f"{name} came back changed")
    print(f"{options.megabytes} MB in {len(states)} tensors, median of {options.repeats}\n")
    print("| arm | save, MB/s | against plain | load, MB/s | against plain |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, save, load in rows:
        print(
            f"| {name} | {options.megabytes / save:.0f} | {rows[0][1] / save:.2f} x "
            f"| {options.megabytes / load:.0f} | {rows[0][2] / load:.2f} x |"
        )


if __name__ == "__main__":
    main()
