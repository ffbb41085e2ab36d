"""Does a policy that looks beat fixed masks, and where?

Trains reward models, policies and their blind twins on synthetic hearts, on synthetic hearts whose k-space
centre is displaced, and on real slices; measures them beside every baseline and both oracles. The work is
cut into jobs of seconds to a minute; what is finished is kept, and the most important jobs come first, so
that the page can be written at any time::

    python benchmarks/kspace_evidence.py list  --work WORK
    python benchmarks/kspace_evidence.py run   --work WORK --acdc FOLDER --brain FILE.cfl
    python benchmarks/kspace_evidence.py page  --work WORK --page docs/results/kspace.md

A unit is one reward model with all that is trained on it. Patients are parted into five folds. Those of a
fold are tested on; of the others one half trains the reward model, the other half the policy and the fixed
masks, so that nobody sees the errors of a network on its own training patients. Fold and seed go together:
fold k has seed k in round 0, seed k + 1 in round 1 and so on, so that one round tests every patient once with
five seeds of everything. `tune` has patients and seeds of its own, on which settings were chosen; `report`
gives the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kspace_page import REAL, SETTINGS, SHIFTED, Facts, page

from medrl.core.checkpoint import find_checkpoint
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.cardiac import write_cardiac
from medrl.plugins.kspace import domain, evaluate, parts, running
from medrl.plugins.kspace.agent import Sighted
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.config import KspaceConfig
from medrl.plugins.kspace.data import SliceSet, load_set, open_scans
from medrl.plugins.kspace.data.plan import make_plan
from medrl.plugins.kspace.domain import Data, cases_of, info_of
from medrl.plugins.kspace.evaluate import by_patient
from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.policies import AgentLines, LinePolicy
from medrl.plugins.kspace.quality import nmse, psnr, ssim
from medrl.plugins.kspace.restoring import Restored, open_run
from medrl.plugins.kspace.rewards import Quality
from medrl.plugins.kspace.warmstart import StateCollector, imitation_score

FOLDS = 5
SEEDS = {"tune": (101, 102, 103, 104, 105), "report": (0, 1, 2, 3, 4)}
SHIFT = 4.0 / 64.0
"""Share of the columns up to which the k-space centre of the shifted settings is displaced to either side."""
DRAWS = {"zf": 10, "sense": 3}
"""Random masks of the brain, by reconstruction."""
BASELINES = ("random", "equispaced", "variable-density", "low-to-high")


@dataclass(frozen=True)
class Scale:
    """Size of the experiment.

    Attributes:
        shape: Rows and columns of k-space.
        reach: Columns to either side of the centre that policies, fixed masks and the oracle choose from.
        initial: Middle columns that are there first.
        totals: Columns in all, at which policies are measured.
        exchange: Largest total at which the fixed mask is improved by exchanging lines.
        patients: Synthetic patients of a group.
        slices: Of a frame.
        fit_cases: Training cases that fixed masks are fitted on.
        oracle_cases: Test cases of a fold on which the one-step oracle is measured.
        ppo: Updates after the warm start.
        real_steps: Optimiser steps of the reward model on real slices.
        values: Config of all runs.
        settings: What differs in a setting; `values` are laid over the common ones.
    """

    shape: tuple[int, int] = (48, 64)
    reach: int = 14
    initial: int = 3
    totals: tuple[int, ...] = (4, 5, 6, 8, 12, 16)
    exchange: int = 6
    patients: int = 120
    slices: int = 2
    fit_cases: int = 48
    oracle_cases: int = 40
    ppo: int = 10
    real_steps: int = 500
    values: Mapping[str, Any] = field(
        default_factory=lambda: {
            "model": {"name": "kspace.compact"},
            "agent": {"name": "kspace.columns"},
            "seg": {
                "steps": 900,
                "ema": 0.99,
                "lr": 4e-3,
                "rates": [0.04, 0.45],
            },
            "warm": {"states": 1536, "batch": 64, "oracle": 0.8},
            "ppo": {"envs": 64},
            "train": {"batch_size": 16, "checkpoint_every": 1000},
            "validation": {"cases": 24},
        }
    )

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def budgets(self) -> list[int]:
        """Columns that are chosen."""
        return [total - self.initial for total in self.totals]

    def of(self, setting: str) -> Scale:
        """The size of one setting."""
        own = dict(self.settings.get(setting, {}))
        values = merged(self.values, own.pop("values", {}))
        return replace(self, values=values, settings={}, **own)


SCALES = {
    "full": Scale(
        settings={
            "shifted-many": {
                "initial": 4,
                "totals": (5, 6, 8, 12, 16),
                "patients": 600,
                "slices": 1,
                "values": {"seg": {"steps": 1600}, "warm": {"states": 3072}},
            },
            "real-crossed": {
                "real_steps": 3000,
                "values": {
                    "seg": {"crossed": 3},
                    "agent": {"name": "kspace.columns", "width": 8},
                    "warm": {"states": 3072, "weight_decay": 0.3, "epochs": 6},
                },
            },
            "real-stack": {
                "oracle_cases": 4,
                "values": {
                    "seg": {"crossed": 3},
                    "acquisition": {"geometry": "stack"},
                    "agent": {"name": "kspace.columns", "width": 8},
                    "warm": {"states": 768, "weight_decay": 0.3, "epochs": 6, "chunk": 8},
                },
            },
            **{
                name: {
                    "shape": (96, 128),
                    "reach": 28,
                    "initial": 6,
                    "totals": (8, 10, 12, 16, 24, 32),
                    "exchange": 0,
                    "oracle_cases": 16,
                    "values": {
                        "model": {"name": "kspace.compact", "widths": [12, 24, 32, 48]},
                        "warm": {"states": 1024},
                    },
                }
                for name in ("standard-128", "real-128")
            },
        }
    ),
    "tiny": Scale(
        shape=(16, 16),
        reach=6,
        initial=2,
        totals=(4, 5),
        exchange=4,
        patients=10,
        slices=2,
        fit_cases=4,
        oracle_cases=2,
        ppo=1,
        real_steps=2,
        values={
            "model": {"name": "kspace.compact", "widths": [4, 6]},
            "agent": {"name": "kspace.columns", "width": 8},
            "seg": {"steps": 2},
            "warm": {"states": 8, "chunk": 4, "epochs": 1, "batch": 8},
            "ppo": {"envs": 4, "group": 2, "minibatch": 8, "epochs": 1},
            "train": {"batch_size": 4},
            "validation": {"cases": 2},
        },
    ),
}


@dataclass(frozen=True)
class Unit:
    """One reward model with all that is trained on it."""

    setting: str
    fold: int
    round: int = 0
    group: str = "report"

    @property
    def seed(self) -> int:
        """Of everything random in it."""
        return SEEDS[self.group][(self.fold + self.round) % FOLDS]

    def folder(self, work: Path) -> Path:
        """Where its runs and results lie."""
        return work / self.group / self.setting / f"fold{self.fold}_seed{self.seed}"


@dataclass(frozen=True)
class Work:
    """Where everything lies, and how large it is."""

    folder: Path
    acdc: Path | None
    brain: Path | None
    scale: Scale
    manager: PluginManager


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        name: ``reward``, a policy, ``rivals:λ``, ``oracle:λ``, ``headroom``; or ``brain`` without a unit.
        seconds: About how long it takes, in CPU-seconds.
        folds: In how many folds of a round it is done.
        settings: In which settings.
        needs: Jobs before it.
    """

    name: str
    seconds: float
    folds: int = FOLDS
    settings: tuple[str, ...] = SETTINGS
    needs: tuple[str, ...] = ()


