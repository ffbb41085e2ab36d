"""Opening the datasets of both domains, and dividing them by patient."""

from __future__ import annotations

from medrl.core.adaptation.dividing import (
    Division,
    divide_source,
    divide_target,
    is_nnunet,
    nnunet_images,
)
from medrl.core.dataset import Dataset, open_dataset
from medrl.core.errors import ConfigError, DataError

from ..data_config import SourceConfig, TargetConfig
from .readers import find_csv, open_original

METHOD = "rl4seg3d"


def open_domain(data: SourceConfig, name: str, *, with_labels: bool = True) -> Dataset:
    """Open the dataset of a domain.

    Args:
        data: Where it is.
        name: `data` or `target`, for messages.
        with_labels: False lists the sequences of an nnU-Net dataset whether they have labels or not.

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
    original = data.reader == "original" or (data.reader == "auto" and find_csv(root) is not None)
    if original and not is_nnunet(root):
        return open_original(root, exclude=data.exclude, split_column=data.split_column)
    if not with_labels and data.layout in ("auto", "nnunet") and is_nnunet(root):
        return nnunet_images(root, data.exclude)
    return open_dataset(root, layout=data.layout, exclude=data.exclude)


def divided_source(data: SourceConfig, dataset: Dataset) -> Division:
    """Training and validation sequences of the fold; labelled test sequences."""
    return divide_source(data, dataset)


def divided_target(target: TargetConfig, dataset: Dataset) -> Division:
    """Sequences of the target by duty, whether they have labels or not."""
    return divide_target(target, dataset, method=METHOD)
