"""Checks that train a plugin for a few steps on synthetic data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medrl.core.checkpoint import load_checkpoint
from medrl.core.errors import ConfigError, MedrlError
from medrl.core.testing.findings import Finding, NotChecked, failed
from medrl.core.testing.trial import STEPS, logs, newest
from medrl.core.volume import grid_difference, read_volume

if TYPE_CHECKING:
    from medrl.core.testing.rules import Subject


def check_environments(subject: Subject) -> list[Finding]:
    """Build every environment, and let gymnasium's checker and that of batches examine it."""
    from medrl.core.rl.playing import problems_of

    registry = subject.manager.registry("environments")
    own = [entry for entry in registry.entries() if entry.plugin == subject.plugin.name]
    if not own:
        raise NotChecked("it registers no environment")
    findings = []
    for entry in own:

        def build(num_envs: int, key: str = entry.key) -> Any:
            return registry.fit(key, {"num_envs": num_envs})

        try:
            build(1)
        except ConfigError as error:
            findings.append(
                Finding(
                    "environments",
                    f"{entry.key} cannot be built alone: {'; '.join(error.problems) or error}",
                    "give every parameter besides num_envs a default, so that it can be checked and played",
                )
            )
            continue
        except MedrlError as error:
            findings.append(failed("environments", entry.key, error))
            continue
        findings += [
            Finding("environments", f"{entry.key}: {problem}", "see medrl.core.rl.env.BatchedEnv")
            for problem in problems_of(build)
        ]
    return findings


def check_learning(subject: Subject) -> list[Finding]:
    """Train a few steps; a logged loss must be finite and fall."""
    trial = subject.trial
    trial.require_training()
    losses: dict[str, list[float]] = {}
    for where, records in logs(trial.straight).items():
        names = sorted({name for record in records for name in record if "loss" in name.lower()})
        for name in ["loss"] if "loss" in names else names:
            values = [record[name] for record in records if isinstance(record.get(name), (int, float))]
            losses[f"{where}{name}"] = [float(value) for value in values]
    if not losses:
        return [Finding("learning", "no record has a loss", "log it: rt.log(step, loss=loss)")]
    for name, values in losses.items():
        if not all(math.isfinite(value) for value in values):
            return [Finding("learning", f"{name} is not finite", "a smaller learning rate, a stable formula")]
    falls = any(len(values) > 1 and values[-1] < values[0] for values in losses.values())
    if not falls:
        return [
            Finding(
                "learning",
                f"no loss is lower after {STEPS} steps than after the first: {', '.join(losses)}",
                "is every parameter in the optimiser, is rt.backward called before rt.step, is the rate > 0?",
            )
        ]
    return []


def check_checkpoint(subject: Subject) -> list[Finding]:
    """Equal runs must give equal checkpoints, which say what predictors need."""
    trial = subject.trial
    trial.require_training()
    name = subject.plugin.name
    first, second = newest(trial.straight, name), newest(trial.again, name)
    findings = []
    different = list(differences(first.states, second.states))
    if different:
        findings.append(
            Finding(
                "checkpoint",
                f"two runs with one seed differ in {some(different)}",
                "draw from medrl.core.rng or from seeded generators, never from the clock or os.urandom",
            )
        )
    loaded = load_checkpoint(first.path, method=name)
    changed = list(differences(first.states, loaded.states))
    if changed:
        findings.append(Finding("checkpoint", f"loading changes {some(changed)}", "store plain types"))
    if trial.predicts:
        missing = [key for key in ("label_names", "channel_names") if not first.meta.get(key)]
        if missing:
            findings.append(
                Finding(
                    "checkpoint",
                    f"it does not say {' and '.join(missing)}, which predictors need",
                    "rt.checkpoint.describe(label_names=dataset.labels, channel_names=dataset.channel_names)",
                )
            )
    return findings


def check_resume(subject: Subject) -> list[Finding]:
    """A run that a signal stopped and that was resumed must equal one that went straight, bit for bit."""
    trial = subject.trial
    trial.require_training()
    run, stopped = trial.resumed
    if not stopped:
        return [
            Finding(
                "resume",
                "the run could not be stopped between two steps",
                "loop over rt.steps(rt.checkpoint.resume(), cfg.train.max_steps)",
            )
        ]
    name = subject.plugin.name
    different = list(differences(newest(trial.straight, name).states, newest(run, name).states))
    if different:
        return [
            Finding(
                "resume",
                f"stopped after step {' and '.join(map(str, stopped))} and resumed, it differs in "
                f"{some(different)}",
                "register everything that changes: rt.checkpoint.register(name=object); take batches from "
                "rt.loader, or derive every draw from seed and step",
            )
        ]
    return []


def check_ranks(subject: Subject) -> list[Finding]:
    """Two gloo ranks must train and save one checkpoint with the state of both."""
    trial = subject.trial
    trial.require_training()
    try:
        found = newest(trial.train_ranks("ranks"), subject.plugin.name)
    except MedrlError as error:
        return [failed("ranks", "two ranks do not train", error)]
    if len(found.ranks) != 2:
        return [
            Finding(
                "ranks",
                f"the checkpoint of two ranks holds the state of {len(found.ranks)}",
                "save through rt.steps and rt.checkpoint only",
            )
        ]
    return []


def check_geometry(subject: Subject) -> list[Finding]:
    """Every test image must get a segmentation on its own grid, with known labels."""
    trial = subject.trial
    trial.require_training()
    if not trial.predicts:
        raise NotChecked("it has no predict command")
    output = subject.folder / "predicted"
    outcome = trial.predict(trial.straight, output)
    findings = [
        Finding("geometry", f"case {case} failed: {why}", "mend the predictor")
        for case, why in outcome.failed.items()
    ]
    if not outcome.done and not findings:
        findings.append(Finding("geometry", "no case was predicted", "return job.run(load) in predict"))
    if outcome.done and not outcome.outputs:
        findings.append(
            Finding("geometry", "no segmentation was written", "name each in PredictOutcome.outputs")
        )
    known = set(newest(trial.straight, subject.plugin.name).meta.get("label_names", {}).values())
    for case, path in outcome.outputs.items():
        made = read_volume(path, kind="label")
        source = next(iter(sorted(trial.inputs.glob(f"{case}*"))), None)
        difference = grid_difference(made, read_volume(source)) if source is not None else ""
        if difference:
            findings.append(
                Finding(
                    "geometry",
                    f"case {case}: the segmentation does not lie on its image: {difference}",
                    "return probabilities (K, X, Y, Z) on the voxels of the volume that was given",
                )
            )
        unknown = sorted(set(np.unique(made.data).tolist()) - {0, *known})
        if unknown:
            findings.append(
                Finding("geometry", f"case {case}: labels without a name: {unknown}", "mend decode")
            )
    return findings


def differences(left: Any, right: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names in which two states differ by a bit."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in sorted({*left, *right}, key=str):
            inner = f"{name}.{key}" if name else str(key)
            if key not in left or key not in right:
                yield inner
            else:
                yield from differences(left[key], right[key], inner)
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from differences(one, other, f"{name}.{index}")
    elif isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        if not same or not torch.equal(_bytes(left), _bytes(right)):
            yield name
    elif type(left) is not type(right) or (left != right and not (left != left and right != right)):
        yield name


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def some(names: list[str], limit: int = 3) -> str:
    """Return the first names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
