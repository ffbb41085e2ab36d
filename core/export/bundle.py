"""MONAI bundles: metadata, an inference config and a TorchScript network, as MONAI's own tools read them.

The network is TorchScript, so that a bundle runs where medrl is not installed. Where MONAI has transforms
that prepare an image as the method does, the config reads images from ``dataset_dir`` and writes label maps
to ``output_dir`` when ``run`` is asked for. Elsewhere it offers the network and how windows are joined, and
the metadata say how an image is prepared.
"""

from __future__ import annotations

import importlib.metadata
import json
import zipfile
from pathlib import Path
from typing import Any

from medrl.core.errors import CheckpointError
from medrl.core.export.network import Network

METADATA = Path("configs") / "metadata.json"
INFERENCE = Path("configs") / "inference.json"
MODEL = Path("models") / "model.ts"
_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
_KEY = "medrl"


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle that has metadata and an inference config."""
    return (folder / METADATA).is_file() and (folder / INFERENCE).is_file()


def write(network: Network, script: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write a bundle.

    Args:
        network: What is exported.
        script: The same as TorchScript.
        folder: A new folder.
        facts: Kept in the metadata.
    """
    for path in (METADATA, MODEL):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    script.save(str(folder / MODEL))
    forget_sources(folder / MODEL)
    for path, content in ((METADATA, _metadata(network, facts)), (INFERENCE, _inference(network))):
        (folder / path).write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def forget_sources(path: Path) -> None:
    """Leave out of a TorchScript file where in the source each operation came from.

    These records are for debuggers and name folders of the machine that exported.
    """
    with zipfile.ZipFile(path) as archive:
        kept = [(name, archive.read(name)) for name in archive.namelist() if not name.endswith(".debug_pkl")]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in kept:
            archive.writestr(zipfile.ZipInfo(name), content)


def facts(folder: Path) -> dict[str, Any]:
    """The facts in the metadata of a bundle.

    Raises:
        CheckpointError: There are none.
    """
    try:
        found = json.loads((folder / METADATA).read_text(encoding="utf-8"))[_KEY]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(folder), why=f"no bundle that medrl exported ({type(error).__name__})", do="export again"
        ) from error
    if not isinstance(found, dict) or "inputs" not in found:
        raise CheckpointError(str(folder), why="no bundle that medrl exported", do="export again")
    return found


def load(folder: Path) -> Any:
    """The network of a bundle, by MONAI's config parser.

    Raises:
        CheckpointError: The bundle is damaged.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    try:
        parser.read_config(str(folder / INFERENCE))
        parser.read_meta(str(folder / METADATA))
        parser["bundle_root"] = str(folder)
        parser["device"] = "$torch.device('cpu')"
        return parser.get_parsed_content("network")
    except Exception as error:  # the parser raises whatever its parts raise
        lines = str(error).strip().splitlines() or [""]
        why = f"it cannot be read: {type(error).__name__}: {lines[0][:300]}"
        raise CheckpointError(
            str(folder), why=why, do="medrl model export RUN --format monai-bundle"
        ) from error


def _inference(network: Network) -> dict[str, Any]:
    size = list(next(iter(network.inputs.values())))[1:]
    inferer: dict[str, Any] = {"_target_": "SimpleInferer"}
    if network.windows:
        inferer = {
            "_target_": "SlidingWindowInferer",
            "roi_size": size,
            "sw_batch_size": 1,
            "overlap": 0.5,
            "mode": "gaussian",
        }
    config: dict[str, Any] = {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "torch.jit.load",
            "f": f"$os.path.join(@bundle_root, '{MODEL.parent}', '{MODEL.name}')",
            "map_location": "@device",
        },
        "network": "$@network_def.to(@device).eval()",
        "inferer": inferer,
    }
    if not network.before:
        return config
    activation = {"softmax": {"softmax": True}, "sigmoid": {"sigmoid": True}, "none": {}}[network.activation]
    return config | {
        "dataset_dir": "$os.path.join(@bundle_root, 'images')",
        "output_dir": "$os.path.join(@bundle_root, 'labels')",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                *(dict(item) for item in network.before),
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", **activation},
                *(dict(item) for item in network.after),
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "",
                    "separate_folder": False,
                    "resample": False,
                    "print_log": False,
                },
            ],
        },
        "answer": "$lambda image: @inferer(image[None].to(@device), @network)[0].cpu()",
        "run": ["$[@postprocessing({**case, 'pred': @answer(case['image'])}) for case in @dataset]"],
    }


def _metadata(network: Network, facts: dict[str, Any]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("monai", "torch", "numpy", "nibabel")}
    shape = next(iter(network.inputs.values()))
    channels = list(network.channel_names) or [f"channel {number}" for number in range(shape[0])]
    labels = {str(value): name for name, value in network.label_names.items()}
    classes = len(facts["check"]["outputs"][network.outputs[0]]["shape"]) > 1
    outputs = facts["check"]["outputs"][network.outputs[0]]["shape"][1] if classes else 1
    if len(labels) != outputs:
        labels = {str(number): f"output {number}" for number in range(outputs)}
    spatial = list(shape[1:])
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"].partition("+")[0],
        "numpy_version": versions["numpy"],
        "required_packages_version": {"nibabel": versions["nibabel"]},
        "name": f"{facts['method']} {facts['network']}",
        "task": "segmentation" if network.label_names else facts["method"],
        "description": f"{facts['network']} of a checkpoint of medrl's method {facts['method']}. "
        f"Input: {network.preparation or 'see the method'}.",
        "authors": "see the method",
        "copyright": "see the method",
        "intended_use": "research; not a medical device",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": shape[0],
                    "spatial_shape": spatial,
                    "dtype": "float32",
                    "value_range": list(network.value_range),
                    "is_patch_data": network.windows,
                    "channel_def": {str(number): name for number, name in enumerate(channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation" if network.label_names else "other",
                    "num_channels": outputs,
                    "spatial_shape": spatial,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": network.windows,
                    "channel_def": labels,
                }
            },
        },
        _KEY: facts,
    }
