"""Does rl4seg3d help on sequences of another scanner, and which part of it does?

Compares the iterations of the loop with everything that uses the same knowledge without reinforcement
learning: on synthetic beating hearts under two strengths of a shift, and on real frames morphed into
sequences, patients of one group as source, others under a simulated device. One seed of one setting is one
job, done in passes with the most important rows first; what is finished is kept, so that the script goes on
where it stopped, and two can share the work::

    python benchmarks/rl4seg3d_evidence.py prepare --work WORK --data ../shared/data/camus_4ch
    python benchmarks/rl4seg3d_evidence.py run     --work WORK --part 1/2 &
    python benchmarks/rl4seg3d_evidence.py run     --work WORK --part 2/2
    python benchmarks/rl4seg3d_evidence.py page    --work WORK --page docs/results/rl4seg3d.md

``tune`` does the same on other seeds and other cases (``--group tune``) with settings that are given, and
shows the target test scores; what `VALUES` says was chosen there. ``jobs`` lists what is left, and its cost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rl4seg3d_morphing import write_morphed
from rl4seg3d_page import ROWS, page
from torch import Tensor, nn

from medrl.core.adaptation.parts import rules_of
from medrl.core.jobs import TrainJob, build_train_job
from medrl.core.learned_reward import CompositeReward, RewardNet
from medrl.core.learned_reward.correctors import CorrectorModule
from medrl.core.learned_reward.quality import RewardQuality, held_out_quality
from medrl.core.manager import PluginManager
from medrl.core.phantoms.echo import write_echo_sequences
from medrl.core.types import Volume
from medrl.core.validity import is_valid
from medrl.core.validity.temporal import check_sequence
from medrl.core.volume import write_volume
from medrl.plugins.rl4seg3d import loop, parts
from medrl.plugins.rl4seg3d.config import Rl4seg3dConfig
from medrl.plugins.rl4seg3d.domains import Domains, SequenceSet, load_domains, test_sequences
from medrl.plugins.rl4seg3d.predict_config import TTOConfig
from medrl.plugins.rl4seg3d.predicting import Segmenter
from medrl.plugins.rl4seg3d.rewards import FusedReward
from medrl.plugins.rl4seg3d.scoring import Scores, largest_blobs, score_masks, segment
from medrl.plugins.rl4seg3d.tto import optimise

CASES = {"source": 60, "target": 100, "test": 24}
"""Synthetic sequences of a seed; those of the target have no labels in training."""
SIZE, FRAMES = 64, 12
REAL_SIZE, REAL_FRAMES = 64, 20
"""Real hearts are on a coarser grid; a beat has more frames, as the temporal rules expect."""
SHARES, DEVICE = (0.5, 0.25, 0.25), 0.7
"""Parts of the real patients: source, target, test; strength of the simulated device."""
CPU = torch.device("cpu")

VALUES: dict[str, Any] = {
    "source": {"lr": 5e-3},
    "style": {"lr": 4e-3},
    "corrector": {"lr": 5e-3, "steps": 800},
    "reward": {"nets": ["anatomical"]},
}
"""Settings beyond preset `small`, chosen on the group `tune`."""
PPO: dict[str, Any] = {}
"""Further ones, of reinforcement learning alone, chosen there too."""
LEGACY: dict[str, Any] = {
    "pairs": {"kind": "prediction"},
    "reward": {
        "nets": ["anatomical", "landmark"],
        "head": "binary",
        "encoding": "scalar",
        "criterion": "mse",
        "init": "random",
        "stretch": True,
        "weight": 1.0,
    },
}
"""Rewards as the original makes them: binary nets on predictions, stretched, the lesser of both."""


@dataclass(frozen=True)
class Setting:
    """One pair of domains.

    Attributes:
        name: Folder.
        phantom: Arguments of the target phantoms; None for morphed real frames.
        seeds: Seeds of a group.
        iterations: Of the loop.
        minutes: CPU minutes of a job, roughly.
        values: Settings beyond `VALUES`.
    """

    name: str
    phantom: dict[str, Any] | None
    seeds: Mapping[str, tuple[int, ...]]
    iterations: int
    minutes: int
    values: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("middle", {"shift": 1.0}, {"tune": (101, 102), "report": (1, 2, 3, 4, 5)}, 4, 22),
    Setting(
        "real",
        None,
        {"tune": (101,), "report": (1, 2, 3, 4, 5)},
        1,
        15,
        {"source": {"spatial": 1.0, "steps": 600}, "style": {"spatial": 1.0, "steps": 600}},
    ),
    Setting("strong", {"shift": 1.25}, {"tune": (101,), "report": (1, 2)}, 1, 13),
)
PASSES = (
    ("source", "style", "iteration_1", "style-steps", "self-training", "posthoc-corrector", "posthoc-both"),
    ("source+tta", "iteration_1+tta", "iteration_1+tto", "legacy", "oracle"),
    ("iteration_2", "iteration_3", "iteration_4"),
)
"""Rows in the order in which all jobs do them."""
BY_NAME = {setting.name: setting for setting in SETTINGS}
Job = tuple[Setting, int]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested values over each other."""
    found: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = found.get(key)
            found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


