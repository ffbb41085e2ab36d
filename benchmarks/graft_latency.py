"""One whole image through the prediction of graft: a student beside the mean of N teachers.

Student and teachers are the same network with random weights (``graft.fullres``, 44.6 M parameters); the
image is a phantom of three channels as large as one window. Every run is `medrl predict` without the command
line: load and verify the checkpoints, read the image, normalise, predict, average, write, read back. Each is
a process of its own, which also gives its peak memory. Printed are CPU and wall seconds for all of that, and
wall seconds of the prediction alone, each the smallest of the repeats.

The script stops unless the probabilities are finite and in [0, 1], the labels are known ones on the grid of
the image, and the mean of three teachers is the mean of what each of them says alone.

    OMP_NUM_THREADS=1 python benchmarks/graft_latency.py [--size 128] [--teachers 1 3 5] [--repeats 1]
                                                         [--model graft.fullres] [--precision fp32] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.checkpoint import write_checkpoint
from medrl.core.config import resolve_method
from medrl.core.jobs import PredictJob
from medrl.core.manager import PluginManager
from medrl.core.phantoms.prostate import LABELS, make_case
from medrl.plugins.graft import predict
from medrl.plugins.graft.plans import SamplePlan

CHANNELS = ("T2", "ADC", "DWI")
DEPTH = 20


def write_image(folder: Path, size: int) -> None:
    """Write one phantom in nnU-Net layout."""
    folder.mkdir(parents=True)
    case = make_case(0, 0, shape=(size, size, DEPTH))
    for number, channel in enumerate(case.image):
        nib.save(nib.Nifti1Image(channel, case.affine), folder / f"case_{number:04d}.nii.gz")


def write_networks(folder: Path, size: int, count: int, model: str) -> list[Path]:
    """Write checkpoints of random networks."""
    folder.mkdir(parents=True)
    manager = PluginManager.create(third_party=False)
    config = resolve_method(manager, "graft", layers=[]).config
    plan = SamplePlan(
        window="centre",
        size=(DEPTH, size, size),
        mask="prostate",
        normalization="volume",
        target_kind="binary",
        labels=LABELS,
        channel_names=CHANNELS,
    )
    values = config.model_dump(mode="json") | {"model": {"name": model}}
    meta = {
        "method": "graft",
        "config": values,
        "plan": plan.to_meta(),
        "label_names": dict(LABELS),
        "channel_names": list(CHANNELS),
        "step": 0,
    }
    paths = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = manager.registry("models").build(
            model, in_channels=len(CHANNELS), out_channels=2, deep_supervision=True
        )
        paths.append(folder / f"network_{seed}.pt")
        write_checkpoint(paths[-1], {"student": network.state_dict()}, meta)
    return paths


def measure(scratch: Path, numbers: list[int], precision: str) -> dict[str, float]:
    """Predict with some of the networks in this process."""
    torch.set_num_threads(1)
    manager = PluginManager.create(third_party=False)
    out = folder_of(scratch, numbers)
    job = PredictJob(
        method="graft",
        inputs=scratch / "images",
        output=out,
        checkpoints=[scratch / "networks" / f"network_{number}.pt" for number in numbers],
        manager=manager,
        device="cpu",
        threads=1,
        precision=precision,
        save_probabilities=True,
    )
    started, used = time.perf_counter(), time.process_time()
    outcome = predict.run(job)
    wall, cpu = time.perf_counter() - started, time.process_time() - used
    if outcome.failed:
        raise SystemExit(f"the prediction failed: {outcome.failed}")
    check(probabilities(out), outcome.outputs["case"], scratch / "images" / "case_0000.nii.gz")
    report = json.loads(outcome.report.read_text())
    peak = next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    seconds = report["cases"]["case"]["seconds"]
    return {"cpu_s": cpu, "wall_s": wall, "predict_s": seconds["predict"], "peak_mib": peak / 1024}


def probabilities(out: Path) -> NDArray[np.float32]:
    """What a run saved, ``(K, X, Y, Z)``."""
    with np.load(out / "probabilities" / "case.npz", allow_pickle=False) as found:
        values: NDArray[np.float32] = found["probabilities"]
    return values


def check(found: NDArray[np.float32], labels: Path, image: Path) -> None:
    """Stop if a result is not what it must be."""
    written, given = nib.load(labels), nib.load(image)
    values = np.asarray(written.dataobj)
    if not np.isfinite(found).all() or found.min() < 0 or found.max() > 1:
        raise SystemExit("probabilities that are none")
    if written.shape != given.shape or not np.allclose(written.affine, given.affine):
        raise SystemExit("the segmentation does not lie on the grid of the image")
    if not set(np.unique(values).tolist()) <= set(LABELS.values()):
        raise SystemExit("unknown labels")


def run(scratch: Path, numbers: list[int], precision: str) -> dict[str, float]:
    """Predict in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--precision", precision, "--root", str(scratch)]
    command += ["--with", *map(str, numbers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128, help="voxels of the image in plane")
    parser.add_argument("--teachers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model", default="graft.fullres")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--with", dest="numbers", type=int, nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Write image and networks, run each number of them, print the table."""
    options = parse()
    if options.root:
        print(json.dumps(measure(options.root, options.numbers, options.precision)))
        return
    rows: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_image(scratch / "images", options.size)
        most = max(*options.teachers, 3)
        write_networks(scratch / "networks", options.size, most + 1, options.model)
        # The student is the network after the teachers.
        arms: dict[str, list[int]] = {"student": [most]}
        arms |= {f"{count} teacher{'s' * (count > 1)}": list(range(count)) for count in options.teachers}
        for _ in range(options.repeats):
            for name, numbers in arms.items():
                row = run(scratch, numbers, options.precision)
                best = rows.setdefault(name, row)
                rows[name] = {key: min(best[key], value) for key, value in row.items()}
        away = compare(scratch, options)
    report(options, rows, away)


def compare(scratch: Path, options: argparse.Namespace) -> float:
    """How far the mean of three teachers is from that of each alone; stop if it is another one."""
    for numbers in ([0, 1, 2], [0], [1], [2]):
        if not folder_of(scratch, numbers).is_dir():
            run(scratch, numbers, options.precision)
    alone = np.mean([probabilities(folder_of(scratch, [number])) for number in range(3)], axis=0)
    away = float(np.abs(probabilities(folder_of(scratch, [0, 1, 2])) - alone).max())
    if not away < 1e-5:
        raise SystemExit(f"the mean of three teachers is {away} from that of each alone")
    return away


def folder_of(scratch: Path, numbers: list[int]) -> Path:
    """Where a run writes."""
    return scratch / ("out_" + "_".join(map(str, numbers)))


def report(options: argparse.Namespace, rows: dict[str, dict[str, float]], away: float) -> None:
    """Print the numbers."""
    if options.json:
        facts = {key: getattr(options, key) for key in ("size", "model", "precision", "repeats")}
        print(json.dumps({**facts, "mean_differs_by": away, "runs": rows}))
        return
    base, size = rows["student"], options.size
    print(f"{options.model}, image {size} x {size} x {DEPTH}, {options.precision}, one thread\n")
    print("| | CPU s | ratio | wall s | predict, wall s | peak MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        print(
            f"| {name} | {row['cpu_s']:.2f} | {row['cpu_s'] / base['cpu_s']:.2f} | {row['wall_s']:.2f} "
            f"| {row['predict_s']:.2f} | {row['peak_mib']:.0f} |"
        )
    print(f"\nthe mean of three teachers is that of each alone within {away:.1e}")


if __name__ == "__main__":
    main()
