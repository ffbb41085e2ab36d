"""``medrl evaluate -p PRED -r REF``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medrl.cli.console import console, counted, number, write_json
from medrl.cli.method_command import existing
from medrl.cli.options import ANY_PATH, FILE, FOLDER, ListType, json_option
from medrl.cli.progress import case_progress
from medrl.core.errors import EXIT_DATA, EXIT_OK

if TYPE_CHECKING:
    from medrl.core.evaluation import Comparison, Evaluation

DEFAULT_METRICS = ("dice", "hd95", "nsd")


@click.command("evaluate", short_help="Compare segmentations with their references.")
@click.option("-p", "--pred", type=ANY_PATH, required=True, metavar="PRED", help="Folder of segmentations.")
@click.option(
    "-r",
    "--ref",
    type=ANY_PATH,
    required=True,
    metavar="REF",
    help="Folder of references with the same file names, or a dataset.",
)
@click.option(
    "--labels",
    type=FILE,
    metavar="FILE",
    help="JSON with label names and values.  [default: those of the dataset]",
)
@click.option(
    "--metrics",
    type=ListType(),
    default=",".join(DEFAULT_METRICS),
    show_default=True,
    metavar="A,B",
    help="dice, iou, hd95, hd, nsd, assd, sensitivity, precision, volume_difference, and more.",
)
@click.option(
    "--by",
    type=click.Choice(["case", "patient"]),
    default="case",
    show_default=True,
    help="What counts as one observation; patient averages the cases of a patient first.",
)
@click.option("--ci", is_flag=True, help="Add 95 % bootstrap intervals of the means.")
@click.option(
    "--compare",
    type=ANY_PATH,
    metavar="OTHER_PRED",
    help="Compare with other segmentations of the same cases: paired Wilcoxon test, bootstrap intervals.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="MM",
    help="Tolerance of nsd.",
)
@click.option("--missing-ok", is_flag=True, help="References without a segmentation are no problem.")
@click.option("--cases", "show_cases", is_flag=True, help="Show every case too.")
@click.option(
    "-o",
    "--output",
    type=FOLDER,
    metavar="DIR",
    help="Write evaluation.json, metrics.csv, report.html there.",
)
@json_option()
def evaluate(
    pred: Path,
    ref: Path,
    labels: Path | None,
    metrics: tuple[str, ...],
    by: str,
    ci: bool,
    compare: Path | None,
    tolerance: float,
    missing_ok: bool,
    show_cases: bool,
    output: Path | None,
    as_json: bool,
) -> int:
    """Compare segmentations with their references, case by case and label by label.

    A case that cannot be evaluated is named, the others are done, and the exit code is 3. Where neither
    segmentation nor reference has a label, the case is left out of that mean and counted.
    """
    for option, path in (("-p", pred), ("-r", ref), ("--labels", labels), ("--compare", compare)):
        existing(path, option=option)
    from medrl.core.evaluation import evaluate_folders, read_labels

    with case_progress() as show:
        found = evaluate_folders(
            pred,
            ref,
            labels=read_labels(labels) if labels is not None else None,
            metrics=metrics,
            by=by,
            ci=ci,
            compare=compare,
            tolerance_mm=tolerance,
            missing_ok=missing_ok,
            progress=show,
        )
    written = [*found.write(output), write_report(found, output)] if output is not None else []
    if as_json:
        write_json(found.as_dict())
    else:
        say(found, pred=pred, other=compare, ci=ci, cases=show_cases)
    for path in written:
        console().say(f"written: {path}")
    return EXIT_DATA if found.problems else EXIT_OK


def write_report(found: Evaluation, folder: Path) -> Path:
    """Write the evaluation as one HTML page that needs no other file."""
    from medrl.core.report import REPORT_NAME, evaluation_sections, write_page

    facts = {key.replace("_", " "): value for key, value in found.settings.items() if value is not None}
    return write_page(folder / REPORT_NAME, "Evaluation", evaluation_sections(found), facts=facts)


def say(
    found: Evaluation, *, pred: Path, other: Path | None = None, ci: bool = False, cases: bool = False
) -> None:
    """Write an evaluation as tables: cases if asked for, means by label, comparison, what is missing."""
    screen = console()
    if cases:
        _cases(found)
    _summary(found, ci=ci)
    if found.comparison is not None and other is not None:
        _comparison(found.comparison, pred, other)
    for case, why in found.problems.items():
        screen.line(f"{screen.style('problem', fg='red')}: case {case}: {why.removeprefix(f'case {case}: ')}")
    if found.extra:
        screen.say(f"note: {counted(len(found.extra), 'segmentation')} without reference left out")
    problems = f", {len(found.problems)} not evaluated" if found.problems else ""
    screen.say(f"{counted(len(found.cases), 'case')}{problems}")


def _cases(found: Evaluation) -> None:
    columns = ["case", "label", *(_heading(name) for name in found.metrics)]
    rows = [
        [str(row["case"]), str(row["label"]), *(number(row[name]) for name in found.metrics)]
        for row in found.rows
    ]
    console().table(columns, rows, right=range(2, len(columns)))
    console().say()


def _summary(found: Evaluation, *, ci: bool) -> None:
    """Write mean and standard deviation of each label and metric, and how many cases took part."""
    unit = "patients" if found.by == "patient" else "cases"
    columns = ["label", "metric", "mean", "sd", "median"]
    columns += ["95 % interval"] * ci + [unit, "left out", "infinite"]
    rows = []
    for label, by_metric in found.summary.items():
        for name, value in by_metric.items():
            interval = [interval_text(value.low, value.high)] if ci else []
            rows.append(
                [
                    label,
                    _heading(name),
                    number(value.mean),
                    number(value.std),
                    number(value.median),
                    *interval,
                    str(value.n),
                    str(value.excluded),
                    str(value.infinite),
                ]
            )
    screen = console()
    screen.table(columns, rows, right=range(2, len(columns)))
    if any(value.excluded for by_metric in found.summary.values() for value in by_metric.values()):
        screen.say("left out: neither segmentation nor reference has the label")
    if any(value.infinite for by_metric in found.summary.values() for value in by_metric.values()):
        screen.say("infinite: only one of them has it, so that no distance exists; not in mean and sd")
    if len(found.pooled_dice) > 1:
        pooled = ", ".join(f"{label} {number(value)}" for label, value in found.pooled_dice.items())
        screen.say(f"Dice over the summed volumes of all cases: {pooled}")


def _comparison(rows: list[Comparison], pred: Path, other: Path) -> None:
    screen = console()
    screen.say()
    screen.heading(f"{pred} (A) against {other} (B)")
    columns = [
        "label",
        "metric",
        "A",
        "B",
        "A − B",
        "95 % interval",
        "p",
        "p (Holm)",
        "A better/equal/B better",
    ]
    table = [
        [
            row.label,
            _heading(row.metric),
            number(row.mean_a),
            number(row.mean_b),
            number(row.difference),
            interval_text(row.low, row.high),
            probability(row.p_value),
            probability(row.p_holm),
            f"{row.wins_a}/{row.ties}/{row.wins_b}",
        ]
        for row in rows
    ]
    screen.table(columns, table, right=range(2, 8))
    screen.say("p: Wilcoxon signed-rank test on pairs; p (Holm): corrected for all rows of this table")
    better: dict[str, list[str]] = {"a": [], "b": []}
    for row in rows:
        if row.better in better:
            better[row.better].append(f"{_heading(row.metric)} of {row.label}")
    for key, path in (("a", pred), ("b", other)):
        if better[key]:
            screen.say(f"{path} is better in {', '.join(better[key])} (corrected p < 0.05)")
    if not better["a"] and not better["b"]:
        screen.say("no difference with corrected p < 0.05")


def interval_text(low: float | None, high: float | None) -> str:
    """Return both ends of an interval, or a dash where it is not defined."""
    if low is None or high is None or low != low or high != high:
        return "–"
    return f"{number(low)} to {number(high)}"


def probability(p: float | None) -> str:
    """Return a p-value with three digits, a very small one as a bound."""
    if p is None or p != p:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _heading(name: str) -> str:
    from medrl.core.metrics import METRICS

    info: Any = METRICS.get(name) if isinstance(METRICS, Mapping) else None
    if info is None:
        return name
    title, unit = str(getattr(info, "title", name)), str(getattr(info, "unit", ""))
    return f"{title} ({unit})" if unit else title
