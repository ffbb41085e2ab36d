"""What image labels, scans and self-play are worth on hard phantoms, in large volumes, and in one real CT.

Trains classifiers from image labels alone, then policies against live, frozen and pooled opponents, and
measures them beside an exhaustive scan, greedy look-ahead, random tiles and a random walk: with the same
scores, the same post-processing, the same threshold, at equal numbers of scored windows. The work is cut into
jobs of seconds to two minutes; what is finished is kept, and the most important jobs come first::

    python benchmarks/spars_evidence.py list --work WORK
    python benchmarks/spars_evidence.py run  --work WORK --ct FOLDER
    python benchmarks/spars_evidence.py page --work WORK --page docs/results/spars.md

Settings: `phantom`, volumes of 64 × 64 × 48 with distractors, half of them without a tumour; `large`, bodies
of 128 × 128 × 64 voxels with tumours of the same size, where a scan is expensive; `ct`, synthetic lesions
implanted into the liver of one real CT; `organ`, presence of the liver in pieces of that CT. A seed draws
everything: volumes, split, classifier, policies, starts. `tune` has seeds of its own, on which settings were
chosen; `report` gives the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spars_data import organ_data, tumour_data
from spars_page import page
from torch import Tensor

from medrl.core import rng
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.abdomen import write_abdomen
from medrl.core.predicting.record import plain
from medrl.plugins.spars import running
from medrl.plugins.spars.config import SparsConfig
from medrl.plugins.spars.data import VolumeSet, load
from medrl.plugins.spars.hunting import make_table, map_of, policy_named
from medrl.plugins.spars.maps import as_original, score_map, segment_with
from medrl.plugins.spars.measuring import (
    Measured,
    choose_by_images,
    choose_by_masks,
    measure,
    presence_auc,
    window_mask,
)
from medrl.plugins.spars.play_config import MapConfig
from medrl.plugins.spars.policies import Episodes, Visits
from medrl.plugins.spars.policies import run as visit
from medrl.plugins.spars.restoring import Restored, open_run
from medrl.plugins.spars.scoring import ScorerModule
from medrl.plugins.spars.table import ScoreTable

SEEDS = {"tune": (101, 102), "report": (0, 1, 2, 3, 4)}
SETTINGS = ("phantom", "large", "ct", "organ")
RIVALS = ("scan", "greedy", "tiles", "random")
FULL = 0
"""In place of a budget: the scan scores every window, others play 8 episodes of 32 steps."""


@dataclass(frozen=True)
class Scale:
    """Size of the experiment.

    Attributes:
        phantom: Arguments of the phantom for `phantom`.
        large: The same for `large`.
        budgets: Windows scored, by setting.
        values: Config of all runs.
        updates: Updates of PPO in `phantom` and in `large`.
        pieces: Volumes to learn on and to test on in `ct` and `organ`.
        shape: Voxels of these.
    """

    phantom: Mapping[str, Any]
    large: Mapping[str, Any]
    budgets: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Any]
    updates: Mapping[str, int]
    pieces: tuple[int, int] = (152, 32)
    shape: tuple[int, int, int] = (64, 64, 30)


CT = {"sample": {"hu_window": [-60.0, 140.0]}, "classifier": {"gate": {"statistic": "peak"}}}
"""What `ct` has of its own: a window of the liver, and a gate that a large component does not water down."""
CT_SEEDS = {0: 5, 1: 6, 2: 7, 3: 8, 4: 9}
"""Seeds of `ct` that are reported: 0 to 4 were looked at before the gate was changed."""

SCALES = {
    "full": Scale(
        phantom={"cases": 152, "test_cases": 32, "shape": (64, 64, 48), "free": 0.5, "test_free": 0.25},
        large={"cases": 24, "test_cases": 16, "shape": (128, 128, 64), "free": 0.0, "test_free": 0.0},
        budgets={"phantom": (32, 64, 128, 384), "large": (64, 128, 256, 512), "ct": (96,)},
        values={
            "data": {"folds": 6, "fold": 0},
            "train": {"threads": 1, "device": "cpu", "checkpoint_every": 1000},
            "score": {"window": [16, 16, 8], "stride": [4, 4, 4]},
        },
        updates={"phantom": 60, "large": 100},
    ),
    "tiny": Scale(
        phantom={
            "cases": 12,
            "test_cases": 4,
            "shape": (24, 24, 16),
            "free": 0.5,
            "test_free": 0.5,
            "radius": (2.0, 4.0),
        },
        large={
            "cases": 6,
            "test_cases": 2,
            "shape": (32, 32, 16),
            "free": 0.0,
            "test_free": 0.0,
            "radius": (2.0, 4.0),
        },
        budgets={"phantom": (8, 16), "large": (8,), "ct": (8,)},
        values={
            "data": {"folds": 3, "fold": 0},
            "train": {"threads": 1, "device": "cpu", "checkpoint_every": 1000},
            "score": {"window": [8, 8, 4], "stride": [4, 4, 4]},
            "classifier": {
                "least_auc": 0.0,
                "cluster": {"cells": 100, "clusters": 16, "runs": 1, "iterations": 2},
                "head": {"steps": 20, "widths": [8]},
                "pseudo": {"rounds": 1},
            },
            "ppo": {"envs": 4, "steps": 8, "minibatch": 16},
            "warm": {"steps": 2, "batch": 16},
            "env": {"horizon": 8},
            "map": {"smallest": 4},
            "validation": {"volumes": 2, "episodes": 1},
        },
        updates={"phantom": 2, "large": 2},
        pieces=(9, 2),
        shape=(24, 24, 16),
    ),
}

PLAIN = {"warm": {"kind": "none"}, "env": {"reward": "sign"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {**PLAIN, "opponents": {"kind": "frozen"}},
    "pool": {**PLAIN, "opponents": {"kind": "pool"}},
    "live": {**PLAIN, "opponents": {"kind": "live"}},
    "guided": {
        "warm": {"kind": "planned"},
        "env": {"reward": "shaped"},
        "opponents": {"kind": "pool"},
        "ppo": {"value_first": 2},
    },
    "imitation": {"warm": {"kind": "planned"}, "ppo": {"updates": 0}},
}
"""Policies: what differs from the common config."""


@dataclass(frozen=True)
class Unit:
    """Everything of one seed in one setting."""

    setting: str
    seed: int
    group: str = "report"

    def folder(self, work: Path) -> Path:
        """Where its runs and results lie."""
        return work / self.group / self.setting / f"seed{self.seed}"


@dataclass(frozen=True)
class Work:
    """Where everything lies, and how large it is."""

    folder: Path
    ct: Path | None
    scale: Scale
    manager: PluginManager


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: ``classifier``, ``rivals``, a variant, or ``real``.
        seconds: About how long it takes, in CPU-seconds.
        settings: In which settings.
        needs: Jobs before it, as ``job`` or ``setting/job``.
    """

    name: str
    seconds: float
    settings: tuple[str, ...] = ("phantom",)
    needs: tuple[str, ...] = ()


