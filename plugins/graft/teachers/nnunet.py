"""Teachers trained by nnU-Net v2: plans, normalisation and label sets of a ``checkpoint_best.pth``.

The network sees the student's window with its own normalisation, which nnU-Net computes before resampling on
the image without its empty border; so the dataset must have the spacing of the plans.

Deviation: the normalised empty border stays (nnU-Net cuts it off and predicts background there).

Source: specification §9; nnunetv2 `DefaultPreprocessor`, `ImageNormalization` and `LabelManager`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.cache import file_hash
from medrl.core.errors import CheckpointError, did_you_mean
from medrl.plugins.graft.init_from import NnUNetCheckpoint, configuration_of, read_nnunet
from medrl.plugins.graft.models import PlainConvUNet
from medrl.plugins.graft.plans import SamplePlan
from medrl.plugins.graft.regions import Target

from .seen import Fold

CHECKPOINTS = ("checkpoint_best.pth", "checkpoint_final.pth", "checkpoint_latest.pth")
"""Names of nnU-Net's files in a fold folder, the first one first."""

SCHEMES = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)


@dataclass(frozen=True)
class NnUNetTeacher:
    """What a checkpoint of nnU-Net gives.

    Attributes:
        plan: Normalises as nnU-Net does.
        target: Its outputs: regions, or classes.
        order: ``transpose_forward`` of the plans.
        spacing: Voxel size (X, Y, Z) in mm.
        fold: Fold that it was not trained on, or ``all`` if it saw every case; None if it does not say.
        digest: Of the file.
    """

    network: PlainConvUNet
    plan: NnUNetPlan
    target: Target
    order: tuple[int, int, int]
    spacing: tuple[float, float, float]
    fold: Fold | None
    digest: str


@dataclass(frozen=True)
class Scheme:
    """How nnU-Net normalises one channel.

    Attributes:
        name: One of `SCHEMES`.
        masked: Measure and scale the non-zero part only.
        properties: Intensities of the foreground over the training set, for CT.
    """

    name: str
    masked: bool = False
    properties: Mapping[str, float] = field(default_factory=dict)

    def apply(
        self, image: NDArray[np.float32], inside: NDArray[np.bool_], box: tuple[slice, ...]
    ) -> NDArray[np.float32]:
        """Normalise one channel ``(D, H, W)``.

        Args:
            image: Stored intensities.
            inside: Its non-zero part, without holes.
            box: Around `inside`; what nnU-Net measures.
        """
        if self.name == "NoNormalization":
            return image
        if self.name == "RGBTo01Normalization":
            return image / np.float32(255.0)
        part = image[box]
        if self.name == "RescaleTo01Normalization":
            within: NDArray[np.float32] = (image - part.min()) / max(float(part.max() - part.min()), 1e-8)
            return within
        if self.name == "CTNormalization":
            known = self.properties
            clipped = np.clip(image, known["percentile_00_5"], known["percentile_99_5"])
            return np.asarray((clipped - known["mean"]) / max(known["std"], 1e-8), dtype=np.float32)
        if self.masked:
            values = image[inside]
            inner: NDArray[np.float32] = (image - values.mean()) / max(float(values.std()), 1e-8)
            return np.where(inside, inner, image)
        scaled: NDArray[np.float32] = (image - part.mean()) / max(float(part.std()), 1e-8)
        return scaled


@dataclass(frozen=True, kw_only=True)
class NnUNetPlan(SamplePlan):
    """Prepares a case as nnU-Net does; the organ mask has no part in it.

    Attributes:
        schemes: One for each channel.
    """

    schemes: tuple[Scheme, ...]

    def normalise(self, image: NDArray[Any], mask: NDArray[Any] | None, case_id: str) -> NDArray[np.float32]:
        """Normalise each channel of ``(C, D, H, W)`` by its scheme."""
        del mask, case_id
        image = np.asarray(image, dtype=np.float32)
        inside = ndimage.binary_fill_holes((image != 0).any(axis=0))
        if not inside.any():
            inside = np.ones(image.shape[1:], dtype=bool)
        box = ndimage.find_objects(inside.astype(np.uint8))[0]
        channels = [
            scheme.apply(channel, inside, box) for scheme, channel in zip(self.schemes, image, strict=True)
        ]
        return np.ascontiguousarray(np.stack(channels), dtype=np.float32)


