"""Prediction of thousands of small cases: cases a CPU second, memory and open files on the way.

Writes small images, predicts them with a network of one convolution, so that the loop around it is what is
measured, and looks at the process after every so many cases. Beside it, the cost of a report written anew for
every case.

    python benchmarks/scale_predict.py [--cases 10000] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.checkpoint import write_checkpoint
from medrl.core.jobs import PredictJob
from medrl.core.predicting import record
from medrl.core.predicting.memory import resident_bytes
from medrl.core.types import Volume

SHAPE = (16, 16, 8)


class Manager:
    """Stands for the plugin manager."""

    def notify(self, hook: str, **facts: Any) -> None:
        """Tell nobody."""


class OneConvolution:
    """A predictor that does almost nothing."""

    channel_names = ("image",)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.label_names = {"background": 0, "bright": 1}
        self.net = torch.nn.Conv3d(1, 2, 3, padding=1)

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> NDArray[np.float32]:
        """Return probabilities `(2, X, Y, Z)`."""
        del tta, overlap
        with torch.no_grad():
            found: NDArray[np.float32] = self.net(torch.from_numpy(volume.data)[None]).softmax(1)[0].numpy()
        return found

    def decode(self, probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the most probable label of each voxel."""
        return probabilities.argmax(axis=0).astype(np.uint8)


def write_cases(folder: Path, count: int) -> None:
    """Write small images, each with other voxels."""
    folder.mkdir()
    for number in range(count):
        data = np.random.default_rng(number).integers(0, 100, SHAPE).astype(np.int16)
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"case{number:06d}.nii.gz")


def predict(images: Path, output: Path, model: Path, every: int) -> list[dict[str, float]]:
    """Predict all cases; return what the process looked like on the way."""
    seen: list[dict[str, float]] = []
    start = time.process_time()

    def look(done: int, total: int, _case: str) -> None:
        if done % every == 0 or done == total:
            files = len(list(Path("/proc/self/fd").iterdir()))
            now = time.process_time() - start
            seen.append({"cases": done, "seconds": now, "memory": resident_bytes(), "open_files": files})

    job = PredictJob(
        method="bench",
        inputs=images,
        output=output,
        checkpoints=[model],
        manager=Manager(),  # type: ignore[arg-type]
        threads=1,
        progress=look,
    )
    outcome = job.run(lambda _: OneConvolution())
    assert not outcome.failed
    return seen


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument(
        "--whole-report", type=int, default=0, help="also so many cases with a report each time"
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    logging.getLogger("medrl").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_checkpoint(folder / "m.pt", {"net": {"w": torch.ones(1)}}, {"method": "bench"}).path
        write_cases(folder / "in", options.cases)
        seen = predict(folder / "in", folder / "out", model, max(1, options.cases // 10))
        found["journal"] = seen
        if options.whole_report:
            write_cases(folder / "few", options.whole_report)
            record._SHARE = 0
            found["whole_report"] = predict(
                folder / "few", folder / "again", model, options.whole_report // 2
            )
    print("| cases | cases a CPU second since the row before | memory, MiB | open files |\n|---|---|---|---|")
    for before, row in pairwise(seen):
        rate = (row["cases"] - before["cases"]) / (row["seconds"] - before["seconds"])
        print(f"| {row['cases']:.0f} | {rate:.1f} | {row['memory'] / 2**20:.0f} | {row['open_files']:.0f} |")
    if options.whole_report:
        last = found["whole_report"][-1]
        rate = last["cases"] / last["seconds"]
        print(f"a report for each of {last['cases']:.0f} cases: {rate:.1f} cases a CPU second")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
