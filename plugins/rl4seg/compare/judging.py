"""The tool `medrl rl4seg uncertainty`: how far the reward map of a finished run can be trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from medrl.core.checkpoint import find_checkpoint, load_checkpoint
from medrl.core.errors import CheckpointError, DataError
from medrl.core.report import Section, simple_table, write_page
from medrl.core.runtime.session import choose_device

from .. import data as rl4seg_data
from .. import predict, uncertainty
from ..config import Rl4segConfig
from ..scoring import probabilities, segment
from ..uncertainty import Confidence, assess, of_probabilities, of_reward
from .report import TRUST, TRUST_WORDS, quality_table
from .running import aligned

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager


def run(
    manager: PluginManager,
    model: Path,
    output: Path,
    *,
    target: Path | None = None,
    ensemble: Sequence[Path] = (),
    save: Path | None = None,
    device: str = "auto",
    threads: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> list[str]:
    """Measure the confidence of a run in its own predictions on labelled target images.

    Args:
        manager: Source of networks.
        model: Run folder of a loop, or a checkpoint of one.
        output: Folder of ``uncertainty.json`` and ``report.html``.
        target: Dataset with labelled test images; left out, that of the run.
        ensemble: Further runs or checkpoints that, with the model, make an ensemble.
        save: HDF5 file for images, references, predictions and reward maps.
        device: Where networks compute.
        threads: CPU threads.
        say: Shows a line of progress.

    Returns:
        The table as lines.

    Raises:
        CheckpointError: The run has no actor or no reward net.
        DataError: There are no labelled test images.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    place = choose_device(device)
    checkpoint = load_checkpoint(find_checkpoint(model), method="rl4seg")
    cfg, plan, actor = predict.restore(checkpoint, manager)
    net = predict.restore_reward(checkpoint, cfg, plan, manager).to(place)
    actor = actor.to(place)
    test = rl4seg_data.load_target(_aimed(cfg, target), labels="test", plan=plan).test
    if test is None or not test.ids or test.labels is None:
        raise DataError("uncertainty", why="the target has no labelled test images", do="--target DIR")
    images, truth = test.images, np.asarray(test.labels)
    say(f"{len(test.ids)} test images")

    others: list[nn.Module] = []
    for path in ensemble:
        _, other, network = predict.restore(load_checkpoint(find_checkpoint(path), method="rl4seg"), manager)
        if dict(other.label_names) != dict(plan.label_names):
            raise CheckpointError(f"--ensemble {path}", why="its labels are not those of the model")
        others.append(network.to(place))
    masks = segment(actor, images, device=place)
    judged = of_reward(net.reward, masks, images, device=place)
    found: dict[str, Confidence] = {
        "reward": judged,
        "probability": of_probabilities(probabilities(actor, images, device=place)),
        "Monte Carlo dropout": of_probabilities(uncertainty.mc_dropout(actor, images, device=place)),
        "test-time augmentation": of_probabilities(uncertainty.augmented(actor, images, device=place)),
    }
    if others:
        found[f"ensemble of {len(others) + 1}"] = of_probabilities(
            uncertainty.ensemble([actor, *others], images, device=place)
        )
    measured = {name: {0: assess(confidence, truth).as_dict()} for name, confidence in found.items()}
    output.mkdir(parents=True, exist_ok=True)
    plain = {
        name: {key: value if math.isfinite(value) else None for key, value in by[0].items()}
        for name, by in measured.items()
    }
    (output / "uncertainty.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    heads, cells = quality_table(measured, TRUST)
    write_page(
        output / "report.html",
        f"uncertainty of {model.name}",
        [Section("How far confidence can be trusted", simple_table(heads, cells), TRUST_WORDS)],
        facts={"model": model, "target": target or cfg.target.root, "test images": len(test.ids)},
    )
    if save is not None:
        uncertainty.save_maps(save, test.ids, images.numpy(), truth, judged)
        say(f"maps: {save}")
    say(f"report: {output / 'report.html'}")
    return aligned(heads, cells, left=1)


def _aimed(cfg: Rl4segConfig, target: Path | None) -> Rl4segConfig:
    """The config with another target."""
    if target is None:
        return cfg
    return cfg.model_copy(update={"target": cfg.target.model_copy(update={"root": target})})