BOTH = ("phantom", "large")
JOBS = (
    Job("classifier", 90),
    Job("rivals", 50, needs=("phantom/classifier",)),
    Job("guided", 45, needs=("phantom/rivals",)),
    Job("frozen", 30, needs=("phantom/rivals",)),
    Job("rivals", 75, ("large",), needs=("phantom/classifier",)),
    Job("guided", 70, ("large",), needs=("large/rivals",)),
    Job("live", 30, needs=("phantom/rivals",)),
    Job("pool", 30, needs=("phantom/rivals",)),
    Job("real", 40, ("ct", "organ")),
    Job("imitation", 40, ("large",), needs=("large/rivals",)),
    Job("imitation", 30, needs=("phantom/rivals",)),
)


# --- data and runs -----------------------------------------------------------------------------------------


def root_of(unit: Unit, work: Work) -> Path:
    """The dataset of a unit; it is written where it is not there yet."""
    folder = work.folder / "data" / f"{unit.setting}_{unit.seed}"
    if unit.setting in BOTH:
        # Seeds of the settings never meet.
        seed = 10 * unit.seed + BOTH.index(unit.setting)
        return write_abdomen(folder, seed=seed, **getattr(work.scale, unit.setting))
    if work.ct is None:
        raise SystemExit("ct and organ need --ct FOLDER")
    make = tumour_data if unit.setting == "ct" else organ_data
    learn, test = work.scale.pieces
    return make(folder, work.ct, seed=unit.seed, learn=learn, test=test, shape=work.scale.shape)