# --- datasets ----------------------------------------------------------------------------------------------


def data_folder(work: Path, setting: Setting, seed: int, domain: str) -> Path:
    """Folder of a dataset; the synthetic source is that of all settings."""
    if setting.phantom is not None and domain == "source":
        return work / "data" / f"source_{seed}"
    return work / "data" / setting.name / f"{domain}_{seed}"


def prepare(work: Path, jobs: Sequence[Job], camus: Path | None) -> None:
    """Write the datasets of jobs; what is there is kept."""
    for setting, seed in jobs:
        source, target = (data_folder(work, setting, seed, domain) for domain in ("source", "target"))
        if setting.phantom is not None:
            shared: dict[str, Any] = {"size": (SIZE, SIZE), "frames": FRAMES}
            write_echo_sequences(source, cases=CASES["source"], test_cases=0, seed=10 * seed + 1, **shared)
            write_echo_sequences(
                target,
                cases=CASES["target"],
                test_cases=CASES["test"],
                seed=10 * seed + 2,
                **shared,
                **setting.phantom,
            )
        elif camus is not None:
            sizes: dict[str, Any] = {"size": REAL_SIZE, "frames": REAL_FRAMES}
            write_morphed(camus, source, target, seed=seed, shares=SHARES, strength=DEVICE, **sizes)
        else:
            say("real frames are left out: no --data")


# --- one job -----------------------------------------------------------------------------------------------


