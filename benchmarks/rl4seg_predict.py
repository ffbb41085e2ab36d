"""Prediction of a thousand ultrasound images: images a second, and memory that does not grow.

Writes synthetic echocardiograms, makes a network of a few training steps, and predicts all images as
`medrl predict rl4seg` does: reading, CLAHE, resizing, network, largest piece, back to the grid of the file,
writing, reading again. Memory is the resident set of the process after each tenth of the images.

    python benchmarks/rl4seg_predict.py [--images 1000] [--size 256] [--model rl4seg.unet_small] [--threads 1]
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from medrl.core.checkpoint import find_checkpoint
from medrl.core.jobs import PredictJob, build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.echo import write_echo
from medrl.plugins.rl4seg import loop, predict

DISTINCT = 50
"""Images that are drawn; the others are copies under other names."""


def resident_mb() -> float:
    """Resident memory of this process in MB (10⁶ bytes)."""
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_images(folder: Path, count: int, size: int) -> Path:
    """Write so many images into one folder; most are links to the first ones."""
    source = write_echo(folder / "drawn", cases=1, test_cases=DISTINCT, seed=3, shape=(size, size), shift=0.5)
    found = sorted((source / "imagesTs").iterdir())
    images = folder / "images"
    images.mkdir()
    for number in range(count):
        os.link(found[number % len(found)], images / f"case_{number:04d}_0000.nii.gz")
    return images


def make_run(folder: Path, manager: PluginManager, size: int, model: str) -> Path:
    """Train a network for two steps: it costs what a trained one does."""
    data = write_echo(folder / "source", cases=12, test_cases=0, seed=1, shape=(size, size))
    values: dict[str, Any] = {
        "data": {"root": str(data)},
        "sample": {"size": [size, size], "clahe": True},
        "model": {"name": model},
        "source": {"steps": 2},
        "train": {"batch_size": 2, "device": "cpu"},
        "stage": "source",
        "alone": True,
    }
    job = build_train_job(manager, "rl4seg", values, folder / "run")
    loop.run(job)
    return folder / "run"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--model", default="rl4seg.unet_small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    manager = PluginManager.create()
    memory: list[float] = []
    times: list[float] = []

    def progress(done: int, total: int, _case: str) -> None:
        if done and done % max(1, total // 10) == 0:
            memory.append(resident_mb())
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch)
        images = write_images(folder, options.images, options.size)
        run = make_run(folder, manager, options.size, options.model)
        start, cpu = time.perf_counter(), time.process_time()
        outcome = predict.run(
            PredictJob(
                method="rl4seg",
                inputs=images,
                output=folder / "out",
                checkpoints=[find_checkpoint(run)],
                manager=manager,
                device="cpu",
                threads=options.threads,
                progress=progress,
            )
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        written = len(list((folder / "out").glob("case_*.nii.gz")))
    if written != options.images:
        raise SystemExit(f"{written} of {options.images} images were predicted: {outcome}")
    rates = [options.images / 10 / (b - a) for a, b in itertools.pairwise(times)]
    print(
        f"{options.images} images of {options.size}² pixels, {options.model}, {options.threads} thread(s)\n"
    )
    print("| | |")
    print("| --- | ---: |")
    print(f"| images a second | {options.images / seconds:.1f} |")
    print(f"| images a CPU second | {options.images / cpu:.1f} |")
    print(f"| median over tenths | {statistics.median(rates):.1f} |")
    print(f"| resident memory after a tenth | {memory[0]:.0f} MB |")
    print(f"| at the end | {memory[-1]:.0f} MB |")
    growth = (memory[-1] - memory[1]) / (0.8 * options.images) * 1000
    print(f"| growth from the second tenth on | {growth:.1f} kB an image |")


if __name__ == "__main__":
    main()