def common(unit: Unit, root: Path, scale: Scale) -> dict[str, Any]:
    """The config that all runs of a unit share."""
    own = {
        "data": {"root": str(root), **({"target": ["liver"]} if unit.setting == "organ" else {})},
        "train": {"seed": unit.seed},
        "ppo": {"updates": scale.updates.get(unit.setting, 0)},
    }
    return merged(scale.values, CT if unit.setting == "ct" else {}, own)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def classifier_of(unit: Unit, work: Work) -> Path:
    """The run of the classifier that a unit uses: large volumes take that of the phantoms of their seed."""
    setting = "phantom" if unit.setting == "large" else unit.setting
    return dataclasses.replace(unit, setting=setting).folder(work.folder) / "runs" / "classifier"


def train(unit: Unit, name: str, work: Work) -> Path:
    """Train the classifier of a unit, or one of its policies; a run that was cut off goes on."""
    run = unit.folder(work.folder) / "runs" / name
    values = common(unit, root_of(unit, work), work.scale)
    if name == "classifier":
        values = merged(values, {"stage": "classifier"})
    else:
        given = {"stage": "play", "inputs": {"classifier": str(classifier_of(unit, work))}}
        # The threshold is that of the exhaustive scan, found once for all.
        values = merged(values, given, {"map": {"threshold": 0.5}}, VARIANTS[name])
    running.run(build_train_job(work.manager, "spars", values, run))
    return run


# --- measuring ---------------------------------------------------------------------------------------------


class Known:
    """A scorer whose dense maps are known for some volumes.

    Args:
        scorer: Makes them.
        maps: Map of each volume, by identity.
    """

    has_dense = True

    def __init__(self, scorer: ScorerModule, maps: Mapping[int, Tensor]) -> None:
        self.scorer, self.maps = scorer, dict(maps)
        self.kind, self.reduce, self.label_source = scorer.kind, scorer.reduce, scorer.label_source
        self.device = scorer.device

    @property
    def digest(self) -> str:
        """Of the scorer."""
        return self.scorer.digest

    def dense(self, volume: Tensor) -> Tensor:
        """See `Scorer`."""
        return self.maps[id(volume)]

    def windows(self, volume: Tensor, corners: Tensor, window: tuple[int, int, int]) -> Tensor:
        """See `Scorer`: the mean of the map."""
        from medrl.plugins.spars.boxsum import integral, window_means

        return window_means(integral(self.dense(volume)), corners, window)


