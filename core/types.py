"""The records that travel through medrl: a case, its volume, its prediction, a plugin's identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLUGIN_API = 1
"""Major version of the plugin interface; hooks gain only optional arguments inside a major."""


@dataclass(frozen=True, kw_only=True)
class PluginInfo:
    """What a plugin says about itself.

    Attributes:
        name: Method name; must equal the entry-point name.
        api: Major version of the plugin interface that it was written for.
        config: ``"module:Class"`` of its config model (a `medrl.core.config.MethodConfig`); empty for a
            plugin that only registers parts. ``defaults.yaml`` and ``preset_<name>.yaml`` lie beside it.
        networks: ``"module:function"`` that rebuilds the networks of a checkpoint for ``medrl model export``:
            ``(checkpoint, manager)`` to `medrl.core.export.Network` by name; empty if there are none.
        trial: ``"module:function"`` that writes small synthetic data for trial runs: ``(folder)`` to nested
            config values such as ``{"data": {"root": folder}}``; empty takes synthetic prostates.
    """

    name: str
    api: int
    summary: str
    version: str = ""
    paper: str = ""
    license: str = ""
    config: str = ""
    networks: str = ""
    trial: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One examination: its image files (one a channel), its reference label and its patient.

    Attributes:
        id: Identifier, safe as a file name.
        images: One file for each channel, in the dataset's channel order.
        label: Reference segmentation, if known.
        patient: Group key for splits; equal to `id` unless the dataset says otherwise.
        masks: Further label files by name, such as ``prostate``.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    patient: str = ""
    masks: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Volume:
    """Voxels with their geometry.

    Attributes:
        data: ``(C, X, Y, Z)``; a label map has C = 1.
        affine: ``(4, 4)`` voxel index to RAS millimetres.
        spacing: ``(3,)`` voxel size in mm.
        header: Reader-specific header, kept so that a result can be written on the same grid.
        source: File or folder that it was read from.
    """

    data: NDArray[Any]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    header: Any = None
    source: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction:
    """The segmentation of one case on the grid of its input.

    Attributes:
        labels: ``(X, Y, Z)`` integer label map.
        probabilities: ``(C, X, Y, Z)`` if asked for.
        uncertainty: ``(X, Y, Z)`` in [0, 1] if asked for.
        info: Plain values for the per-case report.
    """

    case_id: str
    labels: NDArray[Any]
    probabilities: NDArray[Any] | None = None
    uncertainty: NDArray[Any] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Predictor(Protocol):
    """What `predict.load(checkpoint)` of a plugin returns; folds are averaged on `probabilities`.

    A predictor may also have ``uncertainty(volume, labels)``, which returns ``(X, Y, Z)`` in [0, 1] for the
    label map that was decided on; without it, ``--save-uncertainty`` writes the entropy of the probabilities.
    """

    label_names: Mapping[str, int]
    channel_names: Sequence[str]

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> NDArray[Any]:
        """Return ``(K, X, Y, Z)`` probabilities on the grid of the input volume."""
        ...

    def decode(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(K, X, Y, Z)`` probabilities into an ``(X, Y, Z)`` label map."""
        ...
