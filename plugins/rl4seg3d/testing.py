"""Stage `test`: each actor of a loop on target test sequences; the only stage that reads their labels."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.adaptation.parts import rules_of
from medrl.core.adaptation.rewards import RewardFn
from medrl.core.volume.write import write_bytes

from . import parts
from .config import Rl4seg3dConfig
from .domains import Domains, SequenceSet, test_sequences
from .predicting import Segmenter
from .rewards import FusedReward
from .scoring import NUMBERS, Scores, score_masks, segment

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

FILE = "test.json"
_log = logging.getLogger("medrl.rl4seg3d")


def write(
    path: Path,
    cfg: Rl4seg3dConfig,
    manager: PluginManager,
    data: Domains,
    actors: Mapping[str, Path],
    *,
    final: str,
    nets: Mapping[str, Path],
    device: torch.device,
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Score actors on target test sequences and write ``test.json``.

    Windows blended over whole sequences, the largest blob of each frame: overlap, distance, landmarks
    (``LM/…``) and validity; where the target has no test labels, only validity.

    Args:
        path: The file.
        cfg: The config.
        manager: Source of networks.
        data: Both domains.
        actors: Checkpoint of each actor by name, in the order of the loop.
        final: Name of the one that is the result.
        nets: Checkpoints of the reward nets by name; they judge every sequence as `medrl predict` does.
        device: Where networks compute.
        beat: Called between sequences; it raises to stop.

    Returns:
        The content: ``final``, ``summary`` by actor, ``images`` of the final one, and ``validated``, its
        summary over the sequences whose worst frame reaches each of ``test.worst_frame_thresholds``.
    """
    sequences = test_sequences(cfg, data)
    rules = rules_of(cfg.rules, data.label_names)
    reward = judge_of(cfg, manager, data, nets, device)
    summary: dict[str, dict[str, float]] = {}
    rows: dict[str, Any] = {}
    validated: dict[str, Any] = {}
    for name, place in actors.items():
        network = parts.actor_network(cfg, manager, channels=data.channels, classes=data.classes)
        parts.load_part(place, "actor", network, f"actor {name}")
        actor = parts.as_actor(network, data.classes).to(device).eval()
        masks = []
        for image in sequences.images:
            beat()
            masks.append(segment(actor.logits, image.to(torch.float32).div(255.0), device=device))
        scores = score_masks(masks, sequences, rules, cfg.temporal_rules)
        if reward is not None:
            scores = rewarded(scores, reward, masks, sequences, device)
        summary[name] = scores.summary()
        if name == final:
            rows = scores.as_dict()
            validated = {f"{limit:g}": _left(scores, limit) for limit in cfg.test.worst_frame_thresholds}
        shown = ", ".join(f"{key} {value:.3f}" for key, value in headline(summary[name]).items())
        _log.info("%s on %d target test sequences: %s", name, len(sequences), shown)
    content = {
        "final": final,
        "labels": sequences.labels is not None,
        "summary": {name: _plain(numbers) for name, numbers in summary.items()},
        "validated": validated,
        "images": rows,
    }
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
    return content


def judge_of(
    cfg: Rl4seg3dConfig,
    manager: PluginManager,
    data: Domains,
    nets: Mapping[str, Path],
    device: torch.device,
) -> FusedReward | None:
    """The rewards of trained nets made one, without corrector and not stretched; None without nets."""
    inputs = cfg.inputs.model_copy(update=dict(nets))
    own = cfg.model_copy(update={"inputs": inputs})
    found: dict[str, RewardFn] = {
        name: parts.ready_net(own, manager, name, data).to(device).reward
        for name in cfg.reward.nets
        if name in nets
    }
    return FusedReward(found, fusion=cfg.reward.fusion, stretch=False) if found else None


def rewarded(
    scores: Scores,
    reward: FusedReward,
    masks: Sequence[NDArray[np.uint8]],
    sequences: SequenceSet,
    device: torch.device,
) -> Scores:
    """Add ``reward``, its mean over a sequence, and ``worst_frame_reward`` to scores."""
    segmenter = Segmenter(device=device)
    means, worst = [], []
    for image, mask in zip(sequences.images, masks, strict=True):
        judged = segmenter.reward(
            lambda images, labels: reward(labels, images),
            image[0].to(torch.float32).div(255.0),
            torch.from_numpy(mask),
        )
        frames = [float(values.mean()) for _, values in judged]
        means.append(sum(frames) / len(frames))
        worst.append(min(frames))
    added = {"reward": tuple(means), "worst_frame_reward": tuple(worst)}
    return replace(scores, values={**scores.values, **added})


def _left(scores: Scores, limit: float) -> dict[str, Any]:
    """Number and summary of the sequences whose worst frame reaches a reward."""
    worst = scores.values.get("worst_frame_reward", ())
    kept = [number for number, value in enumerate(worst) if value >= limit]
    values = {name: tuple(found[n] for n in kept) for name, found in scores.values.items()}
    some = replace(
        scores,
        ids=tuple(scores.ids[n] for n in kept),
        subjects=tuple(scores.subjects[n] for n in kept),
        values=values,
    )
    return {"sequences": len(kept), "summary": _plain(some.summary()) if kept else {}}


def _plain(numbers: Mapping[str, float]) -> dict[str, float | str]:
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}


def headline(summary: Mapping[str, float]) -> dict[str, float]:
    """Return the few numbers that matter most."""
    return {key: summary[key] for key in NUMBERS if key in summary}