@dataclass(frozen=True, eq=False)
class Scene:
    """Volumes of a part with their masks and scores."""

    cfg: SparsConfig
    part: VolumeSet
    table: ScoreTable

    @classmethod
    def of(cls, cfg: SparsConfig, scorer: ScorerModule, part: VolumeSet, file: Path) -> Scene:
        """Score all volumes of a part densely, or read what was scored."""
        volumes = [volume.clone() for volume in part.volumes]
        if file.is_file():
            with np.load(file, allow_pickle=False) as stored:
                maps = [torch.from_numpy(stored[str(at)]) for at in range(len(volumes))]
        else:
            maps = [scorer.dense(volume).float() for volume in volumes]
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".part.npz")
            np.savez_compressed(draft, **{str(at): found.numpy() for at, found in enumerate(maps)})
            draft.replace(file)
        known = Known(scorer, {id(volume): found for volume, found in zip(volumes, maps, strict=True)})
        return cls(cfg, part, make_table(cfg, known, volumes, part.ids, cached=False))  # type: ignore[arg-type]

    @cached_property
    def truths(self) -> list[Tensor]:
        """Masks ``(X, Y, Z)`` bool; opened for evaluation alone."""
        return self.part.open_masks()

    def shape(self, at: int) -> tuple[int, ...]:
        """Voxels of a volume."""
        return tuple(self.table.volumes[at].shape)

    def visits(self, name: str, at: int, budget: int, seed: int, opened: Restored | None = None) -> Visits:
        """Visits of a policy in a volume, of so many scored windows."""
        policy = policy_named(
            name if name in RIVALS else "self-play",
            self.cfg,
            self.table,
            None if opened is None else opened.agent,
        )
        generator = rng.torch_generator(seed, "evidence", name, budget, self.part.ids[at])
        if budget == FULL or name == "scan":
            plan = Episodes(episodes=8, steps=32, start="random")
        else:
            # Further episodes are begun until the budget is spent.
            plan = Episodes(episodes=-(-budget // 48), steps=32, start="random", budget=budget)
        return visit(policy, self.table, at, plan, generator)

    def measured(
        self,
        at: int,
        visits: Visits,
        cfg: MapConfig,
        threshold: float,
        *,
        found: Tensor | None = None,
        with_hd: bool = False,
    ) -> Measured:
        """A volume under some visits."""
        one = map_of(self.table, at, visits, cfg) if found is None else found
        window = self.cfg.score.window
        return measure(
            segment_with(one, threshold, cfg),
            self.truths[at],
            case=self.part.ids[at],
            patient=self.part.patients[at],
            spacing_mm=self.part.spacing_mm[at].tolist(),
            window=window,
            score_map=one,
            visited=window_mask(one.shape, visits.corners.cpu(), window),
            finals=visits.final.cpu(),
            windows=visits.windows_scored,
            with_hd=with_hd,
        )  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "dense": {"paint": "dense"},
    "nested 4x4x4": {"paint": "nested", "aggregate": "mean", "normalise": True},
    "coarse sum": {"paint": "coarse", "aggregate": "sum", "normalise": True},
    "coarse mean": {"paint": "coarse", "aggregate": "mean", "normalise": True},
    "coarse max": {"paint": "coarse", "aggregate": "max", "normalise": True},
}
"""What visits paint."""


def map_config(cfg: SparsConfig, kind: str) -> MapConfig:
    """Settings of a map."""
    return cfg.map.model_copy(update=KINDS[kind])


def of_first(visits: Visits) -> Visits:
    """The visits of the first windows alone."""
    own = visits.agent == 0
    names = ("corners", "scores", "episode", "step", "agent")
    return dataclasses.replace(visits, **{name: getattr(visits, name)[own] for name in names})


def rows_of(values: Sequence[Measured]) -> list[dict[str, Any]]:
    """Plain rows."""
    return [dataclasses.asdict(row) for row in values]


# --- jobs --------------------------------------------------------------------------------------------------


def do(name: str, unit: Unit, work: Work) -> dict[str, Any]:
    """Do a job of a unit and return its result."""
    if name == "classifier":
        run = train(unit, name, work)
        opened = open_run(run, work.manager, torch.device("cpu"))
        return {"facts": facts_of_run(opened)}
    if name == "real":
        return real(unit, work)
    if name == "rivals":
        return rivals(unit, work)
    started = time.process_time()
    run = train(unit, name, work)
    opened = open_run(run, work.manager, torch.device("cpu"))
    spent = time.process_time() - started
    scene = scene_of(unit, work, "test")
    threshold = thresholds_of(unit, work)
    budgets = [*work.scale.budgets[unit.setting], *([FULL] if unit.setting == "phantom" else [])]
    found = measured(scene, [name], budgets, threshold, unit.seed, opened)
    return {**found, "train_seconds": spent, "log": last_records(run)}


def scene_of(unit: Unit, work: Work, part: str) -> Scene:
    """Volumes of a unit with the scores of its classifier."""
    values = merged(common(unit, root_of(unit, work), work.scale), {"method": "spars"})
    cfg = SparsConfig.model_validate(values)
    opened = open_run(classifier_of(unit, work), work.manager, torch.device("cpu"))
    volumes = getattr(load(cfg), part)
    return Scene.of(cfg, opened.scorer, volumes, unit.folder(work.folder) / f"maps_{part}.npz")


def rivals(unit: Unit, work: Work) -> dict[str, Any]:
    """All policies that learn nothing, and the thresholds."""
    if unit.setting == "phantom":
        found: dict[str, Any] = {"thresholds": chosen_thresholds(scene_of(unit, work, "val"))}
    else:
        found = {
            "thresholds": json.loads(needed("phantom/rivals", unit, work.folder).read_text())["thresholds"]
        }
    scene = scene_of(unit, work, "test")
    budgets = [*work.scale.budgets[unit.setting], *([FULL] if unit.setting == "phantom" else [])]
    return {**found, **measured(scene, RIVALS, budgets, found["thresholds"], unit.seed, None)}


def chosen_thresholds(scene: Scene) -> dict[str, Any]:
    """By kind of map, from image labels of validation volumes; of the dense map also from their masks."""
    presence = [bool(value) for value in scene.part.labels()]
    found: dict[str, Any] = {}
    for kind in KINDS:
        cfg = map_config(scene.cfg, kind)
        maps = [
            map_of(scene.table, at, scene.visits("scan", at, FULL, 0), cfg) for at in range(len(scene.part))
        ]
        found[kind] = choose_by_images(maps, presence, cfg, cfg.thresholds).as_dict()
        if kind == "dense":
            found["dense, masks"] = choose_by_masks(maps, scene.truths, cfg, cfg.thresholds).as_dict()
    return found


def thresholds_of(unit: Unit, work: Work) -> dict[str, Any]:
    """What the rivals' job chose."""
    found: dict[str, Any] = json.loads(needed("phantom/rivals", unit, work.folder).read_text())["thresholds"]
    return found


def measured(
    scene: Scene,
    names: Sequence[str],
    budgets: Sequence[int],
    thresholds: Mapping[str, Any],
    seed: int,
    opened: Restored | None,
) -> dict[str, Any]:
    """Rows by policy and budget of the dense map; at the full length also of the other maps."""
    found: dict[str, dict[str, list[Measured]]] = {name: {} for name in names}
    kinds: dict[str, dict[str, list[Measured]]] = {name: {} for name in names}
    for at in range(len(scene.part)):
        for name in names:
            for budget in budgets:
                if name == "scan" and budget != budgets[-1]:
                    continue
                visits = scene.visits(name, at, budget, seed, opened)
                cfg = map_config(scene.cfg, "dense")
                row = scene.measured(at, visits, cfg, thresholds["dense"]["value"], with_hd=name == "scan")
                found[name].setdefault(str(FULL if name == "scan" else budget), []).append(row)
                if budget == FULL:
                    for kind, row in other_maps(scene, at, visits, thresholds, name):
                        kinds[name].setdefault(kind, []).append(row)
    plain_rows = {name: {budget: rows_of(rows) for budget, rows in by.items()} for name, by in found.items()}
    others = {name: {kind: rows_of(rows) for kind, rows in by.items()} for name, by in kinds.items() if by}
    auc = {name: presence_auc(by[str(FULL)]) for name, by in found.items() if str(FULL) in by}
    return {"measured": plain_rows, "kinds": others, "auc": auc}


def other_maps(
    scene: Scene, at: int, visits: Visits, thresholds: Mapping[str, Any], name: str
) -> Iterator[tuple[str, Measured]]:
    """The maps beside the dense one: coarse and nested ones, and those with the defects of the original."""
    for kind in KINDS:
        # Nested maps take long; they are compared among the policies that learn nothing.
        if kind != "dense" and (name in RIVALS or not kind.startswith("nested")):
            cfg = map_config(scene.cfg, kind)
            yield kind, scene.measured(at, visits, cfg, thresholds[kind]["value"])
    if name == "scan":
        cfg = map_config(scene.cfg, "dense")
        yield (
            "dense, threshold by masks",
            scene.measured(at, visits, cfg, thresholds["dense, masks"]["value"]),
        )
        return
    if name in ("tiles",) or not bool((visits.agent == 1).any()):
        return
    cfg, value = map_config(scene.cfg, "coarse sum"), thresholds["coarse sum"]["value"]
    for kind, changed in (
        ("first window, own score", of_first(visits)),
        ("first window, score of the other", as_original(visits, None)),
        ("first window, score of the other, ended episodes lost", as_original(visits, 0.3)),
    ):
        one = score_map(scene.table, at, changed, cfg) if len(changed) else torch.zeros(scene.shape(at))
        yield kind, scene.measured(at, visits, cfg, value, found=one)


def real(unit: Unit, work: Work) -> dict[str, Any]:
    """Classifier, scan and rivals on pieces of a real CT."""
    run = train(unit, "classifier", work)
    opened = open_run(run, work.manager, torch.device("cpu"))
    thresholds = {"dense": dict(opened.threshold)}
    scene = scene_of(unit, work, "test")
    found = measured(scene, RIVALS, work.scale.budgets["ct"], thresholds, unit.seed, None)
    score = [opened.scorer.image_score(volume) for volume in scene.table.volumes]
    label = [bool(truth.any()) for truth in scene.truths]
    return {
        **found,
        "facts": facts_of_run(opened),
        "image_auc": auc_of(score, label),
        "thresholds": thresholds,
    }


def auc_of(score: Sequence[float], label: Sequence[bool]) -> float:
    """Area under the ROC curve."""
    from medrl.core.metrics import auroc

    return float(auroc(list(score), list(label)))


def facts_of_run(opened: Restored) -> dict[str, Any]:
    """What the checkpoint of a classifier says."""
    names = ("label_source", "classifier", "auc")
    return {**{name: opened.meta.get(name) for name in names}, "threshold": dict(opened.threshold)}


def last_records(run: Path) -> dict[str, Any]:
    """The last value of everything that a run logged."""
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    return found


# --- the queue ---------------------------------------------------------------------------------------------


def queue(
    group: str, seeds: int, settings: Sequence[str], only: Sequence[str] = ()
) -> list[tuple[Job, Unit]]:
    """All jobs in the order in which they are worth doing."""
    return [
        (job, Unit(setting, seed, group))
        for job in JOBS
        if not only or job.name in only
        for number in SEEDS[group][:seeds]
        for setting in settings
        for seed in [CT_SEEDS.get(number, number) if setting == "ct" else number]
        if setting in job.settings
    ]


def result_of(name: str, unit: Unit, work: Path) -> Path:
    """The file of a result."""
    return unit.folder(work) / "results" / f"{name}.json"


def needed(path: str, unit: Unit, work: Path) -> Path:
    """The result of a job that another one needs, ``setting/job``."""
    setting, _, name = path.partition("/")
    return result_of(name, dataclasses.replace(unit, setting=setting), work)


def run(work: Work, jobs: Sequence[tuple[Job, Unit]], say: Callable[[str], object]) -> None:
    """Do what is not done yet."""
    torch.set_num_threads(1)
    for job, unit in jobs:
        path = result_of(job.name, unit, work.folder)
        if path.exists():
            continue
        missing = [name for name in job.needs if not needed(name, unit, work.folder).exists()]
        where = f"{unit.setting} seed {unit.seed} {job.name}"
        if missing:
            say(f"{where}: left out, {', '.join(missing)} is missing\n")
            continue
        started = time.process_time()
        found = do(job.name, unit, work)
        found["cpu_seconds"] = time.process_time() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(plain(found)))
        draft.replace(path)
        say(f"{where}: {found['cpu_seconds']:.0f} s\n")


