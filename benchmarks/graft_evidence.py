"""Does weighing the teachers help the student, and does the agent learn whom to trust?

Trains five teachers, spoils some, distils them into a student with few labels under every weighting, over
several seeds, on synthetic prostates and on the hippocampus set. One run is one process of a few seconds to
a minute; finished runs are kept, so that the script goes on where it stopped and two can share the work::

    python benchmarks/graft_evidence.py prepare --work WORK --data ../shared/data/hippocampus
    python benchmarks/graft_evidence.py run     --work WORK --part 1/2 &
    python benchmarks/graft_evidence.py run     --work WORK --part 2/2
    python benchmarks/graft_evidence.py page    --work WORK --page docs/results/graft.md

Cases are parted once: teachers' cases, cases on which settings were chosen (`tune`), cases of the results
(`report`). The two student groups have their own unlabelled and test cases, and different seeds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from medrl.core import stats
from medrl.core.dataset import open_dataset
from medrl.core.jobs import build_train_job
from medrl.core.manager import PluginManager
from medrl.core.phantoms.prostate import write_prostate
from medrl.core.volume import read_volume
from medrl.plugins.graft import data as graft_data
from medrl.plugins.graft import teachers as graft_teachers
from medrl.plugins.graft import train as graft_train
from medrl.plugins.graft.features import FeatureWriter, open_teacher

TEACHERS = 5
STEPS = {"phantom": 300, "hippocampus": 300}
TEACHER_STEPS = {"phantom": 600, "hippocampus": 500}
SEEDS = {"tune": (101, 102), "report": (0, 1, 2, 3, 4)}
GROUPS = {"phantom": (60, 40, 60), "hippocampus": (60, 30, 60)}
"""Cases of the teachers, of `tune`, and of `report`; in the last two one half is the test."""
LABELLED = 5
REWARD = 4


# --- datasets ----------------------------------------------------------------------------------------------


def write_case(
    root: Path, part: str, name: str, images: list[np.ndarray], label: np.ndarray, affine: Any
) -> None:
    """Write the channels and the label of one case."""
    for channel, image in enumerate(images):
        path = root / f"images{part}" / f"{name}_{channel:04d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(nib.Nifti1Image(image.astype(np.float32), affine).to_bytes(), 1))
    path = root / f"labels{part}" / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(nib.Nifti1Image(label.astype(np.uint8), affine).to_bytes(), 1))


def resized_hippocampus(source: Path, work: Path) -> dict[str, tuple[list[np.ndarray], np.ndarray, Any]]:
    """Every case on a grid of 24 × 32 × 20 voxels, so that one run takes seconds."""
    target = (24, 32, 20)
    cases = {}
    for case in open_dataset(source).cases:
        image = read_volume(case.images[0])
        label = read_volume(case.label, kind="label")
        factors = [new / old for new, old in zip(target, image.data.shape[1:], strict=True)]
        affine = image.affine @ np.diag([*(1 / factor for factor in factors), 1.0])
        small = ndimage.zoom(
            image.data[0].astype(np.float32), factors, order=1, grid_mode=True, mode="nearest"
        )
        names = ndimage.zoom(label.data[0], factors, order=0, grid_mode=True, mode="nearest")
        cases[case.id] = ([small], names, affine)
    return cases


def phantom_cases(work: Path) -> dict[str, tuple[list[np.ndarray], np.ndarray, Any]]:
    """Synthetic prostates of 32 × 32 × 12 voxels."""
    folder = work / "phantom" / "source"
    if not folder.exists():
        write_prostate(
            folder,
            cases=sum(GROUPS["phantom"]),
            test_cases=0,
            seed=7,
            shape=(32, 32, 12),
            spacing=(1.0, 1.0, 3.0),
        )
    cases = {}
    for case in open_dataset(folder).cases:
        images = [read_volume(path) for path in case.images]
        label = read_volume(case.label, kind="label")
        cases[case.id] = ([image.data[0] for image in images], label.data[0], label.affine)
    return cases


def prepare_dataset(work: Path, kind: str, source: Path | None) -> None:
    """Write the datasets `teachers`, `flipped` (mirrored labels), `tune` and `report` of one kind."""
    root = work / kind
    if (root / "prepared").exists():
        return
    cases = phantom_cases(work) if kind == "phantom" else resized_hippocampus(source, work)
    labels = (
        {"background": 0, "prostate": 1, "PCa": 2, "csPCa": 3}
        if kind == "phantom"
        else {"background": 0, "anterior": 1, "posterior": 2}
    )
    channels = ("T2", "ADC", "DWI") if kind == "phantom" else ("T1",)
    names = sorted(cases)
    random.Random(0).shuffle(names)
    first, second, third = GROUPS[kind]
    groups = {
        "teachers": names[:first],
        "tune": names[first : first + second],
        "report": names[first + second :][:third],
    }
    groups["flipped"] = groups["teachers"]
    for group, chosen in groups.items():
        folder = root / group
        shutil.rmtree(folder, ignore_errors=True)
        for name in chosen:
            images, label, affine = cases[name]
            mirrored = np.flip(label, axis=(0, 1)) if group == "flipped" else label
            write_case(folder, "Tr", name, images, mirrored, affine)
        description = {
            "channel_names": {str(k): name for k, name in enumerate(channels)},
            "labels": labels,
            "numTraining": len(chosen),
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(description, indent=2))
        if group in ("tune", "report"):
            half = len(chosen) // 2
            splits = [{"train": sorted(chosen[half:]), "val": sorted(chosen[:half])}]
            (folder / "splits_final.json").write_text(json.dumps(splits, indent=2))
    (root / "prepared").write_text("yes\n")


# --- teachers ----------------------------------------------------------------------------------------------


def common(kind: str, group: str, work: Path) -> dict[str, Any]:
    """Values that all runs of a dataset share."""
    return {
        "data": {"root": str(work / kind / group), "fold": 0, "group_by": "case"},
        "sample": {"window": "centre", "normalization": "volume"},
        "target": {"kind": "binary" if kind == "phantom" else "classes"},
        "train": {"precision": "bf16", "lr": 3e-3, "threads": 1, "batch_size": 2},
    }


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested values, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def fit(manager: PluginManager, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one run in this process and return its last validation and its log."""
    job = build_train_job(manager, "graft", values, folder)
    with job.runtime() as rt:
        graft_train.fit(rt, job.config, graft_data.load(rt, job.config))
    return read_run(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the last validation of a run, and what it logged."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in records if "val_dice_case" in record]
    return {"last": validations[-1], "records": records}


def prepare_teachers(work: Path, kind: str, manager: PluginManager) -> None:
    """Train five teachers on folds, one more with mirrored labels, and write honest and spoilt features."""
    root = work / kind
    steps = {"train": {"max_steps": TEACHER_STEPS[kind], "validate_every": TEACHER_STEPS[kind]}}
    for number in range(TEACHERS):
        folder = root / "runs" / f"teacher_{number}"
        if not (folder / "report_me").exists():
            values = merged(
                common(kind, "teachers", work),
                steps,
                {"data": {"fold": number}, "train": {"seed": 50 + number}},
            )
            fit(manager, values, folder)
            (folder / "report_me").write_text("")
    folder = root / "runs" / "flipped"
    if not (folder / "report_me").exists():
        fit(manager, merged(common(kind, "flipped", work), steps, {"train": {"seed": 77}}), folder)
        (folder / "report_me").write_text("")
    for group in ("tune", "report"):
        job = build_train_job(manager, "graft", common(kind, group, work), root / "unused")
        honest = root / f"features_{group}"
        names = [*(f"teacher_{number}" for number in range(TEACHERS)), "flipped"]
        runs = [path for name in names for path in graft_teachers.find_teachers(root / "runs" / name)]
        graft_teachers.extract(
            manager,
            job.config,
            runs,
            honest,
            taps=["neg1"],
            dtype="bf16",
            every_case=True,
            say=lambda line: None,
        )
        spoil(root, group)


def spoil(root: Path, group: str) -> None:
    """Write two sets of five teachers.

    A: three honest teachers, one trained on mirrored labels, one blurred (features σ = 2, logits σ = 1.1).
    B: two honest teachers, one blurred, and two with honest logits whose features are those of another case
    or of noise: their logits do not give them away.
    """
    honest = root / f"features_{group}"
    for name, plan in {
        "A": ("teacher_0", "teacher_1", "teacher_2", ("teacher_5", same), ("teacher_3", blurred)),
        "B": (
            "teacher_0",
            "teacher_1",
            ("teacher_2", blurred),
            ("teacher_3", shuffled),
            ("teacher_4", noisy),
        ),
    }.items():
        for number, item in enumerate(plan):
            source, change = (item, same) if isinstance(item, str) else item
            rewrite(honest / source, root / f"set_{name}_{group}" / f"teacher_{number}", change)


def same(arrays: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An honest teacher."""
    return arrays


def blurred(arrays: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Features and logits smoothed in space."""
    sigma = {"neg1": 2.0, "logits": 1.1}
    return {
        name: torch.from_numpy(ndimage.gaussian_filter(array.float().numpy(), (0, *[sigma[name]] * 3)))
        for name, array in arrays.items()
    }


def shuffled(arrays: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Honest logits, features of another case."""
    return {**arrays, "neg1": other["neg1"]}


def noisy(arrays: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Honest logits, features of smooth noise."""
    features = arrays["neg1"].float()
    generator = np.random.default_rng(int(features.abs().sum() * 1000) % 2**32)
    noise = ndimage.gaussian_filter(generator.normal(size=tuple(features.shape)), (0, 1, 1, 1))
    return {**arrays, "neg1": torch.from_numpy(noise / noise.std()).float()}


def rewrite(source: Path, target: Path, change: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Write the features of a teacher again, changed."""
    if (target / "complete").exists():
        return
    teacher = open_teacher(source)
    writer = FeatureWriter(
        target, teacher=teacher.teacher, source=str(source), channels=teacher.channels,
        target=teacher.target, labels=teacher.labels, dtype="bf16",
    )  # fmt: skip
    cases = teacher.cases()
    for position, case in enumerate(cases):
        expected, arrays = stored(source, case)
        other = stored(source, cases[(position + 1) % len(cases)])[1]
        changed = {name: array.float() for name, array in change(arrays, other).items()}
        writer.write(expected, changed)
    (target / "complete").write_text("")


def stored(folder: Path, case: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """The arrays of one case and what they were made for."""
    from medrl.plugins.graft.features import Expected
    from medrl.plugins.graft.windows import Window

    meta = json.loads((folder / case / "meta.json").read_text())
    expected = Expected(
        case_id=case, window=Window.from_meta(meta["window"]), shape=tuple(meta["shape"]),
        spacing=tuple(meta["spacing"]), image_hash=meta["image_hash"],
    )  # fmt: skip
    return expected, open_teacher(folder).read(expected, sorted(meta["arrays"]))


# --- runs --------------------------------------------------------------------------------------------------

FEATURES = {"distill": {"feature_weight": 1.0, "logit_weight": 0.0}}
LOGITS = {"distill": {"feature_weight": 0.0, "logit_weight": 1.0}}
BAD = {"A": (3,), "B": (3, 4)}
"""Teachers whose guidance is wrong: the mirrored one; the ones with another case's features or noise."""
ORACLE = {"A": [1 / 3, 1 / 3, 1 / 3, 0.0, 0.0], "B": [0.5, 0.5, 0.0, 0.0, 0.0]}


@dataclass(frozen=True)
class Run:
    """One training of the matrix."""

    kind: str
    teachers: str
    channel: str
    name: str
    seed: int
    group: str = "report"
    values: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def folder(self) -> str:
        """Folder of the run below the work folder."""
        return f"{self.kind}/{self.group}/{self.teachers}_{self.channel}_{self.name}_{self.seed}"


def conditions(teachers: str, channel: str) -> dict[str, dict[str, Any]]:
    """Weightings that are compared, by name."""
    best = "probe" if channel == "features" else "quality"

    def reinforce(prior: str, **agent: Any) -> dict[str, Any]:
        return {"weighting": {"mode": "reinforce", "prior": prior}, "agent": agent, **with_reward()}

    fixed = {
        f"single {number}": {
            "weighting": {"mode": "fixed", "fixed": [float(k == number) for k in range(TEACHERS)]}
        }
        for number in range(TEACHERS)
    }
    return {
        "uniform": {"weighting": {"mode": "uniform"}},
        "quality": {"weighting": {"mode": "quality"}},
        "probe": {"weighting": {"mode": "probe"}},
        "align": {"weighting": {"mode": "align", "prior": "uniform"}, **with_reward()},
        "meta": {"weighting": {"mode": "meta"}},
        "legacy": {"weighting": {"mode": "legacy"}},
        "reinforce, prior uniform": reinforce("uniform"),
        "random reward, prior uniform": reinforce("uniform", random_reward=True),
        f"reinforce, prior {best}": reinforce(best),
        f"random reward, prior {best}": reinforce(best, random_reward=True),
        f"{best}, reward labels trained": {"weighting": {"mode": best}, **all_labels()},
        "oracle": {"weighting": {"mode": "fixed", "fixed": ORACLE[teachers]}},
        **(fixed if channel == "features" else {}),
    }


def with_reward() -> dict[str, Any]:
    """Nine labelled cases, of which four measure the reward and are not trained on."""
    return {"split": {"labelled": LABELLED + REWARD, "reward": REWARD / (LABELLED + REWARD)}}


def all_labels() -> dict[str, Any]:
    """Train on the labels that the agent spends on its reward: the honest price of an agent."""
    return {"split": {"labelled": LABELLED + REWARD}}


def matrix(group: str) -> list[Run]:
    """Every run of the results, the most telling first."""
    runs = []
    for seed in SEEDS[group]:
        for kind in ("hippocampus", "phantom"):
            runs.append(Run(kind, "no", "teachers", "labels only", seed, group))
            runs.append(
                Run(kind, "no", "teachers", "labels only, reward labels trained", seed, group, all_labels())
            )
            for teachers, channel in (("A", "features"), ("A", "logits"), ("B", "features")):
                for name, values in conditions(teachers, channel).items():
                    runs.append(Run(kind, teachers, channel, name, seed, group, values))
    return runs


def execute(run: Run, work: Path, manager: PluginManager) -> None:
    """Train one run unless it is finished."""
    folder = work / run.folder
    result = folder / "result.json"
    if result.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    steps = STEPS[run.kind]
    values = merged(
        common(run.kind, run.group, work),
        {"train": {"max_steps": steps, "validate_every": steps, "checkpoint_every": steps, "seed": run.seed}},
        {"split": {"labelled": LABELLED}},
        {}
        if run.teachers == "no"
        else {"teachers": {"features": [str(work / run.kind / f"set_{run.teachers}_{run.group}")]}},
        {"features": FEATURES, "logits": LOGITS}.get(run.channel, {}),
        run.values,
    )
    seconds = os.times().user
    found = fit(manager, values, folder)
    seconds = os.times().user - seconds
    last = {key: value for key, value in found["last"].items() if key.startswith("val_")}
    weights = [r for r in found["records"] if any(key.startswith("weight") for key in r)]
    kept = weights[:: max(1, len(weights) // 12)] + weights[-1:] if weights else []
    result.write_text(json.dumps({"validation": last, "weights": kept, "seconds": seconds}))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def finished(work: Path, group: str) -> dict[tuple[str, str, str], dict[str, dict[int, float]]]:
    """Dice of every finished run: by dataset, teachers and channel; then by weighting and seed."""
    found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for run in matrix(group):
        path = work / run.folder / "result.json"
        if path.exists():
            dice = json.loads(path.read_text())["validation"]["val_dice_case"]
            table = found.setdefault((run.kind, run.teachers, run.channel), {})
            table.setdefault(run.name, {})[run.seed] = dice
    return found


def page(work: Path, group: str) -> str:
    """One table for each dataset, set of teachers and channel: Dice, and the gain over uniform weights."""
    seeds = SEEDS[group]
    lines = [
        "# graft: weighings of the teachers",
        "",
        f"Seeds {', '.join(map(str, seeds))}; Dice of test cases.",
    ]
    for (kind, teachers, channel), table in finished(work, group).items():
        lines += ["", f"## {kind}, teachers {teachers}, {channel}", ""]
        lines += ["| weighting | runs | mean Dice | gain over uniform [95 % interval] |", "|---|---|---|---|"]
        uniform = table.get("uniform", {})
        for name, found in table.items():
            mean = sum(found.values()) / len(found)
            common = sorted(set(found) & set(uniform))
            gain = "–"
            if len(common) >= 2 and name != "uniform":
                gap = stats.paired_difference([found[s] for s in common], [uniform[s] for s in common])
                gain = f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            lines.append(f"| {name} | {len(found)} of {len(seeds)} | {mean:.3f} | {gain} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Prepare, run, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["prepare", "run", "page"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--group", choices=["tune", "report"], default="report")
    parser.add_argument("--only", default="", help="Run only what has this word in its folder.")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.resolve()
    manager = PluginManager.create()
    if options.step == "prepare":
        for kind in ("phantom", "hippocampus"):
            prepare_dataset(work, kind, options.data)
            prepare_teachers(work, kind, manager)
    elif options.step == "run":
        index, count = (int(word) for word in options.part.split("/"))
        runs = [run for run in matrix(options.group) if options.only in run.folder]
        for position, run in enumerate(runs[index - 1 :: count]):
            execute(run, work, manager)
            print(f"{position + 1}/{len(runs[index - 1 :: count])} {run.folder}", flush=True)
    else:
        text = page(work, options.group)
        if options.page:
            options.page.write_text(text)
        else:
            sys.stdout.write(text)


if __name__ == "__main__":
    main()
