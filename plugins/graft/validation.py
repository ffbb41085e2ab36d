"""Validation during training: voxels counted on every rank and summed, so that nothing depends on ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medrl.core.metrics import auroc, average_precision, hd95

from .config import GraftConfig
from .data import GraftData
from .models import StudentOutput, as_output
from .objective import Objective
from .samples import Batch, collate

if TYPE_CHECKING:
    from medrl.core.runtime import ResumableLoader, Runtime
    from medrl.core.types import Case

SUBSET = 20
"""Cases of `validation.mode: subset` unless the config says how many. Source: `--val-subset-size`."""


@dataclass(frozen=True)
class CaseCounts:
    """What one validation case gave.

    Attributes:
        voxels: For each structure true positive, false positive and false negative voxels.
        loss: Supervised loss; NaN if it was not measured.
        score: Largest probability of a focus channel.
        positive: Whether the case has a voxel of a focus channel.
        hd95: For each structure in mm; infinite where only one side has it, NaN where neither has.
    """

    voxels: tuple[tuple[int, int, int], ...]
    loss: float = math.nan
    score: float = math.nan
    positive: bool = False
    hd95: tuple[float, ...] = ()


@dataclass(frozen=True)
class Validation:
    """The result of one pass over the validation cases.

    Attributes:
        cases: By case identifier.
        names: Names of the structures.
        focus: Positions among `names` that quality and reward look at: cancer in the prostate.
    """

    cases: Mapping[str, CaseCounts]
    names: tuple[str, ...]
    focus: tuple[int, ...] = field(default=())

    def pooled(self, metric: str = "dice") -> dict[str, float]:
        """Dice or IoU of each structure over the voxels of all cases; 0 where neither has one.

        Source: specification §7.
        """
        found = {}
        for k, name in enumerate(self.names):
            voxels = [sum(case.voxels[k][i] for case in self.cases.values()) for i in range(3)]
            score = overlap(voxels, metric)
            found[name] = 0.0 if score is None else score
        return found

    def per_case(self, metric: str = "dice") -> dict[str, dict[str, float | None]]:
        """Dice or IoU of each case and structure; None where neither prediction nor reference has a voxel."""
        return {
            case: {
                name: overlap(voxels, metric) for name, voxels in zip(self.names, counts.voxels, strict=True)
            }
            for case, counts in self.cases.items()
        }

    def mean(self, metric: str = "dice") -> dict[str, float]:
        """Mean over cases of each structure's Dice or IoU; empty cases are left out."""
        table = self.per_case(metric).values()
        found = {}
        for name in self.names:
            values = [value for row in table if (value := row[name]) is not None]
            found[name] = sum(values) / len(values) if values else 0.0
        return found

    def excluded(self) -> dict[str, int]:
        """Cases that have no voxel of a structure on either side, and are left out of its mean."""
        table = self.per_case().values()
        return {name: sum(row[name] is None for row in table) for name in self.names}

    def hd95(self) -> dict[str, float]:
        """Mean over cases of each structure's HD95 in mm, where both sides have it; empty if not measured."""
        found = {}
        for k, name in enumerate(self.names):
            values = [case.hd95[k] for case in self.cases.values() if case.hd95]
            finite = [value for value in values if math.isfinite(value)]
            if finite:
                found[name] = sum(finite) / len(finite)
        return found

    def focus_dice(self) -> float:
        """Mean pooled Dice of the focus structures; early stopping looks at it."""
        pooled = list(self.pooled().values())
        return _mean([pooled[k] for k in self.focus or range(len(pooled))])

    def metrics(self) -> dict[str, float]:
        """Numbers for the log; `val_dice` selects the best checkpoint.

        AUROC and AP tell cases with a focus structure from cases without; they are left out where all cases
        are of one kind.
        """
        pooled = self.pooled()
        counts = list(self.cases.values())
        values = {
            "val_dice": _mean(pooled.values()),
            "val_dice_case": _mean(self.mean().values()),
            "val_iou": _mean(self.pooled("iou").values()),
            "val_iou_case": _mean(self.mean("iou").values()),
        }
        losses = [case.loss for case in counts]
        if losses and all(map(math.isfinite, losses)):
            values["val_loss"] = _mean(losses)
        positive = [case.positive for case in counts]
        if any(positive) and not all(positive):
            scores = [case.score for case in counts]
            values["val_auroc"] = auroc(scores, positive)
            values["val_ap"] = average_precision(scores, positive)
        distances = self.hd95()
        if distances:
            values["val_hd95"] = _mean(distances.values())
        return values | {f"val_dice_{name}": value for name, value in pooled.items()}

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, for ``val/summary.json``."""
        found: dict[str, Any] = {
            **self.metrics(),
            "pooled": self.pooled(),
            "mean": self.mean(),
            "pooled_iou": self.pooled("iou"),
            "mean_iou": self.mean("iou"),
            "cases_without": self.excluded(),
        }
        distances = self.hd95()
        if len(distances) == len(self.names):
            found["hd95_mm"] = distances
        return found | {"cases": self.per_case(), "cases_iou": self.per_case("iou")}


def overlap(voxels: Sequence[int], metric: str) -> float | None:
    """Dice 2TP/(2TP+FP+FN) or IoU TP/(TP+FP+FN) of ``(TP, FP, FN)``; None without any voxel."""
    hit, false, missed = voxels
    total = hit + false + missed
    if not total:
        return None
    return hit / total if metric == "iou" else 2 * hit / (hit + total)


class Validator:
    """Validates the student of a run.

    Args:
        rt: Ranks and device.
        cfg: Which cases, and what is measured.
        data: The cases; no teacher is read.
        objective: Gives the supervised loss; without it none is measured.
    """

    def __init__(
        self, rt: Runtime, cfg: GraftConfig, data: GraftData, objective: Objective | None = None
    ) -> None:
        self.rt, self.cfg, self.data, self.objective = rt, cfg, data, objective
        self.target = data.plan.target
        chosen = validation_cases(cfg, data)
        self.known = {case.id: case for case in chosen}
        self.loader: ResumableLoader[Any] = rt.loader(
            data.samples(chosen, teachers=False),
            batch_size=cfg.validation.batch_size,
            shuffle=False,
            collate=collate,
            name="validation",
        )

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> Validation:
        """Segment the windows of all cases, in float32; the result is the same with any number of ranks."""
        counts: dict[str, CaseCounts] = {}
        student.eval()
        for batch in self.loader.epoch():
            batch = batch.to(self.rt.device)
            output = as_output(student(batch.image))
            for k, case_id in enumerate(batch.case_ids):
                counts[case_id] = self._count(*_only(k, output, batch))
        student.train()
        structures = self.target.structures
        names = tuple(self.target.names[k] for k in structures)
        focus = tuple(structures.index(k) for k in self.target.focus)
        return Validation(self.rt.gather(counts), names, focus)

    def _count(self, output: StudentOutput, batch: Batch) -> CaseCounts:
        """Count one sample."""
        target = self.target
        p = target.probabilities(output.main)
        hard, truth = target.decide(p)[0], target.encode(batch.label)[0] > 0.5
        focus, structures = list(target.focus), list(target.structures)
        triples = torch.stack([hard & truth, hard & ~truth, ~hard & truth]).flatten(2).sum(2)[:, structures]
        loss = math.nan if self.objective is None else float(self.objective.supervised(output, batch))
        return CaseCounts(
            voxels=tuple((int(hit), int(false), int(missed)) for hit, false, missed in triples.T.tolist()),
            loss=loss,
            score=float(p[0, focus].max()),
            positive=bool(truth[focus].any()),
            hd95=self._distances(batch.case_ids[0], hard[structures], truth[structures]),
        )

    def _distances(self, case_id: str, hard: Tensor, truth: Tensor) -> tuple[float, ...]:
        if not self.cfg.validation.hd95:
            return ()
        x, y, z = self.data.store.get(self.known[case_id]).spacing
        pairs = zip(hard.cpu().numpy(), truth.cpu().numpy(), strict=True)
        return tuple(hd95(found, real, (z, y, x)) for found, real in pairs)


def validation_cases(cfg: GraftConfig, data: GraftData) -> tuple[Case, ...]:
    """The cases that are validated, by `validation.mode` and `validation.max_cases`."""
    chosen = data.labelled if cfg.validation.mode == "train" else data.val
    count = cfg.validation.max_cases or (SUBSET if cfg.validation.mode == "subset" else len(chosen))
    return chosen[:count]


def write_summary(rt: Runtime, step: int, result: Validation) -> None:
    """Write ``val/summary.json`` of the run folder."""
    if not rt.is_main:
        return
    folder = rt.run.dir / "val"
    folder.mkdir(exist_ok=True)
    draft = folder / ".summary.json.tmp"
    draft.write_text(json.dumps({"step": step, **result.summary()}, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / "summary.json")


class EarlyStopping:
    """Ends a run whose Dice no longer rises; its state is a part of the checkpoint.

    Args:
        cfg: `validation.early_stopping`, `patience` and `min_delta`.

    Attributes:
        best: Highest value so far.
        waited: Validations since then.
    """

    def __init__(self, cfg: GraftConfig) -> None:
        settings = cfg.validation
        self.enabled, self.patience, self.min_delta = (
            settings.early_stopping,
            settings.patience,
            settings.min_delta,
        )
        self.best, self.waited = 0.0, 0

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return self.enabled and self.waited >= self.patience

    def update(self, value: float) -> None:
        """Take in a validation; every rank must give the same value."""
        if value > self.best + self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.best, self.waited = float(state["best"]), int(state["waited"])


def _only(k: int, output: StudentOutput, batch: Batch) -> tuple[StudentOutput, Batch]:
    """One sample of a batch and of what the student said about it."""
    one = slice(k, k + 1)
    alone = replace(
        batch,
        case_ids=(batch.case_ids[k],),
        image=batch.image[one],
        label=batch.label[one],
        mask=batch.mask[one],
        labelled=batch.labelled[one],
    )
    return StudentOutput([logits[one] for logits in output.logits], {}), alone


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))
