"""Stage `test`: each actor of a loop on target test sequences; the only stage that reads their labels."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core.adaptation.parts import rules_of
from medrl.core.volume.write import write_bytes

from . import parts
from .config import Rl4seg3dConfig
from .domains import Domains, test_sequences
from .scoring import NUMBERS, score

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
        device: Where networks compute.
        beat: Called between sequences; it raises to stop.

    Returns:
        The content: ``final``, ``summary`` by actor, ``images`` of the final one.
    """
    sequences = test_sequences(cfg, data)
    rules = rules_of(cfg.rules, data.label_names)
    summary: dict[str, dict[str, float]] = {}
    rows: dict[str, Any] = {}
    for name, place in actors.items():
        network = parts.actor_network(cfg, manager, channels=data.channels, classes=data.classes)
        parts.load_part(place, "actor", network, f"actor {name}")
        actor = parts.as_actor(network, data.classes).to(device).eval()
        scores = score(actor.logits, sequences, rules, cfg.temporal_rules, device=device, beat=beat)
        summary[name] = scores.summary()
        rows = scores.as_dict() if name == final else rows
        shown = ", ".join(f"{key} {value:.3f}" for key, value in headline(summary[name]).items())
        _log.info("%s on %d target test sequences: %s", name, len(sequences), shown)
    content = {
        "final": final,
        "labels": sequences.labels is not None,
        "summary": {
            name: {key: value if value == value else "nan" for key, value in numbers.items()}
            for name, numbers in summary.items()
        },
        "images": rows,
    }
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
    return content


def headline(summary: Mapping[str, float]) -> dict[str, float]:
    """Return the few numbers that matter most."""
    return {key: summary[key] for key in NUMBERS if key in summary}
