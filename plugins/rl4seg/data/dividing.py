"""Which cases of a dataset do what: train, watch over training, test. No image and no label is opened."""

from __future__ import annotations

from pathlib import Path

from medrl.core.adaptation import dividing
from medrl.core.adaptation.dividing import Division, divide_source, is_nnunet, nnunet_images
from medrl.core.dataset import Dataset, open_dataset
from medrl.core.errors import ConfigError, DataError

from ..data_config import SourceConfig, TargetConfig
from .readers import csv_reader, find_csv, looks_like_camus, open_camus, open_esed
from .vital import open_vital

__all__ = ["Division", "divide_source", "divide_target", "open_domain"]

_READERS = {"camus": open_camus, "esed": open_esed, "vital": open_vital}


def open_domain(data: SourceConfig, name: str, *, with_labels: bool = True) -> Dataset:
    """Open the dataset of a domain.

    Args:
        data: Where it is.
        name: `data` or `target`, for messages.
        with_labels: False lists the images of an nnU-Net dataset whether they have labels or not.

    Raises:
        ConfigError: No folder is named.
        DataError: Nothing usable is there.
    """
    root = data.root
    if root is None:
        option = "--data" if name == "data" else "--target"
        raise ConfigError(f"{name}.root", why="no dataset is named", do=f"{option} DIR")
    if not root.exists():
        raise DataError(str(root), why="no such dataset", do=f"check {name}.root")
    reader = data.reader if data.reader != "auto" else _recognised(root, data.layout)
    if reader != "core":
        made: Dataset = _READERS[reader](
            root, exclude=data.exclude, split_column=data.split_column, fold=data.fold
        )
        return made
    if not with_labels and data.layout in ("auto", "nnunet") and is_nnunet(root):
        return nnunet_images(root, data.exclude)
    return open_dataset(root, layout=data.layout, exclude=data.exclude)


def divide_target(target: TargetConfig, dataset: Dataset) -> Division:
    """Cases of the target by duty, whether they have labels or not; see `medrl.core.adaptation.dividing`."""
    return dividing.divide_target(target, dataset, method="rl4seg")


def _recognised(root: Path, layout: str) -> str:
    if layout != "auto":
        return "core"
    if root.is_file():
        suffix = root.suffix.lower()
        if suffix == ".csv":
            return csv_reader(root)
        return "vital" if suffix in (".h5", ".hdf5") else "core"
    if (root / "dataset.json").is_file() or (root / "cases.json").is_file():
        return "core"
    table = find_csv(root)
    if table is not None:
        return csv_reader(table)
    return "camus" if looks_like_camus(root) else "core"
