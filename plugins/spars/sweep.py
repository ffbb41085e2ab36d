"""The matrix of experiments (specification §7): one run an entry, resumable, one table at the end."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core.errors import ConfigError, did_you_mean
from medrl.core.jobs import TrainJob
from medrl.core.predicting.record import plain
from medrl.core.volume.write import write_bytes

from . import running
from .config import SparsConfig
from .data import load
from .evaluate import has_masks, measured
from .measuring import by_patient, mean_of
from .restoring import open_run

if TYPE_CHECKING:
    from medrl.core.config import Resolved
    from medrl.core.manager import PluginManager

Resolve = Callable[[Mapping[str, Any]], "Resolved[SparsConfig]"]

PATIENTS = (8, 12, 16, 20, 24)
WINDOWS = ((8, 8, 8), (16, 16, 8), (32, 32, 16), (48, 48, 24), (64, 64, 32))
TAUS = (0.2, 0.3, 0.4, 0.5, 0.6)
POLICIES = ("self-play", "scan", "greedy", "random")


@dataclass(frozen=True)
class Entry:
    """One experiment.

    Attributes:
        part: Of the matrix.
        name: What differs, in words.
        values: Config laid over the common one.
        trains_classifier: Whether it needs a classifier of its own.
        trains_policy: Whether it needs a policy of its own.
    """

    part: str
    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    trains_classifier: bool = False
    trains_policy: bool = True

    @property
    def folder(self) -> str:
        """Name of its folder."""
        text = f"{self.part} {self.name}".replace("×", "x")
        return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def matrix() -> list[Entry]:
    """All entries; windows are those of the original for volumes of 256 × 256 × 180."""
    found = [Entry("base", "as configured", trains_classifier=True)]
    found += [
        Entry("patients", str(count), {"classifier": {"patients": count}}, trains_classifier=True)
        for count in PATIENTS
    ]
    found += [
        Entry("window", " × ".join(map(str, size)), {"score": {"window": list(size)}, "env": {"tau": 0.3}})
        for size in WINDOWS
    ]
    largest = list(WINDOWS[-1])
    found += [Entry("tau", f"{tau:g}", {"score": {"window": largest}, "env": {"tau": tau}}) for tau in TAUS]
    found += [
        Entry("label-source", source, {"classifier": {"label_source": source}}, trains_classifier=True)
        for source in ("image", "crop")
    ]
    found += [
        Entry(
            "map",
            kind,
            {"map": {"paint": "coarse", "aggregate": kind, "normalise": True}},
            trains_policy=False,
        )
        for kind in ("sum", "mean", "max")
    ]
    found += [Entry("opponents", kind, {"opponents": {"kind": kind}}) for kind in ("live", "frozen", "pool")]
    return found


PARTS = tuple(dict.fromkeys(entry.part for entry in matrix()))


def run(
    manager: PluginManager,
    resolve: Resolve,
    output: Path,
    *,
    only: Sequence[str] = (),
    entries: Sequence[Entry] | None = None,
    say: Callable[[str], object] = str,
) -> Path:
    """Do what is not done, and write ``sweep.csv`` and ``sweep.md``; return the latter.

    A window that does not fit in the volumes is noted as such and left out.

    Args:
        manager: Parts by key.
        resolve: Makes a config of values laid over the common ones.
        output: Folder; an entry has a run and a result in it.
        only: Parts of the matrix; all if empty.
        entries: In place of the matrix.
        say: Told what goes on.

    Raises:
        ConfigError: An unknown part.
    """
    for part in only:
        if part not in PARTS:
            raise ConfigError(f"--only {part}", why=did_you_mean(part, PARTS))
    wanted = [entry for entry in entries or matrix() if not only or entry.part in (*only, "base")]
    results: list[dict[str, Any]] = []
    for number, entry in enumerate(wanted, start=1):
        path = output / "results" / f"{entry.folder}.json"
        if not path.is_file():
            say(f"{number} of {len(wanted)}: {entry.part} {entry.name}")
            found = do(manager, resolve, output, entry)
            write_bytes(path, (json.dumps(plain(found), indent=1) + "\n").encode(), suffix=".json")
        results.append(
            {"part": entry.part, "name": entry.name, **json.loads(path.read_text(encoding="utf-8"))}
        )
        write_tables(output, results)
    return output / "sweep.md"


def do(manager: PluginManager, resolve: Resolve, output: Path, entry: Entry) -> dict[str, Any]:
    """Train and measure one entry."""
    base = output / "runs" / "base_as_configured"
    own = output / "runs" / entry.folder
    values: dict[str, Any] = {**entry.values, "stage": "all"}
    if not entry.trains_classifier:
        values["inputs"] = {"classifier": str(base / "stages" / "classifier")}
    trained = own if entry.trains_policy else base
    try:
        resolved = resolve(values)
        if entry.trains_policy:
            running.run(TrainJob(method="spars", resolved=resolved, run_dir=own, manager=manager))
        opened = open_run(trained, manager, torch.device("cpu"))
    except ConfigError as error:
        if entry.part in ("window", "tau") and "does not fit" in str(error):
            return {"left_out": str(error)}
        raise
    cfg: SparsConfig = resolved.config
    changed = opened.cfg.model_copy(update={"map": cfg.map})
    object.__setattr__(opened, "cfg", changed)
    loaded = load(changed)
    part = loaded.test if has_masks(loaded, loaded.test) else loaded.val
    found: dict[str, Any] = {
        "label_source": opened.scorer.label_source,
        "threshold": opened.threshold["value"],
    }
    for name in POLICIES:
        rows = measured(opened, part, name, seed=cfg.train.seed)
        dice = list(by_patient(rows, "dice").values())
        found[name] = {
            "dice": mean_of(rows, "dice"),
            "sd": float(torch.tensor(dice).std()) if len(dice) > 1 else 0.0,
            "recall": mean_of(rows, "recall"),
            "hit": mean_of(rows, "hit"),
            "false_positive": mean_of(rows, "false_positive"),
            "windows": mean_of(rows, "windows"),
        }
        found["bound"] = mean_of(rows, "bound")
    return found


def write_tables(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write ``sweep.csv`` and ``sweep.md`` of what is there."""
    heads = ["part", "entry", "label source", "bound", *(f"{name} Dice" for name in POLICIES)]
    heads += ["self-play recall", "self-play hit", "self-play false positives"]
    rows = []
    for result in results:
        if "left_out" in result:
            rows.append([result["part"], result["name"], result["left_out"], *[""] * (len(heads) - 3)])
            continue
        dice = [f"{_text(result[name]['dice'])} ± {_text(result[name]['sd'])}" for name in POLICIES]
        own = [_text(result["self-play"][key]) for key in ("recall", "hit", "false_positive")]
        start = [result["part"], result["name"], result["label_source"], _text(result["bound"])]
        rows.append([*start, *dice, *own])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([heads, *rows])
    write_bytes(folder / "sweep.csv", text.getvalue().encode(), suffix=".csv")
    lines = [
        "# spars: matrix of experiments",
        "",
        "Dice: mean ± SD over patients. Bound: largest Dice of one window.",
        "",
    ]
    lines += [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    write_bytes(folder / "sweep.md", ("\n".join(lines) + "\n").encode(), suffix=".md")


def _text(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"
