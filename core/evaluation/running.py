"""The loop over cases: find pairs, read, compare grids, measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medrl.core.dataset import Dataset, open_dataset, patient_of
from medrl.core.errors import ConfigError, DataError, MedrlError
from medrl.core.metrics import (
    DEFAULT_METRICS,
    LabelValues,
    Row,
    case_metrics,
    check_metrics,
    pooled_dice,
    summarise,
)
from medrl.core.volume import image_stem, image_suffix, is_image_file, present_labels, read_volume
from medrl.core.volume.grid import grid_difference

from .comparing import compare_rows, group_by_patient, with_intervals
from .labels import LABELS_NAME, all_values, name_values, read_labels
from .result import Evaluation

Progress = Callable[[int, int, str], None]


def evaluate_folders(
    pred_dir: Path,
    ref_dir: Path,
    *,
    labels: Mapping[str, LabelValues] | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    by: str = "case",
    ci: bool = False,
    compare: Path | None = None,
    tolerance_mm: float = 1.0,
    patients: Mapping[str, str] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    missing_ok: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare a folder of segmentations with references of the same names.

    A case that cannot be evaluated (its prediction is missing or damaged, or lies on another grid) is
    named in `Evaluation.problems`, and the others are done.

    Args:
        pred_dir: Folder of label maps ``<case>.nii.gz``, or one file.
        ref_dir: Folder of label maps with the same names, a dataset (its labelled cases), or one file.
        labels: Label values by name, or several values for a region. Left out: those of the dataset that
            `ref_dir` belongs to, else ``labels.json`` of the predictions, else the values found.
        metrics: Names from `medrl.core.metrics.METRICS`.
        by: ``case``, or ``patient`` to average the cases of a patient before anything else.
        ci: Add bootstrap intervals of the means.
        compare: Another folder of predictions for a paired comparison on the same cases.
        tolerance_mm: Tolerance of ``nsd``.
        patients: Patient by case; left out, the dataset or the case name tells.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        level: Confidence level.
        missing_ok: Leave out references without a prediction instead of naming them as problems.
        progress: Called with ``(done, total, case)``.

    Raises:
        ConfigError: A metric, label or option is wrong.
        DataError: A folder is missing or no case can be paired.
    """
    if by not in ("case", "patient"):
        raise ConfigError("--by", why=f"'{by}' is neither case nor patient")
    names = check_metrics(metrics)
    refs = _references(ref_dir)
    pairs, problems, extra = _pair(refs, _predictions(pred_dir, ref_dir), missing_ok=missing_ok)
    others: dict[str, Path] = {}
    if compare is not None:
        second, missing, _ = _pair(
            refs, _label_maps(compare, "predictions to compare"), missing_ok=missing_ok
        )
        others = {case: pred for case, (pred, _) in second.items()}
        problems |= {f"{case} in {compare}": why for case, why in missing.items()}
    chosen, complete = _choose_labels(labels, refs, pred_dir, pairs)
    reader = _Reader(
        labels=chosen,
        values=all_values(chosen) if complete else None,
        metrics=names,
        tolerance_mm=tolerance_mm,
    )
    rows: list[Row] = []
    other_rows: list[Row] = []
    for number, (case, (pred, ref)) in enumerate(pairs.items()):
        if progress is not None:
            progress(number, len(pairs), case)
        patient = (patients or refs.patients).get(case) or patient_of(case)
        rows += reader.rows(case, patient, pred, ref, problems, case)
        if compare is not None and case in others:
            other_rows += reader.rows(case, patient, others[case], ref, problems, f"{case} in {compare}")
    if progress is not None:
        progress(len(pairs), len(pairs), "")
    units = group_by_patient(rows, names) if by == "patient" else rows
    comparison = None
    if compare is not None:
        both = {row["case"] for row in rows} & {row["case"] for row in other_rows}
        first, second_rows = ([row for row in part if row["case"] in both] for part in (rows, other_rows))
        if by == "patient":
            first, second_rows = group_by_patient(first, names), group_by_patient(second_rows, names)
        comparison = compare_rows(first, second_rows, names, resamples=resamples, seed=seed, level=level)
    return Evaluation(
        labels=chosen,
        metrics=names,
        rows=rows,
        by=by,
        summary=with_intervals(units, names, resamples=resamples, seed=seed, level=level)
        if ci
        else summarise(units, names),
        pooled_dice=pooled_dice(rows) if "dice" in names else {},
        comparison=comparison,
        problems=problems,
        extra=extra,
        settings={
            "predictions": str(pred_dir),
            "references": str(ref_dir),
            "compare": str(compare) if compare is not None else None,
            "nsd_tolerance_mm": tolerance_mm,
            "bootstrap": {"resamples": resamples, "seed": seed, "level": level} if ci or compare else None,
        },
    )


@dataclass
class _References:
    """Reference label maps by case, and what is known of them."""

    files: dict[str, Path]
    patients: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] | None = None


