"""Opening the datasets of both domains, and dividing them by patient."""

from __future__ import annotations

from dataclasses import replace

from medrl.core.adaptation.dividing import (
    Division,
    divide_source,
    divide_target,
    is_nnunet,
    nnunet_images,
)
from medrl.core.dataset import Dataset, open_dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.rng import numpy_generator

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
        return open_original(
            root,
            exclude=data.exclude,
            split_column=data.split_column,
            max_image_area=data.max_image_area,
        )
    if not with_labels and data.layout in ("auto", "nnunet") and is_nnunet(root):
        return nnunet_images(root, data.exclude)
    return open_dataset(root, layout=data.layout, exclude=data.exclude)


def divided_source(data: SourceConfig, dataset: Dataset) -> Division:
    """Training and validation sequences of the fold; labelled test sequences."""
    return _part(divide_source(data, dataset), data, "source")


def divided_target(target: TargetConfig, dataset: Dataset) -> Division:
    """Sequences of the target by duty, whether they have labels or not."""
    return _part(divide_target(target, dataset, method=METHOD), target, "target")


def _part(division: Division, data: SourceConfig, domain: str) -> Division:
    """Keep the part of the training sequences that ``subset_frac`` names, at least one."""
    count = len(division.train)
    wanted = data.subset_frac if data.subset_frac > 1.0 else data.subset_frac * count
    kept = min(count, max(1, round(wanted)))
    if kept == count:
        return division
    order = numpy_generator(data.split_seed, METHOD, "subset", domain).permutation(count)
    return replace(division, train=tuple(division.train[n] for n in sorted(order[:kept].tolist())))