class Work:
    """One seed of one setting: its runs, the label maps of its rows, their scores.

    Args:
        work: Folder of everything.
        group: `tune` or `report`.
        job: Setting and seed.
        manager: Source of networks.
        more: Settings laid over all others.
        name: Another folder than that of the setting.
    """

    def __init__(
        self, work: Path, group: str, job: Job, manager: PluginManager, more: Mapping[str, Any], name: str
    ) -> None:
        self.setting, self.seed = job
        self.manager, self.more = manager, more
        self.folder = work / group / (name or self.setting.name) / f"seed_{self.seed}"
        self.values = merged(
            {
                "data": {"root": str(data_folder(work, self.setting, self.seed, "source"))},
                "target": {"root": str(data_folder(work, self.setting, self.seed, "target"))},
                "train": {"seed": self.seed, "threads": 1, "device": "cpu"},
            },
            VALUES,
            self.setting.values,
            more,
        )
        self.base: Rl4seg3dConfig = self.job(self.folder / "base").config
        self.extra = self.base.ppo.steps * self.base.ppo.inner_steps
        self.data: Domains | None = None
        self.test: SequenceSet | None = None

    def job(self, run: Path, values: Mapping[str, Any] | None = None) -> TrainJob:
        """A training job of this seed."""
        return build_train_job(
            self.manager,
            "rl4seg3d",
            merged(self.values, values or {}),
            run,
            preset="small",
            command=tuple(sys.argv),
        )

    def do(self, only: Sequence[str] = ()) -> None:
        """Train what is not trained yet, then score the rows that are not scored yet."""
        wanted = [row for row in ROWS if (not only or row in only) and self.has(row)]
        self.train(wanted)
        for row in wanted:
            place = self.folder / "rows" / f"{row}.json"
            if place.exists():
                continue
            started = os.times().user
            scores = self.score(row)
            place.parent.mkdir(parents=True, exist_ok=True)
            seconds = round(os.times().user - started, 1)
            place.write_text(json.dumps({**scores.as_dict(), "seconds": seconds}), encoding="utf-8")
            shown = scores.summary()
            say(
                f"{self.setting.name} {self.seed} {row:20} Dice {shown['dice']:.3f} HD {shown['hd']:.2f} "
                f"anat {shown['anat_valid_frames']:.2f} temp {shown['temporal_valid']:.2f} "
                f"errors {shown['temporal_errors']:.2f} ({seconds:.0f} s)"
            )
        place = self.folder / ("rewards_legacy.json" if "legacy" in wanted else "rewards.json")
        if not place.exists() and ("legacy" in wanted or "iteration_1" in wanted):
            place.write_text(json.dumps(self.judged(legacy="legacy" in wanted)), encoding="utf-8")

    def has(self, row: str) -> bool:
        """Whether this setting has a row."""
        return not row.startswith("iteration_") or int(row[10]) <= self.setting.iterations

    # -- training --

    def train(self, wanted: Sequence[str]) -> None:
        """What the rows need: parts, PPO on rewards of several kinds, and longer training without rewards."""
        for kind in ("source", "style", "corrector", "pairs", "anatomical"):
            self.once(f"base_{kind}", self.job(self.folder / "base", {"stage": kind}))
        parts_ = {name: str(self.stage(name)) for name in ("source", "style", "corrector")}
        ready = {"inputs": {**parts_, "anatomical": str(self.stage("anatomical_1"))}}
        if any(row.startswith("iteration_1") for row in wanted):
            self.once("ppo", self.job(self.folder / "ppo", merged(PPO, ready, self.more)))
        if "oracle" in wanted:
            over = {
                "reward": {"name": "rl4seg3d.pixelwise_accuracy"},
                "target": {"allow_labels": True},
            }
            self.once("oracle", self.job(self.folder / "oracle", merged(PPO, ready, over)))
        if "legacy" in wanted:
            over = merged(PPO, LEGACY, {"inputs": parts_})
            self.once("legacy", self.job(self.folder / "legacy", over))
        if any(row[-1] in "234" and row.startswith("iteration_") for row in wanted):
            over = {"inputs": parts_, "loop": {"iterations": self.setting.iterations}}
            self.once("iterations", self.job(self.folder / "iterations", merged(PPO, over)))
        longer = {"alone": True, "style": {"steps": self.extra, "lr": 1e-3}}
        if "style-steps" in wanted:
            over = {"inputs": {"source": str(self.stage("style"))}, "stage": "style", **longer}
            self.once("style-steps", self.job(self.folder / "style-steps", over))
        if "self-training" in wanted:
            taught = self.pseudo_labels()
            over = {
                "data": {"root": str(taught)},
                "alone": True,
                "stage": "source",
                "source": {"steps": self.extra, "lr": 1e-3},
            }
            made = self.job(self.folder / "self-training", over)
            self.once("self-training", replace(made, init_from=self.stage("style")))

    def once(self, name: str, job: TrainJob) -> None:
        """Run a job that is not done, and note its CPU seconds."""
        done = self.folder / f"{name}.done"
        if done.exists():
            return
        started = os.times().user
        loop.run(job)
        done.write_text(f"{os.times().user - started:.1f}\n", encoding="utf-8")
        say(f"{self.setting.name} {self.seed} {name}: {os.times().user - started:.0f} CPU s")

    def stage(self, name: str) -> Path:
        """Folder of a stage of the parts."""
        (found,) = (self.folder / "base" / "stages").glob(f"*_{name}")
        return found

    def pseudo_labels(self) -> Path:
        """Write target sequences with the style actor's labels, refined by reward net and corrector."""
        folder = self.folder / "pseudo"
        if (folder / "dataset.json").exists():
            return folder
        target = self.domains().target
        if target is None:
            raise SystemExit("the settings name no target")
        network, train = self.refiner(both=True), target.train
        for number, name in enumerate(train.ids):
            frames = train.images[number].float() / 255.0
            labels = segment(network, frames)
            like = _volume(frames[0].numpy(), train.spacing_mm[number])
            write_volume(folder / "imagesTr" / f"{name}_0000.nii.gz", like.data[0], like, kind="image")
            write_volume(folder / "labelsTr" / f"{name}.nii.gz", labels, like, kind="label")
        record = {
            "name": "pseudo-labels",
            "channel_names": {"0": "echo"},
            "labels": dict(self.domains().label_names),
            "numTraining": len(train.ids),
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(record), encoding="utf-8")
        return folder

    # -- parts --

    def domains(self) -> Domains:
        """Both domains."""
        if self.data is None:
            self.data = load_domains(self.base, self.manager)
        return self.data

    def sequences(self) -> SequenceSet:
        """Target test sequences with labels."""
        if self.test is None:
            self.test = test_sequences(self.base, self.domains())
        return self.test

    def actor(self, place: Path) -> nn.Module:
        """The network of an actor."""
        data = self.domains()
        network = parts.actor_network(self.base, self.manager, channels=data.channels, classes=data.classes)
        parts.load_part(place, "actor", network, str(place))
        return network.requires_grad_(requires_grad=False).eval()

    def net(self, *, calibrated: bool = False) -> RewardNet:
        """The anatomical reward net."""
        return self.opened(self.base, self.stage("anatomical_1"), "anatomical", calibrated)

    def opened(self, cfg: Rl4seg3dConfig, place: Path, name: Any, calibrated: bool) -> RewardNet:
        """A reward net of any config."""
        data = self.domains()
        net = parts.reward_net(cfg, self.manager, name, channels=data.channels, classes=data.classes)
        parts.load_part(place, "reward", net, name)
        if not calibrated:
            net.set_temperature(1.0)
        return net.requires_grad_(requires_grad=False).eval()

    def corrector(self) -> CorrectorModule:
        """The corrector."""
        made = parts.corrector(self.base, self.manager, self.domains())
        parts.load_part(self.stage("corrector"), "corrector", made, "corrector")
        return made.requires_grad_(requires_grad=False).eval()

    def refiner(self, *, both: bool) -> Callable[[Tensor], Tensor]:
        """The style actor, refined by the corrector, or by the anatomical net and the corrector."""
        actor, corrector = self.actor(self.stage("style")), self.corrector()
        net = self.net() if both else None

        def logits(windows: Tensor) -> Tensor:
            masks = actor(windows).argmax(dim=1)
            if net is not None:
                masks = net.class_probabilities(windows, masks).argmax(dim=1)
            return corrector.probabilities(masks).clamp_min(1e-6).log()

        return logits

    # -- rows --

    def score(self, row: str) -> Scores:
        """Segment the test sequences as a row does, and score them."""
        test = self.sequences()
        rules = rules_of(self.base.rules, self.domains().label_names)
        work, masks = self.segmenter(row), []
        for image, spacing in zip(test.images, test.spacing_mm.tolist(), strict=True):
            masks.append(work(image.float() / 255.0, spacing))
        return score_masks(masks, test, rules, self.base.temporal_rules)

    def segmenter(self, row: str) -> Callable[[Tensor, Sequence[float]], NDArray[np.uint8]]:
        """What makes labels of frames `(1, X, Y, T)` in a row."""
        if row.startswith("posthoc"):
            network = self.refiner(both=row == "posthoc-both")
            return lambda frames, _: segment(network, frames)
        name, _, way = row.partition("+")
        actor = self.actor(self.place(name))
        if not way:
            return lambda frames, _: segment(actor, frames)
        if way == "tta":
            return lambda frames, _: _averaged(actor, frames)
        return partial(self.optimised, actor)

    def place(self, name: str) -> Path:
        """Where the actor of a row is."""
        if name in ("source", "style"):
            return self.stage(name)
        if name == "iteration_1":
            return self.folder / "ppo"
        if name.startswith("iteration_"):
            (found,) = (self.folder / "iterations" / "stages").glob(f"*_ppo_{name[10]}")
            return Path(found)
        return self.folder / name

    def optimised(self, actor: nn.Module, frames: Tensor, spacing_mm: Sequence[float]) -> NDArray[np.uint8]:
        """TTA and, where its result is not valid, TTO against learned rewards, as `medrl predict` does."""
        first = _averaged(actor, frames)
        if self.valid(first, spacing_mm):
            return first
        reward = FusedReward({"anatomical": self.net().reward}, stretch=False)
        better, _ = optimise(
            actor,
            lambda images, labels: reward(labels, images),
            frames[0],
            TTOConfig(mode="auto"),
            device=CPU,
        )
        if better is None:
            return first
        second = _averaged(better, frames)
        return second if _worst(reward, frames, second) > _worst(reward, frames, first) else first

    def valid(self, labels: NDArray[np.uint8], spacing_mm: Sequence[float]) -> bool:
        """Whether every frame and the sequence keep the rules."""
        rules = rules_of(self.base.rules, self.domains().label_names)
        whole = check_sequence(labels, spacing_mm, rules=self.base.temporal_rules).valid
        return whole and all(is_valid(labels[..., t], rules) for t in range(labels.shape[-1]))

    # -- rewards --

    def judged(self, *, legacy: bool) -> dict[str, dict[str, float]]:
        """How well rewards find the errors of the source-only labels on target test windows."""
        windows = self.sequences().some_windows(0)
        actor = self.actor(self.stage("source"))
        if windows.labels is None:
            return {}
        with torch.no_grad():
            logits = torch.cat([actor(part).float() for part in windows.images.split(8)])
        actions, truth = logits.argmax(dim=1), windows.labels.long()
        found: dict[str, dict[str, float]] = {}
        for name, judge in (self.legacy_judges() if legacy else self.judges()).items():
            parts_of = zip(windows.images.split(8), actions.split(8), truth.split(8), strict=True)
            found[name] = _numbers(held_out_quality(judge, parts_of))
        if not legacy:
            sure = logits.softmax(dim=1).amax(dim=1)
            whole = [(windows.images, actions, truth)]
            found["largest probability of the source actor"] = _numbers(
                held_out_quality(lambda *_: sure, whole)
            )
            fitted = self.net(calibrated=True).temperature
            found["temperatures"] = {"anatomical": float(fitted.mean())}
        return found

    def judges(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The rewards of this method."""
        raw, weight = self.net(), self.base.reward.weight
        return {
            "anatomical net": raw.reward,
            "anatomical net, calibrated": self.net(calibrated=True).reward,
            "anatomical net and corrector": CompositeReward(raw, self.corrector(), weight=weight).reward,
        }

    def legacy_judges(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The rewards as the original makes them."""
        folder = self.folder / "legacy"
        cfg: Rl4seg3dConfig = self.job(folder, LEGACY).config
        nets = {}
        for name in cfg.reward.nets:
            (place,) = (folder / "stages").glob(f"*_{name}_1")
            nets[name] = self.opened(cfg, place, name, calibrated=False).reward
        fitted = self.opened(cfg, next((folder / "stages").glob("*_anatomical_1")), "anatomical", True)
        return {
            "original: anatomical net": nets["anatomical"],
            "original: anatomical net, calibrated": fitted.reward,
            "original: lesser of anatomical and landmark": FusedReward(nets, stretch=False),
        }


def _numbers(quality: Mapping[str, RewardQuality]) -> dict[str, float]:
    """Numbers near the predicted foreground, and over all voxels."""
    near, whole = quality["near"], quality["all"]
    return {
        "auroc": near.auroc,
        "ece": near.ece,
        "bce": near.bce,
        "reward": near.reward,
        "accuracy": near.accuracy,
        "auroc_all": whole.auroc,
        "ece_all": whole.ece,
    }


def _volume(data: NDArray[Any], spacing: Tensor) -> Volume:
    """A sequence as a file has it."""
    steps = [float(step) for step in spacing]
    return Volume(
        data=np.rint(data * 255.0).astype(np.uint8)[None],
        affine=np.diag((*steps, 1.0, 1.0)),
        spacing=(*steps, 1.0),
    )


def _averaged(network: nn.Module, frames: Tensor) -> NDArray[np.uint8]:
    """Labels of the mean over the views."""
    segmenter = Segmenter(device=CPU)
    labels = np.zeros(frames.shape[1:], dtype=np.uint8)
    for time_, mean in segmenter.probabilities(network, frames[0], tta=True):
        labels[..., time_] = mean.argmax(axis=0)
    return largest_blobs(labels)


def _worst(reward: FusedReward, frames: Tensor, labels: NDArray[np.uint8]) -> float:
    """Mean reward of the worst frame."""
    found = Segmenter(device=CPU).reward(
        lambda images, actions: reward(actions, images), frames[0], torch.from_numpy(labels)
    )
    return min(float(values.mean()) for _, values in found)


# --- command line ------------------------------------------------------------------------------------------


def chosen_jobs(group: str, only: str, seeds: str) -> list[Job]:
    """Every seed of every setting that is asked for: the first seed of each, then the second."""
    names, numbers = (set(filter(None, words.split(","))) for words in (only, seeds))
    found = [
        (place, at, setting, seed)
        for at, setting in enumerate(SETTINGS)
        for place, seed in enumerate(setting.seeds[group])
        if (not names or setting.name in names) and (not numbers or str(seed) in numbers)
    ]
    return [(setting, seed) for _, _, setting, seed in sorted(found, key=lambda job: job[:2])]


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> None:
    """Prepare, list, tune, run, or write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["prepare", "jobs", "tune", "run", "page"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the CAMUS frames: images/ and labels/")
    parser.add_argument("--group", choices=["tune", "report"], default="report")
    parser.add_argument("--only", default="", help="names of settings, with commas between")
    parser.add_argument("--seeds", default="", help="only these seeds")
    parser.add_argument("--rows", default="", help="only these rows")
    parser.add_argument("--values", default="{}", help="tune: settings as JSON, laid over the others")
    parser.add_argument("--name", default="", help="tune: folder of these settings")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.resolve()
    group = "tune" if options.step == "tune" else options.group
    jobs = chosen_jobs(group, options.only, options.seeds)
    rows = [word for word in options.rows.split(",") if word]
    if options.step == "prepare":
        started = time.monotonic()
        prepare(work, jobs, options.data)
        say(f"{time.monotonic() - started:.0f} s")
    elif options.step == "jobs":
        for setting, seed in jobs:
            done = len(list((work / group / setting.name / f"seed_{seed}" / "rows").glob("*.json")))
            say(f"{setting.name:8} seed {seed}: {done} rows done, about {setting.minutes} CPU minutes in all")
    elif options.step in ("run", "tune"):
        more = json.loads(options.values) if options.step == "tune" else {}
        manager = PluginManager.create()
        index, count = (int(word) for word in options.part.split("/"))
        for wanted in [rows] if rows else PASSES:
            for job in jobs[index - 1 :: count]:
                if not data_folder(work, *job, "target").exists():
                    say(f"{job[0].name} {job[1]}: no data, left out")
                    continue
                Work(work, group, job, manager, more, options.name).do(wanted)
    else:
        text = page(work / group)
        if options.page:
            options.page.write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)


if __name__ == "__main__":
    main()
