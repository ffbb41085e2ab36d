"""Does a policy that looks beat fixed masks, and where?

Trains reward models, policies and their blind twins over several seeds and folds of patients, on synthetic
hearts, on synthetic hearts whose k-space centre is displaced, and on real slices; measures them beside
every baseline and both oracles. One unit is one reward model with all that is trained on it; finished runs
are kept, so that the script goes on where it stopped and two can share the work::

    python benchmarks/kspace_evidence.py prepare --work WORK
    python benchmarks/kspace_evidence.py run     --work WORK --acdc ../shared/data/acdc_h5 --part 1/2 &
    python benchmarks/kspace_evidence.py run     --work WORK --acdc ../shared/data/acdc_h5 --part 2/2
    python benchmarks/kspace_evidence.py page    --work WORK --page docs/results/kspace.md

Patients are parted into folds. Those of a fold are tested on; of the others one half trains the reward model,
the other half the policy and the fixed masks, so that nobody sees the errors of a network on its own training
patients. `tune` has seeds and phantoms of its own, on which settings were chosen; `report` gives the results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.cardiac import write_cardiac
from medrl.core.stats import bootstrap_ci
from medrl.plugins.kspace import domain, evaluate, parts, running
from medrl.plugins.kspace.data import load_set, open_scans
from medrl.plugins.kspace.data.plan import make_plan
from medrl.plugins.kspace.domain import Data, cases_of, info_of
from medrl.plugins.kspace.evaluate import by_patient
from medrl.plugins.kspace.policies import AgentLines, LinePolicy
from medrl.plugins.kspace.restoring import Restored, open_run
from medrl.plugins.kspace.study import Seen
from medrl.plugins.kspace.warmstart import StateCollector, imitation_score

FOLDS = 3
SEEDS = {"tune": (101, 102), "report": (0, 1, 2, 3, 4)}
SETTINGS = ("standard", "shifted", "real")
SHIFT = 4.0
"""Columns of 64 up to which the k-space centre of `shifted` is displaced; twice as many of 128."""
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of the segmentation; that of the reconstruction is what is left of 1."""
MAIN = 0.5
METRICS = {"dice": "slices", "ssim": "slices", "volume_dice": "volumes"}


@dataclass(frozen=True)
class Scale:
    """Size of the experiment.

    Attributes:
        size: Rows and columns of k-space.
        initial: Middle columns that are there first.
        totals: Columns in all, at which policies are measured.
        patients: Synthetic patients of a group.
        reward_steps: Optimiser steps of a reward model.
        values: Config of the policies.
        oracle_cases: Test cases of a fold on which the one-step oracle is measured.
    """

    size: int = 128
    initial: int = 4
    totals: tuple[int, ...] = (6, 8, 10, 12, 16, 24, 32)
    patients: int = 60
    slices: int = 4
    reward_steps: int = 1500
    values: dict[str, Any] = field(default_factory=dict)
    oracle_cases: int = 64


SCALES = {
    "full": Scale(),
    "half": Scale(size=64, totals=(6, 8, 12, 16), reward_steps=800),
    "tiny": Scale(
        size=16,
        initial=2,
        totals=(4, 5),
        patients=6,
        slices=2,
        reward_steps=2,
        values={
            "model": {"name": "kspace.compact", "widths": [4, 6]},
            "agent": {"name": "kspace.columns", "width": 8},
            "warm": {"states": 8, "chunk": 4, "epochs": 1, "batch": 8},
            "ppo": {"updates": 1, "envs": 4, "group": 2, "minibatch": 8, "epochs": 1},
            "train": {"batch_size": 4},
            "validation": {"cases": 2},
        },
        oracle_cases=2,
    ),
}


@dataclass(frozen=True)
class Unit:
    """One reward model with all that is trained on it."""

    setting: str
    fold: int
    seed: int
    group: str = "report"

    def folder(self, work: Path) -> Path:
        """Where its runs lie."""
        return work / self.group / self.setting / f"fold{self.fold}_seed{self.seed}"