@dataclass
class _Reader:
    """Reads and measures one pair.

    Attributes:
        values: Every value that may occur, or None if the labels are a choice among more.
    """

    labels: dict[str, LabelValues]
    values: set[int] | None
    metrics: tuple[str, ...]
    tolerance_mm: float

    def rows(
        self, case: str, patient: str, pred: Path, ref: Path, problems: dict[str, str], name: str
    ) -> list[Row]:
        """Return the rows of a case; a failure goes to `problems` under `name`."""
        try:
            return [{"case": case, "patient": patient, **row} for row in self._measure(case, pred, ref)]
        except MedrlError as error:
            problems[name] = str(error) + (f" ({error.do})" if error.do else "")
            return []

    def _measure(self, case: str, pred: Path, ref: Path) -> list[Row]:
        prediction, reference = read_volume(pred, kind="label"), read_volume(ref, kind="label")
        difference = grid_difference(prediction, reference)
        if difference:
            raise DataError(
                f"case {case}",
                why=f"prediction and reference lie on different grids: {difference}",
                do="predict on the image that the reference was drawn on",
                case=case,
            )
        for volume, what in ((prediction, "prediction"), (reference, "reference")):
            unknown = sorted(set(present_labels(volume.data)) - self.values) if self.values else []
            if unknown:
                raise DataError(
                    f"case {case}",
                    why=f"the {what} holds label values without a name: {', '.join(map(str, unknown))}",
                    do="name them with --labels FILE",
                    case=case,
                )
        return case_metrics(
            prediction.data,
            reference.data,
            self.labels,
            reference.spacing,
            self.metrics,
            tolerance_mm=self.tolerance_mm,
        )


def _references(path: Path) -> _References:
    """List the references of a folder, a dataset or a file, with what the dataset knows of them."""
    if path.is_file():
        return _References(files={_case_of(path): path})
    own = _dataset(path)
    if own is not None:
        cases = [case for case in (*own.cases, *own.test_cases) if case.label is not None]
        files = {case.id: case.label for case in cases if case.label is not None}
        if not files:
            raise DataError(str(path), why="the dataset has no case with a reference")
        return _References(
            files=files, patients={case.id: case.patient for case in cases}, labels=own.declared_labels
        )
    found = _References(files=_label_maps(path, "references"))
    around = _dataset(path.parent)
    if around is not None:
        found.patients = {case.id: case.patient for case in (*around.cases, *around.test_cases)}
        found.labels = around.declared_labels
    return found


def _dataset(path: Path) -> Dataset | None:
    """Open the dataset in a folder, or return None where there is none to be opened."""
    if not ((path / "dataset.json").is_file() or (path / "cases.json").is_file()):
        return None
    try:
        return open_dataset(path)
    except MedrlError:
        return None


def _label_maps(path: Path, what: str) -> dict[str, Path]:
    """List the label maps of a folder by case."""
    if path.is_file():
        return {_case_of(path): path}
    if not path.is_dir():
        raise DataError(f"{what} {path}", why="no such file or folder")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if not is_image_file(file) or image_suffix(file) == ".dcm":
            continue
        case = _case_of(file)
        if case in found:
            raise DataError(f"case {case}", why=f"two files: {found[case].name} and {file.name}", case=case)
        found[case] = file
    if not found:
        raise DataError(f"{what} {path}", why="the folder holds no label map", do="name another folder")
    return found


def _predictions(path: Path, ref: Path) -> dict[str, Path]:
    """List predictions by case; a file against a file needs no equal name."""
    if path.is_file() and ref.is_file():
        return {_case_of(ref): path}
    return _label_maps(path, "predictions")


def _pair(
    refs: _References, preds: Mapping[str, Path], *, missing_ok: bool
) -> tuple[dict[str, tuple[Path, Path]], dict[str, str], tuple[str, ...]]:
    """Return pairs by case, references without prediction, predictions without reference."""
    pairs = {case: (preds[case], ref) for case, ref in refs.files.items() if case in preds}
    if not pairs:
        raise DataError(
            "no prediction belongs to a reference",
            why=f"predictions are named {_some(preds)}, references {_some(refs.files)}",
            do="give both the same file names",
        )
    missing = {} if missing_ok else {
        case: "it has no prediction" for case in refs.files if case not in preds
    }  # fmt: skip
    return pairs, missing, tuple(case for case in preds if case not in refs.files)


def _choose_labels(
    labels: Mapping[str, LabelValues] | None,
    refs: _References,
    pred_dir: Path,
    pairs: Mapping[str, tuple[Path, Path]],
) -> tuple[dict[str, LabelValues], bool]:
    """Return the labels to evaluate, and whether no other value may occur."""
    if labels is not None:
        chosen: dict[str, LabelValues] = dict(labels)
        if not any(value != 0 for value in chosen.values()):
            raise ConfigError("--labels", why="there is no label but background")
        return chosen, False
    if refs.labels is not None and len(refs.labels) > 1:
        return {name: value for name, value in refs.labels.items() if value != 0}, True
    sidecar = (pred_dir if pred_dir.is_dir() else pred_dir.parent) / LABELS_NAME
    if sidecar.is_file():
        return {name: value for name, value in read_labels(sidecar).items() if value != 0}, True
    values: set[int] = set()
    for pred, ref in pairs.values():
        for path in (pred, ref):
            try:
                values |= set(present_labels(read_volume(path, kind="label").data))
            except MedrlError:
                continue  # told when the case is measured
    if not values - {0}:
        raise DataError("nothing to evaluate", why="every label map is empty", do="name labels with --labels")
    return name_values(values), False


def _case_of(path: Path) -> str:
    return image_stem(path)


def _some(names: Mapping[str, Any]) -> str:
    items = sorted(names)[:3]
    return ", ".join(items) + (", …" if len(names) > 3 else "")
