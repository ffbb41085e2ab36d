"""Which confidence finds errors, and how far each can be trusted, on labelled target test images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from medrl.core.learned_reward.composite import CompositeReward

from .. import uncertainty
from ..scoring import probabilities, segment
from ..uncertainty import Confidence, assess, of_probabilities, of_reward

if TYPE_CHECKING:
    from .catalogue import Method
    from .work import SeedStudy

NAME = "confidence.json"
"""File of a seed with what was measured."""

MEMBERS = 3
_STAGE = "confidence"

RewardFn = Callable[[Tensor, Tensor], Tensor]


def measure(study: SeedStudy, methods: Sequence[Method], *, members: int = MEMBERS) -> None:
    """Judge the rewards and confidences of a seed, unless that is done.

    Args:
        study: The seed.
        methods: Methods that took part.
        members: Networks of the ensemble; with fewer than two there is none.
    """
    keys = applies(study, methods)
    if not keys:
        return
    known = {key for key in keys if (study.folder / "scores" / f"{key}.json").is_file()}
    study.record(_STAGE).stage(
        _STAGE,
        inputs=_inputs(study, keys, known, members),
        outputs=[Path("scores") / NAME],
        run=lambda: _measure(study, known, members),
    )


def is_measured(study: SeedStudy, methods: Sequence[Method], *, members: int = MEMBERS) -> bool:
    """Whether `measure` would find everything done, or nothing to do."""
    keys = applies(study, methods)
    if not keys or study.lacking(["source", "reward"]):
        return not keys
    known = {key for key in keys if (study.folder / "scores" / f"{key}.json").is_file()}
    return study.record(_STAGE).is_done(
        _STAGE, inputs=_inputs(study, keys, known, members), outputs=[Path("scores") / NAME]
    )


def applies(study: SeedStudy, methods: Sequence[Method]) -> set[str]:
    """Return the keys of the methods where there is something to judge; else none."""
    keys = {method.key for method in methods}
    return keys if "source" in keys and study.cfg.learns_reward else set()


def _inputs(study: SeedStudy, keys: set[str], known: set[str], members: int) -> dict[str, Any]:
    """What decides the measurement, of methods asked for and of those that have scores."""
    inputs: dict[str, Any] = {
        "config": study.resolved.hash,
        "members": members,
        "methods": sorted(keys & {"style", "style-ppo", "ppo-original"}),
        "images": study.domains.digest(),
        "source": study.shared("source"),
        "reward": study.shared("reward"),
    }
    for key in known & {"style-ppo", "ppo-original"}:
        inputs[key] = study.folder / "scores" / f"{key}.json"
    return inputs


def _measure(study: SeedStudy, keys: set[str], members: int) -> None:
    study.say(f"seed {study.seed}: confidence of rewards and networks")
    truth = np.asarray(study.test.labels)
    found = {
        "finding": {name: assess(c, truth).as_dict() for name, c in finding(study, keys).items()},
        "trust": {name: assess(c, truth).as_dict() for name, c in trusted(study, keys, members).items()},
    }
    path = study.folder / "scores" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")


def finding(study: SeedStudy, keys: set[str]) -> dict[str, Confidence]:
    """What each confidence says about the source-only predictions."""
    source = study.start("source")
    images, device = study.test.images, study.device
    masks = segment(source, images, device=device)

    def of(network: Any) -> Confidence:
        p = probabilities(network, images, device=device)
        chosen = p.gather(1, masks.long()[:, None])[:, 0]
        return Confidence(masks.numpy(), chosen.numpy())

    found = {"source actor's probability": of(source)}
    if "style" in keys or "style-ppo" in keys:
        found["style actor's probability"] = of(study.start("style"))
    rewards: dict[str, RewardFn] = {"reward net, class head": study.reward_net.reward}
    if _has_composite(study):
        rewards["full reward (class head and corrector)"] = composite(study)
    if "ppo-original" in keys:
        rewards["reward of the original (binary head)"] = original_reward(study)
    for name, reward in rewards.items():
        found[name] = of_reward(reward, masks, images, device=device)
    return found


def trusted(study: SeedStudy, keys: set[str], members: int) -> dict[str, Confidence]:
    """The confidence of each method in its own predictions."""
    images, device = study.test.images, study.device
    source = study.start("source")
    found = {
        "source-only, probability": of_probabilities(probabilities(source, images, device=device)),
        "source-only, Monte Carlo dropout": of_probabilities(
            uncertainty.mc_dropout(source, images, seed=study.seed, device=device)
        ),
        "source-only, test-time augmentation": of_probabilities(
            uncertainty.augmented(source, images, seed=study.seed, device=device)
        ),
    }
    if members > 1:
        found[f"source-only, ensemble of {members}"] = of_probabilities(
            uncertainty.ensemble(study.members(members), images, device=device)
        )
    if "style-ppo" not in keys:
        return found
    actor = study.actor(study.run_folder("style-ppo"))
    masks = segment(actor, images, device=device)
    found["rl4seg, probability"] = of_probabilities(probabilities(actor, images, device=device))
    found["rl4seg, Monte Carlo dropout"] = of_probabilities(
        uncertainty.mc_dropout(actor, images, seed=study.seed, device=device)
    )
    found["rl4seg, test-time augmentation"] = of_probabilities(
        uncertainty.augmented(actor, images, seed=study.seed, device=device)
    )
    found["rl4seg, reward net"] = of_reward(study.reward_net.reward, masks, images, device=device)
    if _has_composite(study):
        found["rl4seg, full reward"] = of_reward(composite(study), masks, images, device=device)
    return found


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Read numbers that JSON may have written as NaN."""
    return {name: float(value) if value is not None else math.nan for name, value in values.items()}


def composite(study: SeedStudy) -> RewardFn:
    """The full reward of a study: class head and corrector."""
    made = CompositeReward(study.reward_net, study.corrector, weight=study.weight)
    return made.to(study.device).reward


def original_reward(study: SeedStudy) -> RewardFn:
    """The binary reward net of the last iteration of ``ppo-original``."""
    found: RewardFn = study.trained_reward("ppo-original").reward
    return found


def _has_composite(study: SeedStudy) -> bool:
    return bool(study.cfg.reward.name == "rl4seg.composite" and study.cfg.reward.head == "class")
