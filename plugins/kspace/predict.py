"""Prediction: a policy acquires a scan, which is then reconstructed and segmented.

Images of files are taken as the object that is scanned; their k-space is simulated as in training. Files of
measured k-space are undersampled after the fact. Of each scan the lines, the reconstruction and, where there
is a reward model with labels, the segmentation are written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.checkpoint import Checkpoint, load_checkpoint
from medrl.core.dataset import list_inputs, safe_case_id
from medrl.core.errors import ConfigError, DataError, MedrlError
from medrl.core.predicting import PredictOutcome
from medrl.core.types import Volume
from medrl.core.volume import write_volume
from medrl.core.volume.write import write_bytes

from .acquiring import Acquired, acquire
from .data import read_scan
from .data.images import of_volume
from .restoring import Restored, restore

if TYPE_CHECKING:
    from medrl.core.jobs import PredictJob

MEASURED = (".h5", ".hdf5", ".mrd", ".cfl")
REPORT = "report.json"
_log = logging.getLogger("medrl.kspace")


def run(job: PredictJob, *, lines: int | None = None, stop_below: float | None = None) -> PredictOutcome:
    """Acquire, reconstruct and segment every scan of a job.

    Raises:
        ConfigError: Several checkpoints are named, or options do not fit a policy.
    """
    if len(job.checkpoints) != 1:
        raise ConfigError(
            "--folds", why=f"{len(job.checkpoints)} policies cannot acquire one scan", do="name one run"
        )
    if job.tta:
        raise ConfigError("--tta", why="an acquisition cannot be repeated", do="leave it out")
    files = measured_files(job.inputs)
    found = load_checkpoint(job.checkpoints[0], method="kspace")
    opened = restore(found, job.manager, _device(job.device), precision=job.precision)
    budget = lines or max(opened.cfg.budget.eval)
    opened.policy().check_budget(budget)
    if files:
        return _measured(job, opened, files, budget, stop_below)
    names = case_names(job.inputs)
    if opened.classes < 2:
        volumes = sorted(names.items(), key=lambda item: item[1])
        return _measured(job, opened, [path for path, _ in volumes], budget, stop_below)

    def load(_checkpoint: Checkpoint) -> KspacePredictor:
        return KspacePredictor(opened, names, _folder(job.output), budget=budget, stop_below=stop_below)

    return job.run(load)


class KspacePredictor:
    """Acquires images, writes reconstructions and lines, and returns the probabilities.

    Args:
        run: Policy and networks.
        names: Identifier of each input file.
        folder: Of ``reconstructions`` and ``lines``.
        budget: Lines beyond the initial ones.
        stop_below: See `medrl.plugins.kspace.acquiring.acquire`.
    """

    def __init__(
        self,
        run: Restored,
        names: Mapping[Path, str],
        folder: Path,
        *,
        budget: int,
        stop_below: float | None = None,
    ) -> None:
        self.run, self.names, self.folder = run, dict(names), folder
        self.budget, self.stop_below = budget, stop_below
        self.label_names: Mapping[str, int] = dict(run.plan.label_names)
        self.channel_names: Sequence[str] = ("MR",)

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> NDArray[Any]:
        """Return ``(K, X, Y, Z)`` probabilities from the acquired lines, on the grid of the input.

        Args:
            volume: The scan, one channel.
            tta: Not used.
            overlap: Not used: slices are seen whole.
        """
        del tta, overlap
        name = self._name(volume)
        raw = of_volume(volume)
        found = acquire(self.run, raw, name, budget=self.budget, stop_below=self.stop_below)
        write_acquired(found, name, self.folder, like=volume)
        maps = found.probabilities
        if maps is None:
            raise DataError(f"case {name}", why="the run has no reward model that segments", case=name)
        back = maps if found.prepared.placed is None else found.prepared.placed.restored_probabilities(maps)
        result: NDArray[Any] = np.ascontiguousarray(back.numpy().transpose(1, 3, 2, 0))
        return result

    def decode(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(K, X, Y, Z)`` probabilities into an ``(X, Y, Z)`` label map."""
        labels: NDArray[Any] = probabilities.argmax(axis=0).astype(np.uint8)
        return labels

    def _name(self, volume: Volume) -> str:
        source = None if volume.source is None else Path(volume.source).resolve()
        if source in self.names:
            return self.names[source]
        return safe_case_id("scan" if source is None else source.name.split(".")[0])


