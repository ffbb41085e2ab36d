"""Stage `test`: each actor of a loop on target test images; the only stage that reads their labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core.validity import validity_rate
from medrl.core.volume.write import write_bytes

from . import parts
from .config import Rl4segConfig
from .domains import Domains, test_images
from .scoring import Scores, largest_blob, score, segment

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

FILE = "test.json"
_log = logging.getLogger("medrl.rl4seg")


def write(
    path: Path,
    cfg: Rl4segConfig,
    manager: PluginManager,
    data: Domains,
    actors: Mapping[str, Path],
    *,
    final: str,
    device: torch.device,
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Score actors on target test images and write ``test.json``.

    Greedy label maps, the largest blob of foreground, Dice and distances image by image; where the target has
    no test labels, only the share of valid masks.

    Args:
        path: The file.
        cfg: The config.
        manager: Source of networks.
        data: Both domains.
        actors: Checkpoint of each actor by name, in the order of the loop.
        final: Name of the one that is the result.
        device: Where networks compute.
        beat: Called between actors; it raises to stop.

    Returns:
        The content: ``final``, ``summary`` by actor, ``images`` of the final one.
    """
    images = test_images(cfg, data)
    rules = parts.rules_of(cfg, data.label_names)
    summary: dict[str, dict[str, float]] = {}
    rows: dict[str, Any] = {}
    for name, place in actors.items():
        beat()
        network = parts.actor_network(cfg, manager, channels=data.channels, classes=data.classes)
        parts.load_part(place, "actor", network, f"actor {name}")
        actor = parts.as_actor(cfg, network, data.classes).to(device).eval()
        if images.labels is None:
            masks = largest_blob(segment(actor, images.images, device=device).numpy())
            summary[name] = {"valid": validity_rate(masks, rules)}
        else:
            scores: Scores = score(actor, images, rules, device=device)
            summary[name] = scores.summary()
            rows = scores.as_dict() if name == final else rows
        shown = ", ".join(f"{key} {value:.3f}" for key, value in headline(summary[name]).items())
        _log.info("%s on %d target test images: %s", name, len(images.ids), shown)
    content = {"final": final, "labels": images.labels is not None, "summary": summary, "images": rows}
    write_bytes(path, (json.dumps(_plain(content), indent=2) + "\n").encode())
    return content


def headline(summary: Mapping[str, float]) -> dict[str, float]:
    """Return the few numbers that matter most."""
    return {key: summary[key] for key in ("dice", "hd95", "valid") if key in summary}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
