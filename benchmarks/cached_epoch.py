"""An epoch of random patches: no cache, MONAI's PersistentDataset, and the memory-mapped cache of medrl.

Every arm runs in a process of its own with the same files, the same preparation (read, check, normalise), the
same patches and the same number of loader workers. From a mapped entry only the pages of a patch are read,
while PersistentDataset loads the whole volume for it; ``--whole`` compares without that advantage. Printed
are samples per second in the first epoch and in the median later one, and memory at the end of the last
epoch, summed over the main process and its workers: private (not shared with anyone) and proportional (PSS,
which counts mapped pages of the page cache; they are given back when memory runs short).

Private memory with ``--whole`` is mostly the heap of the workers, which glibc lets grow from epoch to epoch,
in every arm; with ``MALLOC_MMAP_THRESHOLD_=1048576`` in the environment it does not grow. Whole volumes in
two workers are dominated by their transfer to the main process; ``--workers 0`` shows the reading alone.

    python benchmarks/cached_epoch.py [--cases 16] [--shape 192 192 24] [--epochs 4] [--workers 2]
                                      [--repeats 3] [--whole]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medrl.core.cache import Cache, file_hash, make_key
from medrl.core.dataset import load_case, open_dataset
from medrl.core.phantoms.prostate import write_prostate

ARMS = ("uncached", "monai", "medrl")
PATCH = (16, 64, 64)
"""Z, Y, X of a patch."""


class Prepared(Dataset[Tensor]):
    """Cases read from their files and normalised, (C, Z, Y, X) float32 with the label as last channel."""

    def __init__(self, root: Path) -> None:
        self.dataset = open_dataset(root)

    def __len__(self) -> int:
        return len(self.dataset.cases)

    def __getitem__(self, index: int) -> Tensor:
        image, label = load_case(self.dataset, self.dataset.cases[index], with_label=True)
        if label is None:
            raise RuntimeError("the phantom has labels")
        mean = image.data.mean(axis=(1, 2, 3), keepdims=True)
        std = image.data.std(axis=(1, 2, 3), keepdims=True)
        both = np.concatenate([(image.data - mean) / std, label.data.astype(np.float32)])
        return torch.from_numpy(np.ascontiguousarray(both.transpose(0, 3, 2, 1), dtype=np.float32))


class Patches(Dataset[Tensor]):
    """Random patches of what another dataset gives."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        volume = self.source[index]
        starts = [
            int(torch.randint(max(1, size - part + 1), (1,)))
            for size, part in zip(volume.shape[1:], PATCH, strict=True)
        ]
        window = tuple(slice(start, start + part) for start, part in zip(starts, PATCH, strict=True))
        return torch.as_tensor(volume[(slice(None), *window)]).clone()


class Mapped(Dataset[Tensor]):
    """The prepared cases through the cache of medrl."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        self.prepared = prepared
        self.cache = Cache(folder)
        self.keys = [
            make_key(":".join(map(file_hash, [*case.images, case.label or case.images[0]])), {}, "1")
            for case in prepared.dataset.cases
        ]

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> Tensor:
        entry = self.cache.get_or_create(self.keys[index], lambda: {"volume": self.prepared[index]})
        return entry.tensor("volume")


class Whole(Patches):
    """Whole volumes."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.as_tensor(self.source[index]).clone()


def build(arm: str, root: Path, folder: Path, *, whole: bool) -> Dataset[Tensor]:
    """The dataset of one arm."""
    prepared = Prepared(root)
    wrap = Whole if whole else Patches
    if arm == "uncached":
        return wrap(prepared)
    if arm == "medrl":
        return wrap(Mapped(prepared, folder))
    from monai.data import PersistentDataset
    from monai.transforms import Transform

    class Prepare(Transform):
        """A MONAI Transform: what a plain function gives, PersistentDataset does not store."""

        def __call__(self, index: int) -> Tensor:
            return prepared[index]

    return wrap(PersistentDataset(range(len(prepared)), Prepare(), cache_dir=folder))


def memory() -> tuple[float, float]:
    """Private and proportional megabytes of this process and its workers."""
    private = proportional = 0.0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Private_Clean", "Private_Dirty"):
                private += int(rest.split()[0]) / 1024
            elif name == "Pss":
                proportional += int(rest.split()[0]) / 1024
    return private, proportional


def measure(
    arm: str, root: Path, folder: Path, epochs: int, workers: int, *, whole: bool
) -> dict[str, float]:
    """Run one arm in this process."""
    torch.manual_seed(0)
    dataset: Any = build(arm, root, folder, whole=whole)
    loader = DataLoader(
        dataset, batch_size=2, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    rates = []
    for _ in range(epochs):
        start = time.perf_counter()
        seen = sum(len(batch) for batch in loader)
        rates.append(seen / (time.perf_counter() - start))
    private, proportional = memory()
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    volumes = Prepared(root)
    wanted = sum(volumes[index].nbytes for index in range(len(volumes)))
    if arm != "uncached" and stored < wanted:
        raise SystemExit(
            f"{arm} stored {stored} of {wanted} bytes: it does not cache, nothing can be compared"
        )
    return {
        "first": rates[0],
        "later": statistics.median(rates[1:]),
        "private_mb": private,
        "pss_mb": proportional,
        "disk_mb": stored / 2**20,
    }


def main() -> None:
    """Write the data, run each arm in its own process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--shape", type=int, nargs=3, default=(192, 192, 24), metavar=("X", "Y", "Z"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="whole volumes instead of patches")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.arm:
        row = measure(
            options.arm, options.root, options.folder, options.epochs, options.workers, whole=options.whole
        )
        print(json.dumps(row))
        return
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first one fills the caches")
    with tempfile.TemporaryDirectory() as scratch:
        root = write_prostate(
            Path(scratch) / "data", cases=options.cases, test_cases=0, shape=tuple(options.shape)
        )
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for repeat in range(options.repeats):
            # Load and file system change while this runs; the order alternates so that no arm is always last.
            for arm in ARMS if repeat % 2 == 0 else reversed(ARMS):
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    runs[arm].append(run_arm(arm, root, Path(folder), options))
    sample = "whole volumes" if options.whole else f"patches {PATCH}"
    shape = " x ".join(map(str, options.shape))
    print(f"{options.cases} cases of 4 x {shape} float32, {options.workers} workers, {sample}")
    print(f"median of {options.repeats} repeats, ratios with their range\n")
    print("| arm | first epoch, /s | later, samples/s | against uncached | private MB | PSS MB | disk MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for arm, found in runs.items():
        row = {name: statistics.median(run[name] for run in found) for name in found[0]}
        print(
            f"| {arm} | {row['first']:.1f} | {row['later']:.1f} | {spread(found, runs['uncached'])} "
            f"| {row['private_mb']:.0f} | {row['pss_mb']:.0f} | {row['disk_mb']:.0f} |"
        )
    print(f"\nmedrl against MONAI, later epochs: {spread(runs['medrl'], runs['monai'])}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")


def run_arm(arm: str, root: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run one arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--root", str(root), "--folder", str(folder)]
    command += ["--epochs", str(options.epochs), "--workers", str(options.workers)]
    command += ["--whole"] if options.whole else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def spread(found: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    """Median and range of the ratio of later epochs, repeat by repeat."""
    ratios = [one["later"] / other["later"] for one, other in zip(found, base, strict=True)]
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