def write_acquired(found: Acquired, name: str, folder: Path, *, like: Volume | None) -> dict[str, Path]:
    """Write lines and reconstruction; return the files by kind.

    Args:
        found: The scan.
        name: Its identifier.
        folder: Of ``reconstructions`` and ``lines``.
        like: The file whose grid the reconstruction lies on; None for measured k-space, which gets a grid of
            its spacing.
    """
    from medrl.core.predicting.record import json_bytes

    grid = like if like is not None else measured_grid(found)
    images = found.image.unsqueeze(1)
    if found.prepared.placed is not None:
        images = found.prepared.placed.restored(images)
    voxels = np.ascontiguousarray(images[:, 0].numpy().astype(np.float32).transpose(2, 1, 0))
    files = {
        "reconstruction": folder / "reconstructions" / f"{name}.nii.gz",
        "lines": folder / "lines" / f"{name}.json",
    }
    write_volume(files["reconstruction"], voxels, grid, kind="image")
    write_bytes(files["lines"], json_bytes({"scan": name, "acquisitions": found.records}), suffix=".json")
    return files


def measured_grid(found: Acquired) -> Volume:
    """A grid for results of measured k-space: axes x, y and slices at their spacing, 1 mm where unknown."""
    rows, columns, between = (
        size if np.isfinite(size) and size > 0 else 1.0 for size in found.prepared.spacing_mm
    )
    count, height, width = found.magnitude.shape
    return Volume(
        data=np.zeros((1, width, height, count), dtype=np.float32),
        affine=np.diag([columns, rows, between, 1.0]),
        spacing=(columns, rows, between),
    )


def measured_files(path: Path) -> list[Path]:
    """Files of measured k-space (or HDF5 slices) at a path; empty where there are none."""
    if path.is_file():
        return [path] if path.suffix.lower() in MEASURED else []
    if (path / "dataset.json").is_file():
        return []
    return sorted(item for item in path.iterdir() if item.is_file() and item.suffix.lower() in MEASURED)


def case_names(path: Path) -> dict[Path, str]:
    """Identifiers of the image files at a path, as the segmentations will be named."""
    return {image.resolve(): case.id for case in list_inputs(path, ("MR",)) for image in case.images}


# -- private -----------------------------------------------------------------------------------------


def _measured(
    job: PredictJob, opened: Restored, files: Sequence[Path], budget: int, stop_below: float | None
) -> PredictOutcome:
    """Acquire files one by one; a bad one does not stop the others."""
    from medrl.core.predicting.record import json_bytes

    index, count = job.part
    folder = _folder(job.output)
    done: dict[str, Path] = {}
    failed: dict[str, str] = {}
    records: dict[str, Any] = {}
    chosen = list(files)[index - 1 :: count]
    for number, path in enumerate(chosen):
        name = safe_case_id(path.name.split(".")[0])
        if job.progress is not None:
            job.progress(number, len(chosen), name)
        try:
            raw = read_scan(path)
            found = acquire(opened, raw, name, budget=budget, stop_below=stop_below)
            written = write_acquired(found, name, folder, like=raw.volume)
            if found.probabilities is not None:
                written["labels"] = folder / f"{name}.nii.gz"
                _write_labels(found, written["labels"], raw.volume)
        except MedrlError as error:
            failed[name] = str(error)
            records[name] = {"status": "failed", "error": str(error)}
            _log.warning("case %s failed: %s", name, error)
            continue
        done[name] = written.get("labels", written["reconstruction"])
        files_of = {kind: item.relative_to(folder).as_posix() for kind, item in written.items()}
        records[name] = {"status": "done", "files": files_of}
    report = job.report or folder / REPORT
    content = {"method": "kspace", "budget": budget, "checkpoint": str(opened.path), "cases": records}
    write_bytes(report, json_bytes(content), suffix=".json")
    return PredictOutcome(done=tuple(done), failed=failed, report=report, outputs=done)


def _write_labels(found: Acquired, path: Path, like: Volume | None) -> None:
    maps = found.probabilities
    if maps is None:
        return
    placed = found.prepared.placed
    back = maps if placed is None else placed.restored_probabilities(maps)
    labels = np.ascontiguousarray(back.argmax(dim=1).numpy().astype(np.uint8).transpose(2, 1, 0))
    write_volume(path, labels, like if like is not None else measured_grid(found), kind="label")


def _folder(output: Path) -> Path:
    return output.parent if output.name.endswith((".nii", ".nii.gz")) and not output.is_dir() else output


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