def weights(segmentation: float) -> dict[str, float]:
    """Weights of the reward: that of the reconstruction is what the segmentation leaves of 1."""
    return {"rec": 1.0 - segmentation, "seg": segmentation}


WARM = {"ppo": {"updates": 0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "policy 1": {"reward": weights(1.0), **WARM},
    "blind 1": {"reward": weights(1.0), "blind": True, **WARM},
    "ppo 1": {"reward": weights(1.0), "warm": {"kind": "none"}},
    "policy 0.5": {"reward": weights(0.5), **WARM},
    "blind 0.5": {"reward": weights(0.5), "blind": True, **WARM},
    "policy 0": {"reward": weights(0.0), **WARM},
    "policy 0.25": {"reward": weights(0.25), **WARM},
    "policy 0.75": {"reward": weights(0.75), **WARM},
    "flat 1": {"reward": weights(1.0), "warm": {"entropy": 0.3}},
    "ce 1": {"reward": {**weights(1.0), "seg_quality": "ce"}, **WARM},
    "asmr 1": {"reward": {**weights(1.0), "mode": "asmr"}, "warm": {"kind": "none"}},
    "terminal 1": {"reward": {**weights(1.0), "mode": "terminal"}, "warm": {"kind": "none"}},
    "fast 1": {
        "reward": weights(1.0),
        "features": ["lines", "energy", "spectra", "pooled"],
        "agent": {"name": "kspace.columns", "shared": True},
        "train": {"precision": "bf16"},
        **WARM,
    },
    "small 1": {
        "reward": weights(1.0),
        "agent": {"name": "kspace.columns", "width": 8},
        "warm": {"weight_decay": 0.3, "epochs": 6},
        **WARM,
    },
}
"""What differs from the common config. The number is λ, the weight of the segmentation."""
STARTS = {"ppo 1": "policy 1", "terminal 1": "policy 1", "asmr 1": "policy 1"}
"""Policies that PPO goes on from."""
FEW = ("standard", "shifted", "real")
"""Settings in which λ is varied."""
CROSSED, STACK = "real-crossed", "real-stack"
LENT = {STACK: CROSSED}
"""Settings whose reward models are those of another one."""
JOBS = (
    Job("reward", 35),
    Job("policy 1", 40, needs=("reward",)),
    Job("blind 1", 35, needs=("reward",)),
    Job("rivals:1", 18, needs=("policy 1",)),
    Job("oracle:1", 8, needs=("reward",)),
    Job("headroom", 5, needs=("policy 1", "blind 1")),
    Job("brain", 60, folds=0),
    Job("ppo 1", 25, settings=("shifted", "real"), needs=("policy 1",)),
    Job("policy 0.5", 40, settings=(*FEW, "shifted-many", CROSSED), needs=("reward",)),
    Job("rivals:0.5", 18, settings=(*FEW, "shifted-many", CROSSED), needs=("policy 1",)),
    Job("blind 0.5", 35, settings=("shifted", "shifted-many", CROSSED), needs=("reward",)),
    Job("policy 0", 35, settings=FEW, needs=("reward",)),
    Job("policy 0.25", 40, settings=FEW, needs=("reward",)),
    Job("policy 0.75", 40, settings=FEW, needs=("reward",)),
    Job("ce 1", 40, folds=2, settings=("real",), needs=("reward",)),
    Job("terminal 1", 25, folds=2, settings=("real",), needs=("policy 1",)),
    Job("asmr 1", 25, folds=2, settings=("real",), needs=("policy 1",)),
    Job("flat 1", 60, folds=2, settings=("real",), needs=("reward",)),
    Job("transfer 1", 10, settings=("real",), needs=("policy 1",)),
    Job("small 1", 40, settings=("real",), needs=("reward",)),
    Job("fast 1", 40, settings=("standard", "shifted-many"), needs=("reward",)),
)


# --- data --------------------------------------------------------------------------------------------------


def is_real(unit: Unit) -> bool:
    """Whether a unit is of measured images."""
    return unit.setting in REAL


def root_of(unit: Unit, work: Work) -> Path:
    """The dataset of a unit; synthetic patients are written where they are not there yet."""
    if is_real(unit):
        if work.acdc is None:
            raise SystemExit("real slices need --acdc FOLDER")
        return work.acdc
    scale = work.scale.of(unit.setting)
    columns = max(scale.shape)
    return write_cardiac(
        work.folder / "data" / f"{unit.group}_{unit.setting}",
        cases=scale.patients,
        test_cases=0,
        seed={"tune": 70, "report": 7}[unit.group] + SETTINGS.index(unit.setting),
        shape=(columns, columns),
        slices=scale.slices,
        shift_k=SHIFT * columns if unit.setting in SHIFTED else 0.0,
    )


DUTIES = ("reward", "policy", "test")


@dataclass(frozen=True)
class Division:
    """Cases by duty; no patient has two, but where crossed reward models judge, reward and policy share."""

    reward: tuple[str, ...]
    policy: tuple[str, ...]
    test: tuple[str, ...]

    def only(self, duty: str) -> dict[str, Any]:
        """Config of a run with a duty: the cases of others are left out, a part of its own watches."""
        own = set(getattr(self, duty))
        others = [case for name in DUTIES for case in getattr(self, name) if case not in own]
        patients = {case.rpartition("_")[0] for case in getattr(self, duty)}
        return {"exclude": sorted(set(others)), "folds": min(len(patients), 6)}


def divide(root: Path, unit: Unit) -> Division:
    """Deal the patients: every fifth is tested on, the others train reward model and policy in turn."""
    cases = open_scans(root).scans
    patients = sorted({case.patient or case.id for case in cases})
    order = np.random.default_rng(5 if unit.group == "report" else 6).permutation(len(patients)).tolist()
    duty: dict[str, str] = {}
    others = 0
    for place, number in enumerate(order):
        if place % FOLDS == unit.fold:
            duty[patients[number]] = "test"
        else:
            # Real patients are few, and the reward model needs them more than the policy.
            share = 3 if is_real(unit) else 2
            duty[patients[number]] = "policy" if others % share == share - 1 else "reward"
            others += 1
    dealt: dict[str, list[str]] = {"reward": [], "policy": [], "test": []}
    for case in cases:
        dealt[duty[case.patient or case.id]].append(case.id)
    if unit.setting in (CROSSED, STACK):
        dealt["reward"] = dealt["policy"] = [*dealt["reward"], *dealt["policy"]]
    return Division(*(tuple(dealt[name]) for name in DUTIES))


# --- jobs --------------------------------------------------------------------------------------------------


def common(unit: Unit, root: Path, scale: Scale) -> dict[str, Any]:
    """The config that all runs of a unit share."""
    middle, budgets = scale.shape[1] // 2, scale.budgets
    sample: dict[str, Any] = {"shape": list(scale.shape)}
    augment: dict[str, Any] = {"flip": 0.0, "shift": 0.0}
    if is_real(unit):
        # The middle 96 × 128 pixels of the files; volumes keep the ratio of their slices.
        sample |= {"norm": "volume_p99", "downsample": 128 // scale.shape[1]}
        augment |= {"rotation": 40.0, "scale": 0.25, "shift": 0.15, "gamma": 0.5}
    base: dict[str, Any] = {
        "data": {"root": str(root)},
        "sample": sample,
        "acquisition": {
            "init_center": scale.initial,
            "sampled_indices": [middle - scale.reach, middle + scale.reach],
        },
        "budget": {"train": [1, budgets[-1]], "eval": sorted({budgets[len(budgets) // 4], budgets[-2]})},
        "seg": {"augment": augment},
        "ppo": {"updates": scale.ppo},
        "train": {"seed": unit.seed, "threads": 1, "device": "cpu"},
    }
    # A few real patients are learned by heart sooner.
    real = {"seg": {"steps": scale.real_steps}} if is_real(unit) else {}
    return merged(base, scale.values, real)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def train(unit: Unit, name: str, work: Work) -> None:
    """Train the reward model of a unit, or one of its policies; a run that was cut off goes on."""
    root, folder = root_of(unit, work), unit.folder(work.folder)
    division = divide(root, unit)
    if name == "reward":
        own = {"stage": "reward", "data": division.only("reward")}
    else:
        own = {
            "data": division.only("policy"),
            "inputs": {"reward": str(reward_run(unit, work))},
        }
    values = merged(common(unit, root, work.scale.of(unit.setting)), own, VARIANTS.get(name, {}))
    job = build_train_job(work.manager, "kspace", values, run_of(folder, name))
    if name in STARTS:
        start = find_checkpoint(run_of(folder, STARTS[name]), "best")
        job = dataclasses.replace(job, init_from=start)
    running.run(job)


def reward_run(unit: Unit, work: Work) -> Path:
    """Run folder of the reward model of a unit."""
    owner = replace(unit, setting=LENT.get(unit.setting, unit.setting))
    return run_of(owner.folder(work.folder), "reward")


def run_of(folder: Path, name: str) -> Path:
    """Run folder of a policy."""
    return folder / "runs" / name.replace(" ", "_")


@dataclass(frozen=True)
class Scene:
    """What the policies of a unit are measured on.

    Attributes:
        first: The reward model.
        data: Names of labels, and the training cases of the policies.
        cases: Test cases; lines within reach may be chosen.
        slices: The same as slices.
        judge: Whose reward models judge the training cases: the first, or a policy with crossed ones.
    """

    first: Restored
    data: Data
    cases: Cases
    slices: SliceSet
    judge: Restored

    @classmethod
    def of(cls, unit: Unit, work: Work) -> Scene:
        """Open a unit whose reward model is trained."""
        root = root_of(unit, work)
        division = divide(root, unit)
        first = open_run(reward_run(unit, work), work.manager, torch.device("cpu"))
        asked = common(unit, root, work.scale.of(unit.setting))["acquisition"]
        play = first.cfg.acquisition.model_validate(asked)
        first = replace(first, cfg=first.cfg.model_copy(update={"acquisition": play}))
        values = merged(first.cfg.model_dump(mode="json"), {"data": division.only("policy")})
        dataset = open_scans(root)
        test = [case for case in dataset.scans if case.id in division.test]
        slices = load_set(dataset, test, make_plan(first.cfg.sample, dataset.labels))
        data = Data(domain.load(KspaceConfig.model_validate(values)).parts)
        crossed = run_of(unit.folder(work.folder), "policy 1")
        judge = opened(unit, "policy 1", work) if first.cfg.seg.crossed and crossed.exists() else first
        return cls(first, data, cases_of(slices, first.cfg), slices, judge)

    def quality(self, value: float) -> Quality:
        """What masks are fitted for, at a λ."""
        reward = self.first.cfg.reward.model_copy(update=weights(value))
        return parts.quality(self.first.cfg.model_copy(update={"reward": reward}))

    def training(self) -> CaseObserver:
        """The training cases of the policies."""
        cases = self.data.cases("train", self.first.cfg, torch.device("cpu"))
        return self.judge.training(cases, self.data.info("train", self.first.cfg))

    def measure(
        self,
        policies: Mapping[str, LinePolicy],
        budgets: Sequence[int],
        *,
        few: int = 0,
        seed: int = 0,
        anywhere: bool = False,
    ) -> dict[str, Any]:
        """Values by policy, budget, metric and patient.

        Args:
            policies: What to measure.
            budgets: At which numbers of lines.
            few: At most so many cases, spread evenly; 0 is all.
            seed: Of random lines.
            anywhere: Let them choose lines out of reach too.
        """  # fmt: skip
        cfg = self.first.cfg
        if anywhere:
            free = cfg.acquisition.model_copy(update={"sampled_indices": None})
            cfg = cfg.model_copy(update={"acquisition": free})
        cases, info = cases_of(self.slices, cfg), info_of(self.slices, cfg)
        if few:
            kept = evaluate.spread(len(cases), few).tolist()
            cases, info = cases.select(kept), [info[number] for number in kept]
        curves = evaluate.run(self.first.observer(cases), self.data, info, policies, budgets, seed=seed)
        if not anywhere:
            del curves.measured[evaluate.FULL]
        return {name: rows_of(by) for name, by in curves.measured.items()}


def rows_of(by_budget: Mapping[int, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Values by budget, metric and patient."""
    return {
        str(budget): {
            "dice": by_patient(one.slices, "dice"),
            "ssim": by_patient(one.slices, "ssim"),
            "volume_dice": by_patient(one.volumes, "dice"),
        }
        for budget, one in by_budget.items()
    }


def do(name: str, unit: Unit, work: Work) -> dict[str, Any]:
    """Do a job of a unit and return its result."""
    if name in VARIANTS or (name == "reward" and unit.setting not in LENT):
        train(unit, name, work)
    scene, scale = Scene.of(unit, work), work.scale.of(unit.setting)
    budgets = scale.budgets
    if name == "reward":
        return {"measured": scene.measure({}, [], anywhere=True), "caveats": list(scene.slices.caveats)}
    if name in VARIANTS:
        run = opened(unit, name, work)
        policy = SeenWith(run, AgentLines(run.policy()))
        return {"measured": scene.measure({name: policy}, budgets)}
    if name == "transfer 1":
        taught = opened(dataclasses.replace(unit, setting="standard"), "policy 1", work)
        lines = SeenWith(opened(unit, "policy 1", work), AgentLines(taught.policy()))
        return {"measured": scene.measure({name: lines}, budgets)}
    if name == "headroom":
        return headroom(opened(unit, "policy 1", work), opened(unit, "blind 1", work), scene, budgets)
    kind, _, value = name.partition(":")
    quality = scene.quality(float(value))
    if kind == "oracle":
        made = evaluate.rivals(["greedy-oracle"], scene.training(), quality, max(budgets))
        policies = {f"greedy-oracle {value}": made["greedy-oracle"]}
        return {"measured": scene.measure(policies, budgets, few=scale.oracle_cases)}
    made = evaluate.rivals(
        ["fixed", "fixed-exchanged"], scene.training(), quality, max(budgets), fit_cases=scale.fit_cases
    )
    measured = scene.measure({f"fixed {value}": made["fixed"]}, budgets)
    small = [budget for budget in budgets if budget <= scale.exchange - scale.initial]
    measured |= scene.measure({f"fixed-exchanged {value}": made["fixed-exchanged"]}, small)
    if value == "1":
        plain = evaluate.rivals(BASELINES, scene.training(), quality, max(budgets))
        measured |= scene.measure(plain, budgets, seed=unit.seed, anywhere=True)
    return {"measured": measured}


def opened(unit: Unit, name: str, work: Work) -> Restored:
    """A trained policy of a unit."""
    return open_run(run_of(unit.folder(work.folder), name), work.manager, torch.device("cpu"))


class SeenWith:
    """A policy that sees with its own run; its reward model is that of the unit.

    Args:
        run: The run.
        policy: Its policy.
    """

    def __init__(self, run: Restored, policy: LinePolicy) -> None:
        self.run, self.policy = run, policy

    def order(
        self, observer: CaseObserver, case: torch.Tensor, budget: int, generator: torch.Generator
    ) -> torch.Tensor:
        """See `medrl.plugins.kspace.policies.LinePolicy`."""
        return self.policy.order(self.run.observer(observer.cases), case, budget, generator)


def headroom(run: Restored, blind: Restored, scene: Scene, budgets: Sequence[int]) -> dict[str, Any]:
    """What part of the one-step gain beyond the blind twin a policy finds without labels, on test cases.

    All are asked in the same states, on the way of the sighted policy.
    """
    eyes, dark = (Sighted(one.policy(), one.observer(scene.cases)) for one in (run, blind))
    collector = StateCollector(
        eyes.observer, scene.quality(1.0), batch=32, budgets=tuple(budgets), seed=3, keep=()
    )
    states = [collector.collect(eyes, oracle=0.0) for _ in range(8)]
    scores = [[imitation_score(policy, part) for part in states] for policy in (eyes, dark)]
    own, other = (float(np.mean([score["gain"] for score in row])) for row in scores)
    best = float(np.mean([score["best"] for score in scores[0]]))
    return {"policy": own, "blind": other, "best": best}


def brain(work: Work) -> dict[str, Any]:
    """Reconstruction of one measured slice with eight coils: masks, and the oracle that knows the image.

    One slice trains no policy; the fixed masks are those that need no training.
    """
    if work.brain is None:
        raise SystemExit("measured k-space needs --brain FILE.cfl")
    dataset = open_scans(work.brain)
    found: dict[str, Any] = {}
    initial, totals = 12, [16, 20, 24, 32, 44]
    for kind, lines in (("zf", 0), ("sense", initial)):
        cfg = KspaceConfig.model_validate(
            {
                "method": "kspace",
                "sample": {"shape": [0, 0]},
                "acquisition": {"init_center": initial, "sensitivity_lines": lines, "recon": kind},
            }
        )
        slices = load_set(dataset, dataset.scans, make_plan(cfg.sample, dataset.labels), labels=False)
        cases = cases_of(slices, cfg)
        seen = Imaging(reconstruction="sense" if kind == "sense" else "zf")
        observer = CaseObserver(cases, seen)
        quality = Quality(image_weight=1.0, label_weight=0.0)
        everyone = torch.arange(len(cases))
        made = evaluate.rivals([*BASELINES, "greedy-oracle"], observer, quality, totals[-1] - initial)
        rows: dict[str, dict[str, list[float]]] = {}
        for name, policy in made.items():
            # The oracle reconstructs once for each line that it weighs: short acquisitions alone.
            longest = 24 if name == "greedy-oracle" else totals[-1]
            if name == "greedy-oracle" and kind == "sense":
                continue
            drawn = DRAWS[kind] if name in ("random", "variable-density") else 1
            for total in (count for count in totals if count <= longest):
                scores = []
                for draw in range(drawn):
                    generator = torch.Generator().manual_seed(1000 * draw + total)
                    order = policy.order(observer, everyone, total - initial, generator)
                    mask = cases.initial.clone().scatter_(1, order, value=True)
                    scores.append(image_scores(observer, mask))
                rows.setdefault(name, {})[str(total)] = np.mean(scores, axis=0).tolist()
        columns = cases.possible | cases.initial
        rows["all lines"] = {str(total): image_scores(observer, columns) for total in totals}
        found[kind] = rows
        found["columns"] = int(columns.sum())
    return found


def image_scores(observer: CaseObserver, mask: torch.Tensor) -> list[float]:
    """Mean SSIM, PSNR and NMSE of the magnitude."""
    everyone = torch.arange(len(mask))
    image = observer.view(everyone, mask, segment=False).magnitude
    target = observer.cases.rows("target", everyone)
    return [float(score(image, target).mean()) for score in (ssim, psnr, nmse)]


# --- the queue ---------------------------------------------------------------------------------------------


def queue(
    group: str, rounds: int, settings: Sequence[str], only: Sequence[str] = ()
) -> list[tuple[Job, Unit | None]]:
    """All jobs in the order in which they are worth doing."""
    found: list[tuple[Job, Unit | None]] = []
    for number in range(rounds):
        for job in JOBS:
            if only and job.name not in only:
                continue
            if not job.folds and not number:
                found.append((job, None))
            found += [
                (job, Unit(setting, fold, number, group))
                for fold in range(job.folds)
                for setting in settings
                if setting in job.settings
            ]
    return found


def result_of(job: Job, unit: Unit | None, work: Path, group: str) -> Path:
    """The file of a result."""
    folder = work / group if unit is None else unit.folder(work)
    return folder / "results" / f"{job.name.replace(' ', '_').replace(':', '_')}.json"


def run(
    work: Work, jobs: Sequence[tuple[Job, Unit | None]], group: str, say: Callable[[str], object]
) -> None:
    """Do what is not done yet."""
    torch.set_num_threads(1)
    for job, unit in jobs:
        path = result_of(job, unit, work.folder, group)
        if path.exists():
            continue
        missing = [name for name in job.needs if unit and not needed(name, unit, work.folder, group).exists()]
        if missing:
            say(f"{unit} {job.name}: left out, {', '.join(missing)} is missing\n")
            continue
        started = time.process_time()
        found = brain(work) if unit is None else do(job.name, unit, work)
        found["cpu_seconds"] = time.process_time() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(evaluate.plain(found)))
        draft.replace(path)
        where = "" if unit is None else f"{unit.setting} fold {unit.fold} seed {unit.seed} "
        say(f"{where}{job.name}: {found['cpu_seconds']:.0f} s\n")


def needed(name: str, unit: Unit, work: Path, group: str) -> Path:
    """The result of a job that another one needs."""
    return result_of(Job(name, 0), unit, work, group)


def listed(work: Path, jobs: Sequence[tuple[Job, Unit | None]], group: str) -> str:
    """What there is to do: number and CPU-seconds by job, with what was measured of those that are done."""
    rows: dict[str, list[float]] = {}
    for job, unit in jobs:
        row = rows.setdefault(job.name, [0, 0, 0.0, 0.0])
        path = result_of(job, unit, work, group)
        row[0] += 1
        if path.exists():
            row[1] += 1
            row[2] += float(json.loads(path.read_text())["cpu_seconds"])
        else:
            row[3] += job.seconds
    lines = [f"{'job':16} {'all':>4} {'done':>5} {'CPU-s':>7} {'left':>7}"]
    for name, (count, done, spent, left) in rows.items():
        lines.append(f"{name:16} {count:4g} {done:5g} {spent:7.0f} {left:7.0f}")
    spent, left = (sum(row[at] for row in rows.values()) for at in (2, 3))
    return "\n".join([*lines, f"{'together':27} {spent:7.0f} {left:7.0f}"]) + "\n"


# --- the page ----------------------------------------------------------------------------------------------


def facts_of(scale: Scale) -> Facts:
    """What the page says of the experiment."""
    rows, columns = scale.shape
    totals = ", ".join(str(total) for total in scale.totals)
    values = KspaceConfig.model_validate({"method": "kspace", **scale.values})
    return Facts(
        shape=scale.shape,
        initial=scale.initial,
        totals=scale.totals,
        shift=SHIFT * columns,
        settings={
            name: Facts(shape=own.shape, initial=own.initial, totals=own.totals, shift=SHIFT * columns)
            for name in scale.settings
            for own in (scale.of(name),)
        },
        lines=(
            f"**Size.** k-space of {rows} rows × {columns} columns instead of 128² but where said, so that "
            "one CPU core can finish; rows are the readout, which is always complete. "
            f"{scale.initial} middle columns are there first; measured at {totals} columns in all, "
            f"{scale.totals[0] / columns:.1%} to {scale.totals[-1] / columns:.0%} (8 to 32 of 128). "
            f"Policies, fixed masks and the oracle choose among the {2 * scale.reach + 1} middle columns, "
            "the other baselines among all.",
            f"**Networks.** Reward model: `kspace.compact`, {values.seg.steps} steps (real slices: "
            f"{scale.real_steps}) of "
            f"{values.train.batch_size} slices. Policy: `kspace.columns`, warm start on {values.warm.states} "
            "states with exact gains; one policy for all totals. λ is the weight of the segmentation (soft "
            "Dice), 1 − λ that of the reconstruction (SSIM). “Policy” is the warm start alone; “then PPO” "
            f"are {scale.ppo} updates more from there. The blind twin is trained likewise, but sees mask and "
            f"counters only. Fixed masks are greedy on {scale.fit_cases} training slices; exchanging lines "
            f"is tried up to {scale.exchange} columns in all. Rows with fewer patients were run in some "
            "folds.",
            *[differing(name, scale.of(name)) for name in scale.settings],
        ),
    )


def differing(setting: str, own: Scale) -> str:
    """What is other in a setting."""
    values = KspaceConfig.model_validate({"method": "kspace", **own.values})
    totals = ", ".join(str(total) for total in own.totals)
    if setting in (CROSSED, STACK):
        agent = values.agent.model_dump()
        models = f"Reward models {own.real_steps} steps"
        chosen = "set on two folds of the other dealing of the patients"
        if setting in LENT:
            models, chosen = f"The reward models are those of `{LENT[setting]}`", "not tuned"
        return (
            f"**Other in {setting}.** {models}, agent of width {agent['width']}, weight decay "
            f"{values.warm.weight_decay:g}, {values.warm.epochs} epochs, warm start on {values.warm.states} "
            f"states. Policies were trained once, {chosen}, after the settings before had shown no gain."
        )
    if setting not in SHIFTED:
        patients = "" if setting in REAL else f"{own.patients} patients; "
        widths = ", ".join(str(width) for width in values.model.model_dump()["widths"])
        return (
            f"**Other in {setting}.** k-space of {own.shape[0]} × {own.shape[1]}; {own.initial} middle "
            f"columns first, measured at {totals}; choice among the {2 * own.reach + 1} middle columns; "
            f"{patients}levels of the reward model {widths}; warm start on "
            f"{values.warm.states} states; no lines are exchanged."
        )
    return (
        f"**Other in {setting}.** {own.patients} patients with slices per frame: {own.slices}; "
        f"{own.initial} middle columns first, measured at {totals}; reward model {values.seg.steps} steps, "
        f"warm start on {values.warm.states} states. This setting was added after `shifted` had shown no "
        "gain over the fixed mask, and chosen on one fold of tune patients, on which 240 patients of two "
        "slices had shown none either; both settings are reported."
    )


# --- command line ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = sys.stderr.write) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("task", choices=["list", "run", "page"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--acdc", type=Path)
    parser.add_argument("--brain", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--part", default="1/1", help="Share the units among processes: 1/2 and 2/2.")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--group", choices=sorted(SEEDS), default="report")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folds", type=int, default=FOLDS, help="Only the first so many.")
    parser.add_argument("--only", default="", help="Names of jobs.")
    given = parser.parse_args(arguments)
    scale = SCALES[given.scale]
    only = [name for name in given.only.split(",") if name]
    jobs = queue(given.group, given.rounds, given.settings.split(","), only)
    jobs = [(job, unit) for job, unit in jobs if unit is None or unit.fold < given.folds]
    if given.task == "list":
        sys.stdout.write(listed(given.work, jobs, given.group))
        return
    if given.task == "page":
        text = page(given.work / given.group, facts_of(scale))
        if given.page is None:
            sys.stdout.write(text)
        else:
            given.page.write_text(text, encoding="utf-8")
        return
    index, count = (int(word) for word in given.part.split("/"))
    units = sorted({unit for _, unit in jobs if unit is not None}, key=lambda unit: (unit.fold, unit.setting))
    own = set(units[index - 1 :: count])
    mine = [(job, unit) for job, unit in jobs if unit in own or (unit is None and index == 1)]
    work = Work(given.work, given.acdc, given.brain, scale, PluginManager.create(third_party=False))
    run(work, mine, given.group, say)


if __name__ == "__main__":
    main()