def read_teacher(path: Path, *, trust: bool = False) -> NnUNetTeacher:
    """Rebuild a teacher from a checkpoint of nnU-Net v2; its plans are in it, or lie in the folder above.

    Args:
        path: ``checkpoint_best.pth`` or another of `CHECKPOINTS`.
        trust: Accept pickled Python objects beside the weights (replaced by stubs, never executed).

    Raises:
        CheckpointError: Damaged, of another architecture, or without plans and labels.
    """
    found = read_nnunet(path, trust=trust)
    plans = found.plans or _beside(path, "plans.json")
    dataset = found.dataset or _beside(path, "dataset.json")
    if not plans or not dataset:
        raise CheckpointError(
            f"teacher {path}",
            why="it holds neither plans nor labels, and there are no plans.json and dataset.json beside it",
            do="put plans.json and dataset.json of nnU-Net into the folder above the fold",
        )
    try:
        settings = configuration_of(plans, _configuration(found, path))
        order = tuple(int(axis) for axis in plans.get("transpose_forward", (0, 1, 2)))
        spacing = [float(value) for value in settings["spacing"]]
        schemes = _schemes(settings, plans)
        channels = dataset.get("channel_names") or dataset["modality"]
        names = tuple(str(channels[key]) for key in sorted(channels, key=int))
        target = target_of(dataset)
        if sorted(order) != [0, 1, 2] or len(spacing) != 3 or len(schemes) != len(names):
            raise ValueError(f"axes {order}, spacing {spacing}, {len(schemes)} schemes")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"teacher {path}",
            why=f"its plans are incomplete ({type(error).__name__}: {error})",
            do="use a 3D configuration of nnU-Net v2",
        ) from error
    z, y, x = (spacing[order.index(axis)] for axis in range(3))
    key = hashlib.sha256(repr(schemes).encode()).hexdigest()[:16]
    plan = NnUNetPlan(
        window="centre",
        size=(0, 0, 0),
        mask="",
        normalization=f"nnunet {key}",
        target_kind=target.kind,
        labels={},
        channel_names=names,
        spacing=(x, y, z),
        schemes=schemes,
    )
    network = found.network()
    if network.out_channels != target.channels or network.in_channels != len(names):
        raise CheckpointError(
            f"teacher {path}",
            why=f"its network takes {network.in_channels} channels and gives {network.out_channels}, "
            f"its labels want {len(names)} and {target.channels}",
        )
    return NnUNetTeacher(
        network=network,
        plan=plan,
        target=target,
        order=(order[0], order[1], order[2]),
        spacing=(x, y, z),
        fold=_fold(found.fold),
        digest=file_hash(path),
    )


def target_of(dataset: Mapping[str, Any]) -> Target:
    """The outputs of a network by the labels of its dataset.json: a sigmoid a region, or a softmax.

    >>> target_of({"labels": {"background": 0, "prostate": [1, 2], "cancer": 2}}).sets
    ((1, 2), (2,))
    """
    labels = {str(name): value for name, value in dataset["labels"].items() if name != "ignore"}
    sets = {
        name: tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
        for name, value in labels.items()
    }
    if any(len(values) > 1 for values in sets.values()):
        regions = {name: values for name, values in sets.items() if set(values) != {0}}
        return Target("regions", tuple(regions), tuple(regions.values()), False, tuple(range(len(regions))))
    ordered = sorted(sets.items(), key=lambda item: item[1])
    names, values = tuple(name for name, _ in ordered), tuple(value for _, value in ordered)
    return Target("classes", names, values, True, tuple(range(1, len(values))))


def _schemes(settings: Mapping[str, Any], plans: Mapping[str, Any]) -> tuple[Scheme, ...]:
    names: Sequence[str] = settings["normalization_schemes"]
    masked: Sequence[bool] = settings.get("use_mask_for_norm") or [False] * len(names)
    known = plans.get("foreground_intensity_properties_per_channel") or {}
    found = []
    for number, (name, inside) in enumerate(zip(names, masked, strict=True)):
        if name not in SCHEMES:
            raise ValueError(f"normalisation '{name}': {did_you_mean(name, SCHEMES)}")
        wanted = ("mean", "std", "percentile_00_5", "percentile_99_5") if name == "CTNormalization" else ()
        properties = {key: float(known[str(number)][key]) for key in wanted}
        found.append(Scheme(name, bool(inside), properties))
    return tuple(found)


def _configuration(found: NnUNetCheckpoint, path: Path) -> str:
    """Its name: in the checkpoint, else the last part of ``Trainer__Plans__3d_fullres``."""
    return found.configuration or path.parent.parent.name.rpartition("__")[2]


def _fold(text: str) -> Fold | None:
    if text == "all":
        return "all"
    return int(text) if text.isdigit() else None


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent.parent / name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"teacher {path}", why=f"{file} cannot be read ({error})") from error
    return content if isinstance(content, dict) else {}
