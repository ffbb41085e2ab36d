"""Evaluation on test volumes: all policies with one threshold and one post-processing, per patient."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core.errors import ConfigError, DataError
from medrl.core.metrics import auroc
from medrl.core.predicting.record import plain
from medrl.core.report import Section, paragraphs, simple_table, write_page
from medrl.core.stats import bootstrap_ci
from medrl.core.volume.write import write_bytes

from .data import Loaded, VolumeSet, load
from .hunting import NAMES, TITLES, hunt, make_table, map_of, plan_of, policy_named
from .maps import segment_with
from .measuring import METRICS, Measured, by_patient, measure, window_mask
from .restoring import Restored, open_run
from .showing import Album

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager

SHOWN = ("dice", "hd95_mm", "recall", "hit", "covered", "false_positive", "windows")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        rows: Volumes by run and policy.
        summary: As in ``summary.json``.
        report: Path of ``report.html``.
    """

    rows: Mapping[str, Sequence[Measured]]
    summary: Mapping[str, Any]
    report: Path

    def lines(self) -> list[str]:
        """The table as text."""
        heads, rows = table(self.summary)
        widths = [max(len(str(row[at])) for row in [heads, *rows]) for at in range(len(heads))]
        return [
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [heads, *rows]
        ] + list(self.summary["notes"])


def run(
    manager: PluginManager,
    runs: Sequence[Path],
    output: Path,
    *,
    data: Path | None = None,
    policies: Sequence[str] = NAMES,
    split: str = "auto",
    seed: int = 0,
    device: str = "auto",
    threads: int = 1,
    say: Callable[[str], object] = str,
) -> Evaluation:
    """Measure policies of runs, and write ``cases.csv``, ``summary.json`` and ``report.html``.

    Scan and greedy look-ahead are always among the policies. Self-play is left out where a run has no agent.

    Args:
        manager: Parts by key.
        runs: Runs or checkpoints of one method.
        output: Folder.
        data: Another dataset than that of the runs.
        policies: Names of `NAMES`.
        split: ``test``, ``val``, or ``auto``: test where it has masks.
        seed: Of starts and moves.
        device: Where scores are computed.
        threads: Of torch; 0 leaves its choice.
        say: Told what goes on.

    Raises:
        ConfigError: An unknown policy.
        DataError: No labelled volumes, or test patients that a run has seen.
    """
    for name in policies:
        if name not in NAMES:
            raise ConfigError(f"--policies {name}", why="unknown", do=", ".join(NAMES))
    wanted = [name for name in NAMES if name in (*policies, "scan", "greedy")]
    if threads > 0:
        torch.set_num_threads(threads)
    place = _device(device)
    found: dict[str, list[Measured]] = {}
    facts: dict[str, Any] = {}
    album: Album | None = None
    for path in runs:
        opened = open_run(path, manager, place)
        own, part = volumes_of(opened, data, split)
        first = album is None
        album = Album(opened.cfg.score.window, target=opened.target) if album is None else album
        for name in wanted:
            if name == "self-play" and opened.agent is None:
                continue
            key = name if len(runs) == 1 else f"{path.name}: {name}"
            say(f"{key}: {len(own)} volumes")
            found[key] = measured(opened, own, name, seed=seed, album=album if first else None)
        facts[path.name] = facts_of(opened, own, part)
    summary = summarise(found, facts)
    return Evaluation(found, summary, write(output, found, summary, album))


def volumes_of(opened: Restored, data: Path | None, split: str) -> tuple[VolumeSet, str]:
    """The volumes to measure, and which part they are.

    Raises:
        DataError: There are none with masks, or a test patient was trained on or watched.
    """
    cfg = opened.cfg
    if data is not None:
        cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"root": data, "presence": None})})
    loaded = load(cfg)
    part = split
    if split == "auto":
        part = "test" if has_masks(loaded, loaded.test) else "val"
    own: VolumeSet = getattr(loaded, part)
    if not has_masks(loaded, own):
        raise DataError(
            f"{part} volumes of {cfg.data.root}",
            why="there are none with masks, by which masks could be measured",
            do="labelsTs/ for test cases, --split val, or medrl predict",
        )
    both = opened.patients & set(own.patients) if part == "test" else set()
    if both:
        raise DataError("test volumes", why=f"patient {min(both)} was trained on or watched")
    return own, part


def has_masks(loaded: Loaded, part: VolumeSet) -> bool:
    """Whether there are volumes and all have a mask; none is opened."""
    return len(part) > 0 and all(loaded.dataset.case(case).label is not None for case in part.ids)


def measured(
    opened: Restored, part: VolumeSet, name: str, *, seed: int = 0, album: Album | None = None
) -> list[Measured]:
    """Hunt in every volume and compare with its mask; the album keeps what the report shows."""
    cfg = opened.cfg
    table = make_table(cfg, opened.scorer, part.volumes, part.ids, content=part.keys)
    policy, plan = policy_named(name, cfg, table, opened.agent), plan_of(cfg)
    threshold = float(opened.threshold["value"])
    rows = []
    for at, truth in enumerate(part.open_masks(part.ids)):
        visits = hunt(table, at, policy, plan, seed=seed)
        score_map = map_of(table, at, visits, cfg.map)
        mask = segment_with(score_map, threshold, cfg.map)
        spacing = part.spacing_mm[at].tolist()
        rows.append(
            measure(
                mask,
                torch.as_tensor(truth).bool(),
                case=part.ids[at],
                patient=part.patients[at],
                spacing_mm=spacing,
                window=cfg.score.window,
                score_map=score_map,
                visited=window_mask(score_map.shape, visits.corners.cpu(), cfg.score.window),
                finals=visits.final.cpu(),
                windows=visits.windows_scored,
            )
        )
        if album is not None:
            album.add(
                part.ids[at],
                name,
                volume=part.volumes[at],
                truth=torch.as_tensor(truth).bool(),
                mask=mask,
                visits=visits,
                spacing_mm=spacing,
            )
    return rows


