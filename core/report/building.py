"""The report of a run folder: what it was, how training went, how good the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from medrl.core.errors import ConfigError, MedrlError
from medrl.core.evaluation import Evaluation, read_evaluation
from medrl.core.metrics import METRICS, OVERALL
from medrl.core.runlog import RunFolder

from .curves import curves
from .page import Section, escape, fact_list, folded, paragraphs, write_page
from .pictures import pictures
from .tables import (
    case_table,
    comparison_table,
    dot_plot,
    heading,
    simple_table,
    summary_has_interval,
    summary_table,
)

REPORT_NAME = "report.html"

_STATUS = {
    "finished": "The run is finished.",
    "running": "The run was still going on when this was written, or it was killed.",
    "interrupted": "The run was stopped by a signal and saved a checkpoint first; it can be resumed.",
    "failed": "The run failed; log.txt tells why.",
}


_TITLES = {
    "pooled": "Dice, all voxels together",
    "mean": "Dice, mean over cases",
    "pooled_iou": "IoU, all voxels together",
    "mean_iou": "IoU, mean over cases",
    "hd95_mm": "HD95 in mm, mean over cases",
    "cases_without": "cases without it",
}
"""Headings of the tables in ``val/summary.json``."""


def build_report(
    run_dir: Path,
    *,
    evaluation: Evaluation | Path | None = None,
    extra_sections: Sequence[Section] = (),
    output: Path | None = None,
) -> Path:
    """Write ``report.html`` of a run folder: one file that shows in any browser, offline.

    Args:
        run_dir: Folder of a run, finished or not.
        evaluation: Of predictions with this run; left out, ``evaluation.json`` of the folder if it is there.
        extra_sections: Further parts, such as overlay panels; they come after the evaluation.
        output: Where to write instead of ``run_dir/report.html``.

    Raises:
        ConfigError: There is no run at `run_dir`.
        DataError: The evaluation cannot be read.
        RuntimeFault: The disk is full or the folder cannot be written.
    """
    run = RunFolder.open(run_dir, lock=False)
    records = list(run.records())
    facts = run.manifest
    sections: list[Section] = []
    drawn = curves(records)
    if drawn:
        sections.append(
            Section(
                "How training went",
                drawn,
                "Each chart shows one kind of number over the steps of training. Where there are many "
                "points, the strong line is their moving average. Names with val are measured on cases "
                "that training does not learn from.",
            )
        )
    validation = _validation(run_dir)
    if validation:
        sections.append(validation)
    sections += [section for section in (_tested(run_dir), _stages(run_dir)) if section is not None]
    shown = pictures(run_dir)
    if shown:
        sections.append(
            Section(
                "Cases during training",
                shown,
                "The newest pictures that the method drew of some cases while it trained.",
            )
        )
    found = _evaluation(run_dir, evaluation)
    if found is not None:
        sections += evaluation_sections(found)
    sections += extra_sections
    events = _events(records)
    if events:
        sections.append(events)
    sections.append(_details(run, facts))
    status = str(facts.get("status", ""))
    method = str(facts.get("method", "")) or "run"
    return write_page(
        output or run_dir / REPORT_NAME,
        f"{method}: {run_dir.resolve().name}",
        sections,
        subtitle=_STATUS.get(status, ""),
        facts=_headline(facts, records),
    )


def evaluation_sections(evaluation: Evaluation) -> list[Section]:
    """Return the parts of a report that show an evaluation."""
    what = "patients" if evaluation.by == "patient" else "cases"
    plots = "".join(dot_plot(evaluation, name) for name in evaluation.metrics[:2])
    explain = paragraphs(
        f"{heading(name)}: {METRICS[name].explain}" for name in evaluation.metrics[2:] if name in METRICS
    )
    problems = ""
    if evaluation.problems:
        rows = [[case, why] for case, why in evaluation.problems.items()]
        count = len(rows)
        problems = (
            f'<p class="note">{count} {"case" if count == 1 else "cases"} could not be evaluated and '
            f"{'is' if count == 1 else 'are'} not in these numbers.</p>"
            + folded("Which, and why", simple_table(["case", "reason"], rows, words=(0, 1)))
        )
    intro = (
        f"{len(evaluation.cases)} cases against their references, summarised over {what}: mean ± standard "
        "deviation"
    )
    intro += " [confidence interval of the mean]" if summary_has_interval(evaluation) else ""
    intro += (
        ". A label that neither prediction nor reference holds is left out and counted as empty; where "
        "only one of them holds it, overlap is 0 and the distance infinite, which the mean leaves out and "
        "counts."
    )
    sections = [
        Section(
            "How good the segmentations are",
            f"{problems}{summary_table(evaluation.summary)}{plots}{explain}",
            intro,
        )
    ]
    if evaluation.comparison is not None:
        sections.append(
            Section(
                "Compared with another method",
                comparison_table(evaluation.comparison),
                "Both methods on the same cases. The difference is the first minus the second with its "
                "bootstrap interval, p is the paired Wilcoxon test, and the corrected p (Holm) accounts for "
                "the number of rows. A method is called better if the corrected p is below 0.05. First: "
                f"{evaluation.settings.get('predictions', 'predictions')}; second: "
                f"{evaluation.settings.get('compare', 'the other folder')}.",
            )
        )
    if evaluation.rows:
        sections.append(
            Section(
                "Case by case",
                case_table(evaluation.rows, evaluation.metrics),
                "Click on a heading to sort; the worst cases are the most instructive. – means that neither "
                "side holds the label, ∞ that only one does.",
            )
        )
    return sections


def _headline(facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [record["step"] for record in records if isinstance(record.get("step"), int)]
    best = facts.get("best")
    shown: dict[str, Any] = {
        "method": facts.get("method"),
        "status": facts.get("status"),
        "steps": facts.get("step") or (max(steps) if steps else None),
        "best": f"{best.get('name') or 'metric'} {best['metric']:.4g} at step {best['step']}"
        if isinstance(best, Mapping) and isinstance(best.get("metric"), (int, float))
        else None,
        "started": _time_text(facts.get("created")),
        "ended": _time_text(facts.get("ended")),
        "device": " ".join(
            dict.fromkeys(str(facts[key]) for key in ("device", "device_name") if facts.get(key))
        ),
        "processes": facts.get("world_size"),
        "precision": facts.get("precision"),
        "seed": facts.get("seed"),
        "resumed": facts.get("resumed"),
        "skipped steps": facts.get("skipped_steps"),
    }
    return {name: value for name, value in shown.items() if value not in (None, "")}


def _time_text(value: Any) -> str:
    """Return a time stamp for people; whatever is no time stamp stays as it is."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M:%S %Z").strip()
    except ValueError:
        return str(value or "")