@dataclass(frozen=True)
class Variant:
    """One policy of a unit: a name and what differs from the common config."""

    name: str
    values: dict[str, Any]


def variants(budgets: Sequence[int]) -> list[Variant]:
    """All policies: every λ with warm start and PPO, controls and other rewards at the main one."""
    main = weights(MAIN)
    found = [Variant(f"lambda{value:g}", {"reward": weights(value)}) for value in LAMBDAS]
    found += [
        Variant("imitation", {"reward": main, "ppo": {"updates": 0}}),
        Variant("blind", {"reward": main, "blind": True}),
        Variant("dice_blind", {"reward": weights(1.0), "blind": True}),
        Variant("scratch", {"reward": main, "warm": {"kind": "none"}}),
        Variant("flat", {"reward": main, "warm": {"entropy": 0.3}}),
        Variant("terminal", {"reward": {**main, "mode": "terminal"}, "warm": {"kind": "none"}}),
        Variant("ce", {"reward": {**main, "seg_quality": "ce"}}),
    ]
    del budgets
    return found


def weights(segmentation: float) -> dict[str, float]:
    """Weights of the reward."""
    return {"rec": 1.0 - segmentation, "seg": segmentation}


# --- data --------------------------------------------------------------------------------------------------


def prepare(work: Path, scale: Scale) -> None:
    """Write the synthetic patients of both groups."""
    for group, first in (("tune", 70), ("report", 7)):
        for setting, shift in (("standard", 0.0), ("shifted", SHIFT * scale.size / 64)):
            write_cardiac(
                work / "data" / f"{group}_{setting}",
                cases=scale.patients,
                test_cases=0,
                seed=first + (setting == "shifted"),
                shape=(scale.size, scale.size),
                slices=scale.slices,
                shift_k=shift,
            )


def root_of(unit: Unit, work: Path, acdc: Path | None) -> Path:
    """The dataset of a unit."""
    if unit.setting != "real":
        return work / "data" / f"{unit.group}_{unit.setting}"
    if acdc is None:
        raise SystemExit("real slices need --acdc FOLDER")
    return acdc


@dataclass(frozen=True)
class Division:
    """Cases by duty; no patient has two."""

    reward: tuple[str, ...]
    policy: tuple[str, ...]
    test: tuple[str, ...]

    def without(self, *duties: str) -> list[str]:
        """Cases that a run with the other duties leaves out."""
        return [case for duty in duties for case in getattr(self, duty)]