def listed(work: Path, jobs: Sequence[tuple[Job, Unit]]) -> str:
    """What there is to do: number and CPU-seconds by job, with what was measured of those that are done."""
    rows: dict[str, list[float]] = {}
    for job, unit in jobs:
        row = rows.setdefault(f"{unit.setting} {job.name}", [0, 0, 0.0, 0.0])
        path = result_of(job.name, unit, work)
        row[0] += 1
        if path.exists():
            row[1] += 1
            row[2] += float(json.loads(path.read_text())["cpu_seconds"])
        else:
            row[3] += job.seconds
    lines = [f"{'job':20} {'all':>4} {'done':>5} {'CPU-s':>7} {'left':>7}"]
    for name, (count, done, spent, left) in rows.items():
        lines.append(f"{name:20} {count:4g} {done:5g} {spent:7.0f} {left:7.0f}")
    spent, left = (sum(row[at] for row in rows.values()) for at in (2, 3))
    return "\n".join([*lines, f"{'together':31} {spent:7.0f} {left:7.0f}"]) + "\n"


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = sys.stderr.write) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("task", choices=["list", "run", "page"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--ct", type=Path, help="Folder of the CT: example_ct_sm.nii.gz and example_seg.nii.gz."
    )
    parser.add_argument("--page", type=Path)
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--group", choices=sorted(SEEDS), default="report")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5, help="Only the first so many.")
    parser.add_argument("--only", default="", help="Names of jobs.")
    given = parser.parse_args(arguments)
    only = [name for name in given.only.split(",") if name]
    jobs = queue(given.group, given.seeds, given.settings.split(","), only)
    if given.task == "list":
        sys.stdout.write(listed(given.work, jobs))
        return
    scale = SCALES[given.scale]
    if given.task == "page":
        text = page(given.work / given.group, scale)
        if given.page is None:
            sys.stdout.write(text)
        else:
            given.page.write_text(text, encoding="utf-8")
        return
    work = Work(given.work, given.ct, scale, PluginManager.create(third_party=False))
    run(work, jobs, say)


if __name__ == "__main__":
    main()
