"""What the label maps of a sequence say: validity of frames and over time, area curve, ejection fraction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.metrics.cine import describe
from medrl.core.validity import Report, Rules, check_stack, load_rules
from medrl.core.validity.temporal import (
    TemporalReport,
    TemporalRules,
    check_sequence,
    load_temporal_rules,
)

from ..predict_config import PredictConfig


@dataclass(frozen=True)
class Assessor:
    """The rules of a run, for the labels of its model; None where the model has no LV or no MYO."""

    rules: Rules | None
    temporal_rules: TemporalRules | None
    lv: int = 1
    myo: int = 2

    @classmethod
    def of(
        cls, config: PredictConfig, label_names: Mapping[str, int], trained: Mapping[str, Any] | None = None
    ) -> Assessor:
        """Read the rules and give them the label values of a model.

        Args:
            config: Names rules, or leaves them to the model.
            label_names: Label values of the model.
            trained: Facts of the model; ``rules`` and ``temporal_rules`` are those it was trained with. A
                rule file that is no longer there must be named anew, or replaced by `--rules`.

        Raises:
            ConfigError: There are no such rules.
        """
        values = {name.casefold(): value for name, value in label_names.items()}
        facts = trained or {}
        rules = config.rules or str(facts.get("rules", "echo"))
        temporal = config.temporal_rules or str(facts.get("temporal_rules", "echo_temporal"))
        anatomical = load_rules(rules)
        load_temporal_rules(temporal)
        if "lv" not in values or "myo" not in values:
            return cls(None, None)
        return cls(
            load_rules(rules, labels=_known(values, anatomical.labels)),
            load_temporal_rules(temporal, labels={"lv": values["lv"], "myo": values["myo"]}),
            values["lv"],
            values["myo"],
        )

    def __call__(
        self, labels: NDArray[np.uint8], spacing_mm: tuple[float, float], frame_time_s: float | None
    ) -> Assessment | None:
        """Judge `(X, Y, T)` labels."""
        if self.rules is None or self.temporal_rules is None:
            return None
        return Assessment(
            frames=tuple(check_stack(labels, self.rules, axis=-1, spacing=spacing_mm)),
            temporal=check_sequence(labels, spacing_mm, self.temporal_rules),
            cine=describe(labels, spacing_mm, frame_time_s, lv=self.lv, myo=self.myo).to_dict(),
        )


@dataclass(frozen=True, eq=False)
class Assessment:
    """The verdict on one sequence.

    Attributes:
        frames: Anatomical verdict on each frame.
        temporal: Verdict on the sequence.
        cine: Areas, beats, ED and ES, ejection fraction with its limits.
    """

    frames: tuple[Report, ...]
    temporal: TemporalReport
    cine: Mapping[str, Any]

    @property
    def valid(self) -> bool:
        """Whether every frame is anatomically valid and the sequence is valid over time."""
        return self.temporal.valid and all(report.valid for report in self.frames)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the report."""
        found = [report.valid for report in self.frames]
        return {
            "valid": self.valid,
            "anatomical": {
                "valid_share": sum(found) / len(found),
                "valid": found,
                "failed": {str(t): list(r.failed) for t, r in enumerate(self.frames) if r.failed},
            },
            "temporal": self.temporal.to_dict(),
            "cine": dict(self.cine),
        }


def _known(values: Mapping[str, int], labels: Mapping[str, int]) -> dict[str, int]:
    """Return the label values of the model that the rules have a name for."""
    return {name: values[name.casefold()] for name in labels if name.casefold() in values}
