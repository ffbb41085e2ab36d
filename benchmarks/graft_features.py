"""Teacher features from disk to a batch: memory-mapped arrays beside whole files and a cache in each worker.

Every arm gives the same values of the same cases, and the main process copies every value of a batch once
through a buffer of 16 MiB, as on the way to an accelerator. Sizes are those of the published training: for
each case and teacher neg1 (32, 20, 256, 256), neg2 (64, 20, 128, 128) and logits (2, 20, 256, 256) in
bfloat16, of which neg1 and logits are asked for. Images are left out of all arms.

- ``whole files``: ``torch.load`` of one file a teacher into an LRU in each worker; workers end with the epoch
  and the LRU with them, as published (dataset/pimedloader_3d_with_features.py of the original).
- ``whole files, kept``: the same with workers that live on and an LRU of every case, its best case.
- ``medrl``: `TeacherFolder.read` in the workers of `ResumableLoader`; the main process maps the files, and
  the copy is from the map, as in `collate` for an accelerator.
- ``medrl, CPU``: before that copy the batch is stacked by `collate` for training on the CPU.

Printed: samples per second in the best epoch after the first, CPU milliseconds a sample in the median one
(main process and workers), and the memory of a rank while its queues are full: what cannot be given back,
that is private pages and shared memory, of the main process and its workers together. Pages of mapped files
belong to the page cache, are shared by all ranks and are given back when memory runs short. ``--cold`` takes
the files out of the page cache before every epoch.

    OMP_NUM_THREADS=1 python benchmarks/graft_features.py [--cases 4] [--teachers 2] [--batch 2] [--epochs 3]
                                                          [--workers 1 2 4] [--cold] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medrl.core.runtime import ResumableLoader
from medrl.plugins.graft.features import LOGITS, Expected, FeatureWriter, open_teachers
from medrl.plugins.graft.mapped import by_value
from medrl.plugins.graft.samples import collate, in_files
from medrl.plugins.graft.windows import centre_window

ARMS = ("whole files", "whole files, kept", "medrl", "medrl, CPU")
WINDOW = (20, 256, 256)
ARRAYS = {"neg1": (32, *WINDOW), "neg2": (64, 20, 128, 128), LOGITS: (2, *WINDOW)}
ASKED = ("neg1", LOGITS)
KEYS = {"neg1": "feature_neg1", "neg2": "feature_neg2", LOGITS: "logits"}
STAGE = 2**23
"""Values that are copied at a time."""
LABELS = {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}

Teachers = list[dict[str, Tensor]]
"""For each teacher its arrays by name."""


def write(root: Path, cases: int, teachers: int) -> None:
    """Write the features of every case in both layouts."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in ARRAYS.items()}
    for number in range(teachers):
        folder = root / "original" / f"fold{number}"
        folder.mkdir(parents=True)
        writer = FeatureWriter(
            root / "medrl" / f"teacher_{number}",
            teacher=str(number),
            source="benchmark",
            channels={name: shape[0] for name, shape in ARRAYS.items()},
            target="binary",
            labels=LABELS,
            dtype="bf16",
        )
        for k in range(cases):
            arrays = {name: (item + number + 0.1 * k).bfloat16() for name, item in base.items()}
            writer.write(expected(k), arrays)
            with (folder / f"features_{expected(k).case_id}.pt").open("wb") as file:
                torch.save({KEYS[name]: item for name, item in arrays.items()}, file)
                file.flush()
                os.fsync(file.fileno())


def expected(number: int) -> Expected:
    """What the student needs of a case."""
    return Expected(f"case_{number:03d}", centre_window(WINDOW, WINDOW), WINDOW, (0.5, 0.5, 3.0))


