"""Prediction on whole images: normalise as in training, sliding window, back to the grid of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.inference import sliding_window
from medrl.core.types import Case, Volume
from medrl.core.volume import image_stem, image_suffix

from .models import LogitsOnly
from .plans import SamplePlan
from .samples import from_network, read_mask, to_network
from .teachers import restore
from .windows import Window, centre_window

if TYPE_CHECKING:
    from medrl.core.checkpoint import Checkpoint
    from medrl.core.jobs import PredictJob
    from medrl.core.predicting import PredictOutcome


def run(job: PredictJob, *, masks: Path | None = None) -> PredictOutcome:
    """Predict every case of a job; folds are averaged."""
    return job.run(partial(load, job=job, masks=masks))


def load(checkpoint: Checkpoint, *, job: PredictJob, masks: Path | None = None) -> GraftPredictor:
    """Make the predictor of a checkpoint, for a student or a teacher alike.

    Raises:
        CheckpointError: It holds no network of graft.
    """
    _, plan, network = restore(checkpoint, job.manager)
    return GraftPredictor(plan, network, device=_device(job.device), precision=job.precision, masks=masks)


class GraftPredictor:
    """Segments whole images with one network.

    Args:
        plan: How training prepared a case.
        network: The trained network.
        device: Where it runs.
        precision: `fp32`, or autocast to `bf16` or `fp16`.
        masks: Folder of organ masks ``<case>.nii.gz``; else ``masksTs`` or ``masksTr`` beside the images.
    """

    def __init__(
        self,
        plan: SamplePlan,
        network: torch.nn.Module,
        *,
        device: torch.device,
        precision: str = "fp32",
        masks: Path | None = None,
    ) -> None:
        self.plan = plan
        self.target = plan.target
        self.network = LogitsOnly(network).to(device).eval()
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.masks = masks
        self.label_names: Mapping[str, int] = dict(plan.labels)
        self.channel_names: Sequence[str] = plan.channel_names

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> NDArray[Any]:
        """Return ``(K, X, Y, Z)`` probabilities of the target's channels on the grid of the input.

        A network trained on the slices of the organ mask is asked about those slices only, if the mask is
        known; elsewhere the answer is background.

        Raises:
            DataError: The image has other channels, or needs an organ mask that is not there.
        """
        if volume.data.shape[0] != len(self.channel_names):
            raise DataError(
                str(volume.source or "image"),
                why=f"{volume.data.shape[0]} channels, the model needs {', '.join(self.channel_names)}",
            )
        case = self._case(volume)
        mask = read_mask(case, self.plan.mask, like=volume) if self.plan.needs_mask else None
        if mask is None and self.plan.normalization == "mask":
            raise DataError(
                f"case {case.id}",
                why=f"the model normalises inside the organ mask '{self.plan.mask}', and there is none",
                do="give --masks DIR with one file for each case",
                case=case.id,
            )
        image = self.plan.normalise(to_network(volume.data), mask, case.id)
        region = self._region(image.shape[1:], mask)
        box = torch.from_numpy(region.cut(image))[None]
        found = self._predict(box, tta=tta, overlap=overlap)
        full = region.put_back(found, image.shape[1:])
        if self.target.softmax:
            outside = region.put_back(np.ones(region.size, dtype=found.dtype), image.shape[1:]) == 0
            full[0][outside] = 1.0
        return from_network(full)

    def decode(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(K, X, Y, Z)`` probabilities into an ``(X, Y, Z)`` label map."""
        labels = self.target.decode(torch.from_numpy(np.ascontiguousarray(probabilities))[None])[0]
        return labels.numpy().astype(np.uint8 if max(self.label_names.values()) < 256 else np.uint16)

    def _predict(self, box: torch.Tensor, *, tta: bool, overlap: float) -> NDArray[np.float32]:
        """Probabilities ``(K, D, H, W)`` of a box ``(1, C, D, H, W)``; with `tta` the mean over flips."""
        flips: list[tuple[int, ...]] = [(), (4,), (3,), (3, 4)] if tta else [()]
        total = torch.zeros(())
        for axes in flips:
            logits = sliding_window(
                self._forward,
                torch.flip(box, axes) if axes else box,
                self.plan.size,
                overlap=overlap,
                device=self.device,
            )
            found = self.target.probabilities(logits)
            total = total + (torch.flip(found, axes) if axes else found)
        result: NDArray[np.float32] = (total / len(flips))[0].numpy()
        return result

    def _forward(self, windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits: torch.Tensor = self.network(windows)
        return logits.float()

    def _region(self, shape: tuple[int, ...], mask: NDArray[Any] | None) -> Window:
        """The part of the image that is predicted, padded to at least one window as training pads it."""
        low, high = 0, shape[0]
        if self.plan.window == "mask" and mask is not None and mask.any():
            slices = np.flatnonzero(mask.any(axis=(1, 2)))
            low, high = int(slices[0]), int(slices[-1]) + 1
        size = [
            max(extent, least) for extent, least in zip((high - low, *shape[1:]), self.plan.size, strict=True)
        ]
        part = centre_window((high - low, *shape[1:]), (size[0], size[1], size[2]))
        return Window(
            start=(part.start[0] + low, *part.start[1:]),
            size=part.size,
            low=(part.low[0] + low, *part.low[1:]),
            high=(part.high[0] + low, *part.high[1:]),
        )

    def _case(self, volume: Volume) -> Case:
        """The case behind a volume, with the organ mask that lies beside its images."""
        source = volume.source or Path("image.nii.gz")
        stem = image_stem(source) if source.is_file() else source.name
        case_id = stem[: -len("_0000")] if stem.endswith("_0000") else stem
        folders = [self.masks] if self.masks else []
        if source.parent.name.startswith("images"):
            folders.append(source.parent.with_name("masks" + source.parent.name.removeprefix("images")))
        for folder in folders:
            for path in (folder / self.plan.mask, folder):
                found = sorted(item for item in path.glob(f"{case_id}.*") if image_suffix(item))
                if found:
                    return Case(id=case_id, images=(source,), masks={self.plan.mask: found[0]})
        return Case(id=case_id, images=(source,))


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
