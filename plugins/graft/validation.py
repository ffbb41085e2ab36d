"""Validation: counts of true and false voxels for each case, gathered over ranks, pooled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import GraftConfig
from .data import GraftData
from .models import as_output
from .regions import Target
from .samples import collate

if TYPE_CHECKING:
    from medrl.core.runtime import ResumableLoader, Runtime

Counts = dict[str, list[list[int]]]
"""By case: for each structure true positive, false positive and false negative voxels."""


@dataclass(frozen=True)
class Validation:
    """The result of one pass over the validation cases.

    Attributes:
        counts: By case, see `Counts`.
        names: Names of the structures.
    """

    counts: Counts
    names: tuple[str, ...]

    def pooled(self) -> dict[str, float]:
        """Dice of each structure over the voxels of all cases; 0 where neither has one.

        Source: specification §7.
        """
        found = {}
        for k, name in enumerate(self.names):
            hit, false, missed = (sum(case[k][i] for case in self.counts.values()) for i in range(3))
            total = 2 * hit + false + missed
            found[name] = 2 * hit / total if total else 0.0
        return found

    def per_case(self) -> dict[str, dict[str, float | None]]:
        """Dice of each case and structure; None where neither prediction nor reference has a voxel."""
        table: dict[str, dict[str, float | None]] = {}
        for case, rows in self.counts.items():
            table[case] = {}
            for name, (hit, false, missed) in zip(self.names, rows, strict=True):
                total = 2 * hit + false + missed
                table[case][name] = 2 * hit / total if total else None
        return table

    def mean(self) -> dict[str, float]:
        """Mean over cases of each structure's Dice; empty cases are left out."""
        table = self.per_case().values()
        found = {}
        for name in self.names:
            values = [value for row in table if (value := row[name]) is not None]
            found[name] = sum(values) / len(values) if values else 0.0
        return found

    def metrics(self) -> dict[str, float]:
        """Numbers for the log; `val_dice` selects the best checkpoint."""
        pooled, mean = self.pooled(), self.mean()
        values = {"val_dice": sum(pooled.values()) / max(1, len(pooled))}
        values["val_dice_case"] = sum(mean.values()) / max(1, len(mean))
        values["val_iou"] = sum(dice / (2 - dice) for dice in pooled.values()) / max(1, len(pooled))
        return values | {f"val_dice_{name}": value for name, value in pooled.items()}


def loader(rt: Runtime, cfg: GraftConfig, data: GraftData) -> ResumableLoader[Any]:
    """The validation cases; no teacher is read."""
    cases = data.val[: cfg.validation.max_cases] if cfg.validation.max_cases else data.val
    samples = data.samples(cases, teachers=False)
    return rt.loader(
        samples, batch_size=cfg.validation.batch_size, shuffle=False, collate=collate, name="validation"
    )


@torch.no_grad()
def validate(rt: Runtime, student: nn.Module, cases: ResumableLoader[Any], target: Target) -> Validation:
    """Segment the windows of all validation cases; the result is the same with any number of ranks."""
    counts: Counts = {}
    structures = list(target.structures)
    student.eval()
    for batch in cases.epoch():
        found = target.decide(target.probabilities(as_output(student(batch.image.to(rt.device))).main))
        hard = found[:, structures].cpu()
        truth = target.encode(batch.label)[:, structures] > 0.5
        triples = torch.stack([(hard & truth), (hard & ~truth), (~hard & truth)]).flatten(3).sum(3)
        for k, case_id in enumerate(batch.case_ids):
            counts[case_id] = [[int(triples[i, k, s]) for i in range(3)] for s in range(len(structures))]
    student.train()
    return Validation(rt.gather(counts), tuple(target.names[k] for k in structures))


def write_summary(rt: Runtime, step: int, result: Validation) -> None:
    """Write ``val/summary.json`` of the run folder."""
    if not rt.is_main:
        return
    folder = rt.run.dir / "val"
    folder.mkdir(exist_ok=True)
    content: Mapping[str, Any] = {
        "step": step,
        **result.metrics(),
        "pooled": result.pooled(),
        "mean": result.mean(),
        "cases": result.per_case(),
    }
    draft = folder / ".summary.json.tmp"
    draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / "summary.json")