class WholeFiles(Dataset[Teachers]):
    """Cases read whole with ``torch.load``, the last ones kept in this process."""

    def __init__(self, root: Path, cases: int, teachers: int, size: int) -> None:
        self.folders = [root / "original" / f"fold{number}" for number in range(teachers)]
        self.cases, self.size = cases, size
        self.kept: OrderedDict[int, Teachers] = OrderedDict()

    def __len__(self) -> int:
        return self.cases

    def __getitem__(self, index: int) -> Teachers:
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        found = []
        for folder in self.folders:
            content = torch.load(
                folder / f"features_{expected(index).case_id}.pt", map_location="cpu", weights_only=True
            )
            found.append({name: content[KEYS[name]] for name in ASKED})
        self.kept[index] = found
        if len(self.kept) > self.size:
            self.kept.popitem(last=False)
        return found


def stacked(samples: Sequence[Teachers]) -> Teachers:
    """Stack samples in the worker, as the original does."""
    return [
        {name: torch.stack([sample[i][name] for sample in samples]) for name in ASKED}
        for i in range(len(samples[0]))
    ]


class Mapped(Dataset[dict[str, Any]]):
    """What `SampleSet` gives, with an image of one voxel."""

    def __init__(self, root: Path, cases: int) -> None:
        self.teachers = open_teachers([root / "medrl"], taps=["neg1"], target="binary", labels=LABELS)
        self.cases = cases

    def __len__(self) -> int:
        return self.cases

    def __getitem__(self, index: int) -> dict[str, Any]:
        arrays = [teacher.read(expected(index), ASKED) for teacher in self.teachers]
        one = torch.zeros(1, 1, 1, 1)
        return {
            "case_id": expected(index).case_id,
            "image": one,
            "views": [],
            "label": one[0],
            "mask": one[0],
            "labelled": True,
            "features": {"neg1": [item["neg1"] for item in arrays]},
            "logits": [item[LOGITS] for item in arrays],
            "valid": [one for _ in arrays],
        }


def opened(sample: dict[str, Any]) -> Teachers:
    """Map the arrays of a sample."""
    pairs = zip(sample["features"]["neg1"], sample["logits"], strict=True)
    return [{"neg1": by_value(neg1), LOGITS: by_value(logits)} for neg1, logits in pairs]


def epochs(arm: str, root: Path, options: argparse.Namespace, workers: int) -> Iterator[Iterator[Teachers]]:
    """Endless epochs of an arm, each its batches."""
    if arm.startswith("medrl"):
        mapped = Mapped(root, options.cases)
        loader: ResumableLoader[Any] = ResumableLoader(
            mapped, batch_size=options.batch, shuffle=True, seed=0, collate=in_files, workers=workers
        )

        def batches() -> Iterator[Teachers]:
            for _ in range(len(loader)):
                samples = next(loader)
                if arm == "medrl":
                    yield [arrays for sample in samples for arrays in opened(sample)]
                    continue
                batch = collate(samples)
                yield [
                    {"neg1": neg1, LOGITS: logits}
                    for neg1, logits in zip(batch.features["neg1"], batch.logits, strict=True)
                ]

        while True:
            yield batches()
    kept = arm == "whole files, kept"
    whole = WholeFiles(root, options.cases, options.teachers, options.cases if kept else options.lru)
    torch.manual_seed(0)
    made = DataLoader(
        whole,
        batch_size=options.batch,
        shuffle=True,
        num_workers=workers,
        collate_fn=stacked,
        persistent_workers=kept and workers > 0,
    )
    while True:
        yield iter(made)


def take(batch: Teachers, buffer: Tensor) -> None:
    """Copy every value of a batch, a part at a time."""
    for arrays in batch:
        for item in arrays.values():
            for part in item.view(-1).split(STAGE):
                buffer[: len(part)].copy_(part)