def facts_of(opened: Restored, part: VolumeSet, name: str) -> dict[str, Any]:
    """What a reader of the numbers must know; AUC, sensitivity and specificity are those of whole volumes."""
    scores = [opened.scorer.image_score(volume) for volume in part.volumes]
    told = [opened.scorer.image_probability(volume) > 0.5 for volume in part.volumes]
    truth = [bool(torch.as_tensor(mask).any()) for mask in part.open_masks(part.ids)]
    both = any(truth) and not all(truth)
    positives, negatives = sum(truth), len(truth) - sum(truth)
    hits = sum(one and is_ for one, is_ in zip(told, truth, strict=True))
    rejected = sum(not one and not is_ for one, is_ in zip(told, truth, strict=True))
    return {
        "part": name,
        "volumes": len(part),
        "label_source": opened.scorer.label_source,
        "classifier": opened.scorer.kind,
        "threshold": dict(opened.threshold),
        "window": list(opened.cfg.score.window),
        "map": opened.cfg.map.paint,
        "auc": float(auroc(scores, truth)) if both else math.nan,
        "sensitivity": hits / positives if positives else math.nan,
        "specificity": rejected / negatives if negatives else math.nan,
        "positives": positives,
        "negatives": negatives,
    }


def summarise(found: Mapping[str, Sequence[Measured]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, SD and 95 % interval over patients, of every policy and metric; what the numbers rest on."""
    policies: dict[str, Any] = {}
    for name, rows in found.items():
        policies[name] = {metric: _spread(by_patient(rows, metric)) for metric in SHOWN}
        policies[name]["both_empty"] = sum(not row.present and not row.marked for row in rows)
    first = next(iter(found.values()))
    bound = _spread(by_patient(first, "bound"))
    notes = []
    for run_name, fact in facts.items():
        source = {
            "image": "image labels alone; no mask was opened in training",
            "crop": "voxel masks of training cases (crop labels), which is no weak supervision",
        }[fact["label_source"]]
        notes.append(
            f"{run_name}: classifier {fact['classifier']} from {source}. Threshold "
            f"{fact['threshold']['value']:g}, chosen on validation by {fact['threshold']['by']}. Image AUC "
            f"{_text(fact['auc'])}, sensitivity {_text(fact['sensitivity'])} of {fact['positives']}, "
            f"specificity {_text(fact['specificity'])} of {fact['negatives']} ({fact['part']} volumes)."
        )
        window = " × ".join(str(size) for size in fact["window"])
        notes.append(
            f"A mask that is one window of {window} around the largest lesion has a Dice of at most "
            f"{_text(bound['mean'])} on average here; map '{fact['map']}' is painted inside windows."
        )
    return {"policies": policies, "runs": dict(facts), "bound": bound, "notes": notes}


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table."""
    heads = ["policy", "Dice %", "HD95 mm", "recall", "hit", "covered", "false positives", "windows"]
    rows = []
    for name, values in summary["policies"].items():
        dice = values["dice"]
        cells = [f"{100 * dice['mean']:.1f} ± {100 * dice['sd']:.1f}" if dice["n"] else "–"]
        cells += [_text(values[metric]["mean"], 1 if metric == "hd95_mm" else 3) for metric in SHOWN[1:6]]
        rows.append([TITLES.get(name, name), *cells, _text(values["windows"]["mean"], 0)])
    return heads, rows


def write(
    folder: Path,
    found: Mapping[str, Sequence[Measured]],
    summary: Mapping[str, Any],
    album: Album | None = None,
) -> Path:
    """Write ``cases.csv``, ``summary.json`` and ``report.html``; return the last."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer: Any = None
    for name, rows in found.items():
        for row in rows:
            line = {"policy": name, **asdict(row)}
            if writer is None:
                writer = csv.DictWriter(text, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    write_bytes(folder / "cases.csv", text.getvalue().encode(), suffix=".csv")
    content = json.dumps(plain(summary), indent=1) + "\n"
    write_bytes(folder / "summary.json", content.encode(), suffix=".json")
    heads, rows_ = table(summary)
    meaning = [f"{name}: {words}." for name, words in METRICS.items()]
    sections = [
        Section("Policies", simple_table(heads, rows_) + paragraphs(summary["notes"])),
        *(album.sections() if album is not None else ()),
        Section("What is measured", paragraphs(meaning)),
    ]
    return write_page(folder / "report.html", "spars: masks of every policy", sections, facts={})


# -- private -----------------------------------------------------------------------------------------


def _spread(values: Mapping[str, float]) -> dict[str, Any]:
    numbers = list(values.values())
    if not numbers:
        return {"n": 0, "mean": math.nan, "sd": math.nan, "low": math.nan, "high": math.nan}
    tensor = torch.tensor(numbers, dtype=torch.float64)
    found = bootstrap_ci(numbers, n=2000)
    sd = float(tensor.std()) if len(numbers) > 1 else 0.0
    return {"n": len(numbers), "mean": float(tensor.mean()), "sd": sd, "low": found.low, "high": found.high}


def _text(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
