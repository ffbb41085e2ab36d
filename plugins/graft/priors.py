"""What is known about the teachers before training: their quality on labelled cases, and weights from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError, DataError

from .config import GraftConfig
from .data import GraftData
from .duties import stratified
from .features import LOGITS
from .samples import Batch, collate
from .teachers import unseen_means
from .weighting import (
    from_quality,
    probe_scores,
    teacher_quality,
    uniform,
    with_floor,
)

MIN_FLOOR = 0.01
"""Least floor of weighting `reinforce`: a teacher without weight can never prove itself again."""


class Priors(nn.Module):
    """Qualities and starting weights of the teachers.

    Buffers only, so that ranks share them and checkpoints keep them.

    Args:
        teachers: N.
        kinds: What is weighed: taps, and ``logits``.

    Attributes:
        quality: ``(N,)`` Dice of the logits on the labelled cases.
    """

    quality: Tensor

    def __init__(self, teachers: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.register_buffer("quality", torch.zeros(teachers))
        for kind in self.kinds:
            self.register_buffer(f"quality_{kind}", torch.zeros(teachers))
            self.register_buffer(f"weights_{kind}", uniform(teachers)[0])

    def weights(self, kind: str) -> Tensor:
        """Starting weights ``(N,)`` of a tap or of the logits."""
        found: Tensor = self.get_buffer(f"weights_{kind}")
        return found

    def batch(self, size: int) -> dict[str, Tensor]:
        """Starting weights of a batch, ``(B, N)`` by kind."""
        return {kind: self.weights(kind).expand(size, -1) for kind in self.kinds}


@torch.no_grad()
def measure(cfg: GraftConfig, data: GraftData, kinds: Sequence[str]) -> Priors:
    """Measure the teachers on labelled training cases and set the starting weights.

    Without anything to weigh nothing is measured.

    Raises:
        DataError: Weighting by quality without a labelled case, or a feature file does not fit.
    """
    if not kinds:
        return Priors(1, ())
    mode = prior_mode(cfg)
    priors = Priors(len(data.teachers), kinds)
    if mode == "fixed":
        for kind in kinds:
            priors.weights(kind).copy_(_fixed(cfg, len(data.teachers)))
    if not data.labelled:
        if mode not in ("uniform", "fixed"):
            raise DataError(
                f"weighting '{mode}'", why="no training case has a label", do="--weighting uniform"
            )
        return priors
    cases = data.labelled
    if 0 < cfg.weighting.cases < len(cases):
        cases = stratified(cases, cfg.weighting.cases, cfg.train.seed, "quality", data.store)
    found = data.samples(cases, teachers=True)
    samples = [found[k] for k in range(len(found))]
    seen = data.in_sample([case.id for case in cases]) if out_of_fold(cfg) else None
    scores = torch.stack([_logit_quality(sample, data) for sample in samples])
    priors.quality.copy_(scores.mean(dim=0) if seen is None else unseen_means(scores, seen))
    floor = floor_of(cfg)
    for kind in kinds:
        quality, temperature = priors.quality, cfg.weighting.temperature
        if mode == "probe" and kind != LOGITS:
            quality, temperature = _probe(data, samples, kind, seen), cfg.weighting.probe_temperature
        priors.get_buffer(f"quality_{kind}").copy_(quality)
        if mode not in ("uniform", "fixed"):
            weights = with_floor(from_quality(quality, temperature=temperature), floor)
            priors.weights(kind).copy_(weights)
    return priors


def prior_mode(cfg: GraftConfig) -> str:
    """What the starting weights are: of `align` and `reinforce` the prior, of `meta` and `legacy` uniform."""
    mode = cfg.weighting.mode
    if mode in ("align", "reinforce"):
        return cfg.weighting.prior
    return "uniform" if mode in ("meta", "legacy") else mode


def _fixed(cfg: GraftConfig, teachers: int) -> Tensor:
    """The given weights, summing to one, ``(N,)``."""
    given = cfg.weighting.fixed
    if len(given) != teachers:
        raise ConfigError(
            "weighting.fixed",
            why=f"{len(given)} numbers for {teachers} teachers",
            do="give one for each teacher, in their order",
        )
    weights = torch.tensor(given, dtype=torch.float64)
    return (weights / weights.sum()).float()


def floor_of(cfg: GraftConfig) -> float:
    """Part of the weight that is shared equally."""
    return max(cfg.weighting.floor, MIN_FLOOR) if cfg.weighting.mode == "reinforce" else cfg.weighting.floor


def batch_quality(batch: Batch, data: GraftData) -> Tensor:
    """Dice of each teacher's logits on each sample of a batch, ``(B, N)``; meaningless where unlabelled."""
    target = data.plan.target
    return teacher_quality(batch.logits, target.encode(batch.label), target, families=data.families)


def out_of_fold(cfg: GraftConfig) -> bool:
    """Whether quality is measured on cases that a teacher was not trained on."""
    return cfg.teachers.oof in ("mean", "unseen")


def _logit_quality(sample: Mapping[str, Any], data: GraftData) -> Tensor:
    """Dice of each teacher on one sample, ``(N,)``."""
    batch = collate([sample], data.device)
    return batch_quality(data.complete(batch, taps=()), data)[0].cpu()


def _probe(data: GraftData, samples: Sequence[Mapping[str, Any]], tap: str, seen: Tensor | None) -> Tensor:
    """Probe quality of each teacher's features, ``(N,)``; with `seen` ``(K, N)``, on unseen cases only."""
    labels: list[Tensor] = [sample["label"] for sample in samples]

    def reader(teacher: int) -> Callable[[int], Tensor]:
        if data.live is None:
            return lambda k: samples[k]["features"][tap][teacher].float()
        live = data.live
        return lambda k: live.ask(teacher, collate([samples[k]], live.device), (tap,))[tap][0].float()

    scores = probe_scores([reader(teacher) for teacher in range(len(data.teachers))], labels)
    return scores.nanmean(dim=0).nan_to_num(0.0) if seen is None else unseen_means(scores, seen)