def measure(arm: str, root: Path, options: argparse.Namespace, workers: int) -> dict[str, float]:
    """Run one arm in this process."""
    torch.set_num_threads(1)
    wall, cpu, memory = [], [], 0.0
    buffer = torch.empty(STAGE, dtype=torch.bfloat16)
    for number, batches in enumerate(epochs(arm, root, options, workers)):
        if options.cold:
            evict(root)
        started, used = time.perf_counter(), cpu_seconds()
        for batch in batches:
            if number == options.epochs:
                time.sleep(options.pause)
                memory = max(memory, held_mib())
            take(batch, buffer)
            del batch
        if number == options.epochs:
            break
        wall.append((time.perf_counter() - started) / options.cases)
        cpu.append((cpu_seconds() - used) / options.cases)
    return {
        "first_per_s": 1 / wall[0],
        "later_per_s": 1 / min(wall[1:]),
        "first_cpu_ms": 1000 * cpu[0],
        "later_cpu_ms": 1000 * statistics.median(cpu[1:]),
        "held_mib": memory,
    }


def evict(root: Path) -> None:
    """Take the files out of the page cache."""
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def processes() -> list[int]:
    """This process and its workers."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def cpu_seconds() -> float:
    """CPU time of this process and its workers, ended ones included."""
    total = 0.0
    for pid in processes():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return total + ended.ru_utime + ended.ru_stime


def held_mib() -> float:
    """Memory of this process and its workers that cannot be given back: private pages and shared memory."""
    private, shared = 0, {}
    for pid in processes():
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                private += int(line.split()[1]) * 1024
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name, status = str(link.readlink()), link.stat()
            except FileNotFoundError:
                continue
            if name.startswith(("/dev/shm/", "/memfd:")):
                shared[status.st_ino] = status.st_blocks * 512
    return (private + sum(shared.values())) / 2**20


def same_values(root: Path, options: argparse.Namespace) -> None:
    """Stop if medrl and the original's way do not give the same batch."""
    whole = WholeFiles(root, options.cases, options.teachers, 1)
    mapped = Mapped(root, options.cases)
    ours = collate(in_files([mapped[k] for k in range(2)]))
    for i, arrays in enumerate(stacked([whole[k] for k in range(2)])):
        if not torch.equal(arrays["neg1"], ours.features["neg1"][i]):
            raise SystemExit(f"the features of teacher {i} differ")
        if not torch.equal(arrays[LOGITS], ours.logits[i]):
            raise SystemExit(f"the logits of teacher {i} differ")


def run_arm(arm: str, root: Path, workers: int) -> dict[str, float]:
    """Run one arm in a process of its own, with the options of this one."""
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:]]
    command += ["--arm", arm, "--root", str(root), "--of", str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--teachers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs; one more measures memory")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lru", type=int, default=2, help="cases in the LRU of a worker of `whole files`")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds that fill the queues")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("--epochs must be at least 2: the first one verifies and fills caches")
    return options


def main() -> None:
    """Write the files, run each arm in its own process, print the table."""
    options = parse()
    if options.arm:
        print(json.dumps(measure(options.arm, options.root, options, options.of)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        root = Path(scratch)
        write(root, options.cases, options.teachers)
        same_values(root, options)
        rows = {(arm, count): run_arm(arm, root, count) for count in options.workers for arm in ARMS}
    if options.json:
        settings = {name: getattr(options, name) for name in ("cases", "teachers", "batch", "epochs", "cold")}
        found = [{"arm": arm, "workers": count, **row} for (arm, count), row in rows.items()]
        print(json.dumps({**settings, "arms": found}))
        return
    state = "not in memory" if options.cold else "in the page cache"
    print(
        f"{options.cases} cases, {options.teachers} teachers, batches of {options.batch}, files {state}; "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n"
    )
    print("| workers | arm | samples/s | ratio | CPU ms a sample | ratio | first epoch, /s | held MiB |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (arm, count), row in rows.items():
        base = rows[ARMS[0], count]
        print(
            f"| {count} | {arm} | {row['later_per_s']:.1f} | {row['later_per_s'] / base['later_per_s']:.1f} "
            f"| {row['later_cpu_ms']:.0f} | {base['later_cpu_ms'] / row['later_cpu_ms']:.1f} "
            f"| {row['first_per_s']:.1f} | {row['held_mib']:.0f} |"
        )


if __name__ == "__main__":
    main()