def divide(root: Path, unit: Unit) -> Division:
    """Deal the patients: every FOLDS-th is tested on, the others train reward model and policy in turn."""
    cases = open_scans(root).scans
    patients = sorted({case.patient or case.id for case in cases})
    order = np.random.default_rng(5).permutation(len(patients)).tolist()
    duty: dict[str, str] = {}
    for place, number in enumerate(order):
        other = "reward" if (place // FOLDS + place) % 2 else "policy"
        duty[patients[number]] = "test" if place % FOLDS == unit.fold else other
    dealt: dict[str, list[str]] = {"reward": [], "policy": [], "test": []}
    for case in cases:
        dealt[duty[case.patient or case.id]].append(case.id)
    return Division(*(tuple(dealt[name]) for name in ("reward", "policy", "test")))


# --- runs --------------------------------------------------------------------------------------------------


def common(unit: Unit, root: Path, scale: Scale) -> dict[str, Any]:
    """The config that all runs of a unit share."""
    budgets = [total - scale.initial for total in scale.totals]
    sample: dict[str, Any] = {"shape": [scale.size, scale.size], "noise_std": 0.0}
    if unit.setting == "real":
        # Files are stored at 256² or so: the middle, at half of the resolution where 128 columns are wanted.
        sample["norm"] = "volume_p99"
        sample["downsample"] = max(1, 256 // scale.size)
    base: dict[str, Any] = {
        "data": {"root": str(root), "folds": 4 if unit.setting == "real" else 5},
        "sample": sample,
        "acquisition": {"init_center": scale.initial, "sensitivity_lines": 0},
        "budget": {"train": [budgets[0], budgets[-1]], "eval": budgets},
        "model": {"name": "kspace.compact"},
        "agent": {"name": "kspace.columns"},
        "seg": {"steps": scale.reward_steps, "ema": 0.99, "lr": 4e-3},
        "train": {"seed": unit.seed, "threads": 1, "device": "cpu", "batch_size": 16},
    }
    return merged(base, scale.values)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def fit(manager: PluginManager, values: dict[str, Any], folder: Path) -> None:
    """Train one run, or finish it."""
    done = folder / "finished"
    if not done.exists():
        running.run(build_train_job(manager, "kspace", values, folder))
        done.write_text("")


def work_on(unit: Unit, work: Path, acdc: Path | None, scale: Scale, only: Sequence[str]) -> None:
    """Train and measure one unit; what is finished is kept."""
    manager = PluginManager.create(third_party=False)
    root, folder = root_of(unit, work, acdc), unit.folder(work)
    division = divide(root, unit)
    base = common(unit, root, scale)
    started = time.process_time()
    reward = {"stage": "reward", "data": {"exclude": division.without("test", "policy")}}
    fit(manager, merged(base, reward), folder / "reward")
    chosen = [item for item in variants(base["budget"]["eval"]) if not only or item.name in only]
    for variant in chosen:
        mine = {
            "data": {"exclude": division.without("test", "reward")},
            "inputs": {"reward": str(folder / "reward")},
        }
        fit(manager, merged(base, mine, variant.values), folder / variant.name)
    names = [item.name for item in chosen]
    result = folder / "result.json"
    known = json.loads(result.read_text()) if result.exists() else {}
    if set(names) - set(known.get("measured", {})):
        found = measure(manager, folder, names, division, base, scale)
        found["cpu_seconds"] = time.process_time() - started
        result.write_text(json.dumps(evaluate.plain(found)))


def measure(
    manager: PluginManager,
    folder: Path,
    names: Sequence[str],
    division: Division,
    base: Mapping[str, Any],
    scale: Scale,
) -> dict[str, Any]:
    """Measure the policies of a unit and all rivals on its test patients, by patient."""
    device = torch.device("cpu")
    runs = {name: open_run(folder / name, manager, device) for name in names}
    first = next(iter(runs.values()))
    data = Data(domain.load(first.cfg).parts)
    dataset = open_scans(base["data"]["root"])
    test = [case for case in dataset.scans if case.id in division.test]
    slices = load_set(dataset, test, make_plan(first.cfg.sample, dataset.labels))
    cases, info = cases_of(slices, first.cfg), info_of(slices, first.cfg)
    observer = first.observer(cases)
    training = first.observer(data.cases("train", first.cfg, device))
    budgets = base["budget"]["eval"]
    policies: dict[str, LinePolicy] = {
        name: Seen(run, AgentLines(run.policy())) for name, run in runs.items()
    }
    plain = [name for name in evaluate.BASELINES if name != "fixed"]
    policies |= evaluate.rivals(plain, training, parts.quality(first.cfg), max(budgets))
    for value in (MAIN, 1.0):
        quality = parts.quality(first.cfg.model_copy(update={"reward": reward_of(first, value)}))
        fixed = evaluate.rivals(["fixed", "fixed-exchanged"], training, quality, max(budgets))
        policies |= {f"{name} {value:g}": policy for name, policy in fixed.items()}
    curves = evaluate.run(observer, data, info, policies, budgets)
    few = evaluate.spread(len(cases), scale.oracle_cases).tolist()
    some, some_info = first.observer(cases.select(few)), [info[number] for number in few]
    oracles = {}
    for value in (MAIN, 1.0):
        quality = parts.quality(first.cfg.model_copy(update={"reward": reward_of(first, value)}))
        made = evaluate.rivals(["greedy-oracle"], training, quality, max(budgets))
        oracles[f"greedy-oracle {value:g}"] = made["greedy-oracle"]
    top = evaluate.run(some, data, some_info, oracles, budgets)
    measured = {name: rows_of(by) for name, by in curves.measured.items()}
    measured |= {name: rows_of(by) for name, by in top.measured.items() if name != evaluate.FULL}
    return {
        "initial": scale.initial,
        "measured": measured,
        "caveats": list(slices.caveats),
        "headroom": headroom(runs, cases, budgets),
    }


def reward_of(run: Restored, segmentation: float) -> Any:
    """The reward of a run with other weights."""
    return run.cfg.reward.model_copy(update={**weights(segmentation), "mode": "delta"})


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


def headroom(runs: Mapping[str, Restored], cases: Any, budgets: Sequence[int]) -> dict[str, float]:
    """What part of the one-step gain beyond the blind twin a policy finds without labels, on test cases.

    All are asked in the same states, on the way of the sighted policy.
    """
    if not {f"lambda{MAIN:g}", "blind"} <= set(runs):
        return {}
    sighted, blind = runs[f"lambda{MAIN:g}"], runs["blind"]
    from medrl.plugins.kspace.agent import Sighted

    eyes, dark = (Sighted(run.policy(), run.observer(cases)) for run in (sighted, blind))
    collector = StateCollector(
        eyes.observer, parts.quality(sighted.cfg), batch=32, budgets=tuple(budgets), seed=3, keep=()
    )
    parts_of = [collector.collect(eyes, oracle=0.0) for _ in range(8)]
    scores = [[imitation_score(policy, states) for states in parts_of] for policy in (eyes, dark)]
    own, other = (float(np.mean([score["gain"] for score in row])) for row in scores)
    best = float(np.mean([score["best"] for score in scores[0]]))
    room = best - other
    return {
        "policy": own,
        "blind": other,
        "best": best,
        "found": (own - other) / room if room else math.nan,
    }


# --- the page ----------------------------------------------------------------------------------------------

Values = dict[str, dict[str, dict[str, dict[str, list[float]]]]]
"""By policy, budget, metric and patient: one value for each seed."""


def finished(work: Path, group: str, setting: str) -> tuple[Values, list[dict[str, Any]]]:
    """All finished units of a setting."""
    values: Values = {}
    units = []
    for path in sorted((work / group / setting).glob("fold*_seed*/result.json")):
        content = json.loads(path.read_text())
        units.append(content)
        for policy, by_budget in content["measured"].items():
            for budget, by_metric in by_budget.items():
                for metric, by_name in by_metric.items():
                    place = values.setdefault(policy, {}).setdefault(budget, {}).setdefault(metric, {})
                    for patient, value in by_name.items():
                        if value is not None:
                            place.setdefault(patient, []).append(value)
    return values, units


def mean_of(values: Values, policy: str, budget: str, metric: str) -> dict[str, float]:
    """Mean over seeds of each patient."""
    found = values.get(policy, {}).get(budget, {}).get(metric, {})
    return {patient: float(np.mean(row)) for patient, row in found.items()}


def shown(numbers: Sequence[float], *, signed: bool = False) -> str:
    """Mean with its 95 % bootstrap interval over patients."""
    if not numbers:
        return "–"
    found = bootstrap_ci(numbers, n=5000)
    form = "+.4f" if signed else ".4f"
    if not math.isfinite(found.low):
        return f"{found.mean:{form}}"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def difference(values: Values, first: str, second: str, budget: str, metric: str) -> list[float]:
    """Paired differences of patients that both have."""
    one, other = (mean_of(values, name, budget, metric) for name in (first, second))
    return [one[name] - other[name] for name in sorted(set(one) & set(other))]


def page_of(work: Path, group: str) -> str:
    """The page."""
    lines = [
        "# kspace: does a policy that looks beat fixed masks?",
        "",
        "Written by `benchmarks/kspace_evidence.py page`. Every patient is tested once in each seed, by "
        "networks that were trained on others; reward model and policy never share patients. Values of a "
        "patient are means over seeds; intervals are 95 % bootstrap intervals over patients, without a "
        "correction for several comparisons.",
        "",
    ]
    for setting in SETTINGS:
        values, units = finished(work, group, setting)
        if units:
            lines += section(setting, values, units)
    return "\n".join(lines) + "\n"


def section(setting: str, values: Values, units: Sequence[dict[str, Any]]) -> list[str]:
    """The part of one setting."""
    initial = units[0]["initial"]
    budgets = sorted({b for by in values.values() for b in by if b != "0"}, key=int)
    totals = [str(int(budget) + initial) for budget in budgets]
    patients = mean_of(values, "low-to-high", budgets[0], "ssim")
    lines = [f"## {setting}", "", f"{len(units)} units, {len(patients)} patients.", ""]
    lines += [f"- {note}" for note in units[0]["caveats"]] + [""]
    for metric in METRICS:
        lines += [f"### {metric}", "", "| policy | " + " | ".join(totals) + " |"]
        lines += ["|---|" + "---|" * len(totals)]
        for policy in values:
            if policy != evaluate.FULL:
                cells = [shown(list(mean_of(values, policy, budget, metric).values())) for budget in budgets]
                lines.append(f"| {policy} | " + " | ".join(cells) + " |")
        full = shown(list(mean_of(values, evaluate.FULL, "0", metric).values()))
        lines += [f"| all lines | {full} |" + " |" * (len(totals) - 1), ""]
    lines += ["### Paired differences", "", "| Dice of slices | " + " | ".join(totals) + " |"]
    lines += ["|---|" + "---|" * len(totals)]
    for first, second in PAIRS:
        cells = [shown(difference(values, first, second, b, "dice"), signed=True) for b in budgets]
        lines.append(f"| {first} − {second} | " + " | ".join(cells) + " |")
    rooms = [unit["headroom"] for unit in units if unit.get("headroom")]
    found = [room["found"] for room in rooms if room.get("found") is not None]
    if found:
        lines += [
            "",
            f"Of the one-step gain that the oracle has beyond the blind twin, the policy finds "
            f"{np.mean(found):.1%} without labels (units: {min(found):.1%} to {max(found):.1%}).",
        ]
    return [*lines, ""]


PAIRS = (
    (f"lambda{MAIN:g}", "low-to-high"),
    (f"lambda{MAIN:g}", f"fixed {MAIN:g}"),
    (f"lambda{MAIN:g}", f"fixed-exchanged {MAIN:g}"),
    (f"lambda{MAIN:g}", "blind"),
    ("blind", f"fixed {MAIN:g}"),
    ("lambda1", "low-to-high"),
    ("lambda1", "fixed 1"),
    ("lambda1", "fixed-exchanged 1"),
    ("lambda1", "dice_blind"),
    ("dice_blind", "fixed 1"),
    (f"lambda{MAIN:g}", "imitation"),
)


# --- command line ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = sys.stderr.write) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("task", choices=["prepare", "run", "page"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--acdc", type=Path)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--group", choices=sorted(SEEDS), default="report")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=0, help="Only the first so many.")
    parser.add_argument("--folds", type=int, default=FOLDS, help="Only the first so many.")
    parser.add_argument("--only", default="", help="Names of policies.")
    given = parser.parse_args(arguments)
    scale = SCALES[given.scale]
    if given.task == "prepare":
        prepare(given.work, scale)
        return
    if given.task == "page":
        text = page_of(given.work, given.group)
        if given.page is None:
            sys.stdout.write(text)
        else:
            given.page.write_text(text)
        return
    torch.set_num_threads(1)
    index, count = (int(word) for word in given.part.split("/"))
    seeds = SEEDS[given.group][: given.seeds or None]
    units = [
        Unit(setting, fold, seed, given.group)
        for seed in seeds
        for fold in range(given.folds)
        for setting in given.settings.split(",")
    ]
    for unit in units[index - 1 :: count]:
        say(f"{unit}\n")
        work_on(unit, given.work, given.acdc, scale, [name for name in given.only.split(",") if name])


if __name__ == "__main__":
    main()