def _validation(run_dir: Path) -> Section | None:
    """Return the table of ``val/summary.json``, which methods write with their best checkpoint."""
    try:
        content = json.loads((run_dir / "val" / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    tables = {
        key: value
        for key, value in content.items()
        if isinstance(value, dict) and value and all(isinstance(v, (int, float)) for v in value.values())
    }
    names = list(dict.fromkeys(name for value in tables.values() for name in value))
    if not names:
        return None
    rows = [[name, *(float(tables[key].get(name, float("nan"))) for key in tables)] for name in names]
    titles = [_TITLES.get(key, key.replace("_", " ")) for key in tables]
    step = content.get("step")
    return Section(
        "Validation during training",
        simple_table(["label", *titles], rows),
        "Measured on the validation cases"
        + (f" at step {step}" if step is not None else "")
        + ", with the checkpoint that is called best. It was chosen by these very cases, so the numbers are "
        "a little too good; only cases that no stage has seen tell how good it is.",
    )


def _tested(run_dir: Path) -> Section | None:
    """Return the table of ``test.json``: numbers of each model that a method scored on its test images."""
    try:
        content = json.loads((run_dir / "test.json").read_text(encoding="utf-8"))
        summary = {str(name): dict(values) for name, values in content["summary"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    names = list(dict.fromkeys(name for values in summary.values() for name in values))
    if not names:
        return None
    rows = [[row, *(_number(values.get(name)) for name in names)] for row, values in summary.items()]
    final = content.get("final")
    return Section(
        "On the test images",
        simple_table(["", *names], rows),
        "Means over the test images, which no stage has learned from"
        + (f". The result of this run is {final}." if final else "."),
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _stages(run_dir: Path) -> Section | None:
    """Return the curves of the runs in ``stages/``, each folded."""
    parts = []
    for folder in sorted(path.parent for path in (run_dir / "stages").glob("*/metrics.jsonl")):
        drawn = curves(RunFolder(folder).records())
        if drawn:
            parts.append(folded(folder.name, drawn))
    if not parts:
        return None
    return Section(
        "Stage by stage",
        "".join(parts),
        "Each stage of this run is a run of its own, in the folder stages; these are its curves.",
    )


def _evaluation(run_dir: Path, given: Evaluation | Path | None) -> Evaluation | None:
    if isinstance(given, Evaluation):
        return given
    if given is not None:
        return read_evaluation(given / "evaluation.json" if given.is_dir() else given)
    own = run_dir / "evaluation.json"
    return read_evaluation(own) if own.is_file() else None


def _events(records: Sequence[Mapping[str, Any]]) -> Section | None:
    """Return what happened out of the ordinary, such as skipped steps."""
    rows = [
        [record.get("step", ""), record["event"], _rest(record)] for record in records if "event" in record
    ]
    if not rows:
        return None
    shown = simple_table(["step", "event", "details"], rows[:200], words=(0, 1, 2))
    return Section("Out of the ordinary", shown, f"{len(rows)} events, such as steps that were left out.")


def _rest(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items() if key not in ("step", "event"))


def _details(run: RunFolder, facts: Mapping[str, Any]) -> Section:
    versions = facts.get("versions")
    rest = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value
        for name, value in facts.items()
        if name != "versions"
    }
    parts = [fact_list(versions)] if isinstance(versions, Mapping) else []
    with suppress(OSError, UnicodeDecodeError):
        command = (run.dir / "command.txt").read_text(encoding="utf-8").strip()
        parts.append(f"<h3>Command</h3><pre>{escape(command)}</pre>" if command else "")
    with suppress(MedrlError):
        parts.append(folded("Configuration (config.yaml)", f"<pre>{escape(run.config_yaml)}</pre>"))
    parts.append(folded("All facts of the run (manifest.json)", fact_list(rest)))
    return Section("How to repeat it", "".join(parts), "Versions, command and configuration of this run.")


def overall_score(evaluation: Evaluation, metric: str = "dice") -> float:
    """Return the mean of a metric over cases and labels, for a table of several methods.

    Raises:
        ConfigError: The metric was not measured.
    """
    if metric not in evaluation.metrics:
        raise ConfigError(f"metric '{metric}'", why="was not measured")
    return evaluation.summary[OVERALL][metric].mean
