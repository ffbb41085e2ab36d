"""What the config leaves open, decided for one dataset: window, size, normalisation, target, network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from medrl.core.cache import Cache
from medrl.core.dataset import Dataset
from medrl.core.errors import ConfigError, DataError
from medrl.core.types import Case

from .config import GraftConfig
from .plans import SamplePlan, read_statistics
from .samples import CaseStore, mask_path
from .windows import MASK_DEPTH, Size, rounded_up

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

MAX_WINDOW_VOXELS = 16_000_000
"""A window larger than this that nobody asked for by numbers is refused."""


def resolve_plan(
    cfg: GraftConfig, dataset: Dataset, cases: Sequence[Case], divisor: Size, cache: Cache | None
) -> SamplePlan:
    """Turn every `auto` of the config into what this dataset needs.

    Raises:
        DataError: The images are too large for a window of their size.
    """
    sample = cfg.sample
    masked = all(mask_path(case, sample.mask) is not None for case in cases)
    stats_file = sample.stats_file or dataset.info.get("statistics")
    statistics = read_statistics(stats_file, dataset.channel_names) if stats_file else {}
    normalization: str = sample.normalization
    if normalization == "auto":
        normalization = "stats" if statistics else "mask" if masked else "volume"
    window: str = sample.window
    if window == "auto":
        window = "mask" if masked else "centre"
    target: str = cfg.target.kind
    if target in ("auto", "regions"):
        target = dataset.info.get("target", "auto")
    if target == "auto":
        prostate = masked and sorted(dataset.labels.values()) == [0, 1, 2, 3]
        target = "binary" if prostate else "classes"
    if cfg.target.kind == "regions":
        whole = "3class" if sorted(dataset.labels.values()) == [0, 1, 2, 3] else "nested"
        target = {"binary_classes": "binary", "classes": whole}.get(target, target)
    if target in ("binary", "3class") and max(dataset.labels.values()) > 3:
        raise ConfigError(
            "target.kind",
            why=f"`{target}` is for prostate labels 0 to 3, this dataset has {dict(dataset.labels)}",
            do="--set target.kind=classes",
        )
    draft = SamplePlan(
        window=window,
        size=sample.size,
        mask=sample.mask,
        normalization=normalization,
        statistics=statistics,
        target_kind=target,
        labels=dataset.labels,
        channel_names=dataset.channel_names,
    )
    store = CaseStore(dataset, draft, cache)
    size = sample.size
    prepared = [store.get(case) for case in cases]
    if 0 in size:
        largest = np.max([item.shape for item in prepared], axis=0)
        if window == "mask":
            largest[0] = MASK_DEPTH
        size = rounded_up([given or int(found) for given, found in zip(size, largest, strict=True)], divisor)
        if np.prod(size) > MAX_WINDOW_VOXELS:
            raise DataError(
                f"dataset {dataset.name}",
                why=f"its largest image would need a window of {size} voxels",
                do="give one, for example --set sample.size=[32,128,128]",
            )
    elif size != rounded_up(size, divisor):
        raise ConfigError(
            "sample.size",
            why=f"{list(size)} must be multiples of {list(divisor)} for model {cfg.model.name}",
            do=f"--set sample.size={list(rounded_up(size, divisor))}".replace(" ", ""),
        )
    x, y, z = (float(value) for value in np.median([item.spacing for item in prepared], axis=0))
    return replace(draft, size=size, spacing=(x, y, z))


def divisor_of(cfg: GraftConfig, manager: PluginManager, dataset: Dataset) -> Size:
    """Multiples that the student needs in depth, height and width; nothing is allocated."""
    with torch.device("meta"):
        network = build_network(cfg, manager, len(dataset.channel_names), 2)
    depth, height, width = getattr(network, "divisor", (1, 1, 1))
    return int(depth), int(height), int(width)


def build_network(cfg: GraftConfig, manager: PluginManager, in_channels: int, out_channels: int) -> nn.Module:
    """Build the student, or a teacher, by its registry key.

    Raises:
        ConfigError: Unknown key or parameters, or parameters that the data decide.
    """
    params = cfg.model.params
    for name in ("in_channels", "out_channels"):
        if name in params:
            raise ConfigError(f"model.{name}", why="the dataset decides it", do=f"leave out model.{name}")
    if cfg.model.name.startswith("graft.") and "deep_supervision" not in params:
        params["deep_supervision"] = cfg.loss.deep_supervision
    network: nn.Module = manager.registry("models").build(
        cfg.model.name, in_channels=in_channels, out_channels=out_channels, **params
    )
    return network
