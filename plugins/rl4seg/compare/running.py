"""A comparison from data to report: every method, every seed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medrl.core.checkpoint import write_checkpoint
from medrl.core.errors import ConfigError, DataError, MedrlError
from medrl.core.report import Section

from ..scoring import Scores, largest_blob, score, segment
from . import elsewhere, report, trust
from .catalogue import BY_KEY, METHODS, Method
from .outcome import Outcome
from .work import Resolve, SeedStudy, tsit_networks

if TYPE_CHECKING:
    from medrl.core.executors import Executor
    from medrl.core.manager import PluginManager

PANELS = ("source", "style-steps", "style-ppo")
"""Methods whose predictions the report shows, as far as they took part."""
SHOWN = 6


class Study:
    """A comparison in a folder: ``seed_N/`` for each seed, ``results.json``, ``report.html``.

    Args:
        manager: Source of networks and rewards.
        resolve: Resolves the config with further layers on top.
        folder: Where everything is written; what is finished there stays.
        methods: Rows of the comparison.
        seeds: Number of seeds, from ``train.seed`` on; or the seeds themselves.
        say: Shows a line of progress.
        command: The command line, for the record.
        rates: Learning rates of baselines instead of `work.RATES`.
        judge: Whether to measure rewards and confidences too.
        members: Networks of the ensemble beside them.
    """

    def __init__(
        self,
        manager: PluginManager,
        resolve: Resolve,
        folder: Path,
        methods: Sequence[Method],
        *,
        seeds: int | Sequence[int] = 1,
        say: Callable[[str], None] = lambda _line: None,
        command: Sequence[str] = (),
        rates: Mapping[str, float] | None = None,
        judge: bool = True,
        members: int = trust.MEMBERS,
    ) -> None:
        self.folder, self.methods, self.say = folder, list(methods), say
        self.judge, self.members = judge, members
        self.resolved = resolve(())
        cfg = self.resolved.config
        first = int(cfg.train.seed)
        numbers = range(first, first + seeds) if isinstance(seeds, int) else seeds
        if cfg.data.root is None or cfg.target.root is None:
            raise ConfigError(
                "comparison", why="source or target is missing", do="--data SOURCE --target TARGET"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.seeds = {
            seed: SeedStudy(
                manager,
                resolve,
                folder / f"seed_{seed}",
                seed,
                say=say,
                command=command,
                rates=rates,
            )
            for seed in numbers
        }

    def run(self, executor: Executor | None = None) -> Outcome:
        """Do what is left, write results and report, and return what was found.

        Args:
            executor: Makes seeds and methods as tasks; without one they are made here, one after the other.
        """
        if executor is not None:
            elsewhere.do_tasks(self, executor)
        else:
            for study in self.seeds.values():
                self.work(study)
        outcome = self.collect()
        outcome.write(self.folder / "results.json")
        self.write_report(outcome)
        return outcome

    def work(self, study: SeedStudy) -> None:
        """Make every method of one seed that can take part."""
        for method in self.possible(study):
            self.make(study, method)
        if self.judge:
            trust.measure(study, self.methods, members=self.members)

    def possible(self, study: SeedStudy) -> list[Method]:
        """Return the methods that can take part; an upper bound without labels is left out, with a note."""
        found = []
        for method in self.methods:
            reason = missing(study, method)
            if reason:
                note(study.folder, method.key, reason)
                self.say(f"seed {study.seed}: {method.title} is left out: {reason}")
            else:
                found.append(method)
        return found

    def make(self, study: SeedStudy, method: Method) -> None:
        """Make a method of one seed; where one may find nothing to learn from, that is noted."""
        try:
            study.make(method)
        except DataError as error:
            if not method.may_fail:
                raise
            note(study.folder, method.key, f"seed {study.seed}: {error}")
            self.say(f"seed {study.seed}: {method.title} found nothing to learn from: {error}")

    def collect(self) -> Outcome:
        """Read the scores of all seeds."""
        return collect(self.folder, self.methods, sorted(self.seeds))

    def summary(self, outcome: Outcome) -> list[str]:
        """Return the table and the claims as lines for the terminal."""
        heads, cells, _ = report.table(outcome)
        lines = aligned(heads, cells, left=3)
        for title, found, names in (
            ("errors found in source-only predictions", outcome.finding, report.FINDING),
            ("confidence of each method's own predictions", outcome.trust, report.TRUST),
        ):
            if found:
                lines += ["", title, *aligned(*report.quality_table(found, names), left=1)]
        return [*lines, "", *outcome.claims(), *outcome.notes]

    def write_report(
        self, outcome: Outcome, *, title: str = "", subtitle: str = "", more: Sequence[Section] = ()
    ) -> Path:
        """Write ``report.html``, with sections of one's own at the end."""
        study = next(iter(self.seeds.values()))
        runs = {
            f"{method.title} ({method.start})": path
            for method in self.methods
            if method.kind == "loop"
            for path in sorted((study.run_folder(method.key) / "stages").glob("*_ppo_1"))
        }
        return report.write(
            self.folder / "report.html",
            outcome,
            title=title or "rl4seg beside what it must beat",
            subtitle=subtitle or _SUBTITLE,
            facts={
                "source": study.cfg.data.root,
                "target": study.cfg.target.root,
                "test images": len(study.test.ids),
                "seeds": ", ".join(map(str, self.seeds)),
                "steps beyond the start": study.budget.steps,
                "made": time.strftime("%Y-%m-%d"),
            },
            records=report.records_of(runs),
            panels=self._panels(study, outcome),
            more=more,
        )

    def _panels(self, study: SeedStudy, outcome: Outcome) -> dict[str, str]:
        """Test images from the worst to the best of the method, with the predictions of a few methods."""
        shown = [BY_KEY[key] for key in PANELS if key in outcome.scores]
        masks = {
            method.title: largest_blob(
                segment(network_of(study, method), study.test.images, device=study.device).numpy()
            )
            for method in shown
        }
        order_key = next((key for key in reversed(PANELS) if key in outcome.scores), None)
        if order_key is None or study.test.labels is None:
            return {}
        scores = outcome.scores[order_key].get(study.seed)
        values = np.nan_to_num(np.asarray(scores.values["dice"])) if scores else np.zeros(len(study.test.ids))
        places = np.unique(np.linspace(0, len(values) - 1, min(SHOWN, len(values))).round().astype(int))
        chosen = np.argsort(values, kind="stable")[places]
        truth = np.asarray(study.test.labels)
        spacing = np.asarray(study.test.spacing_mm)
        panels = {}
        for at in [*chosen[len(chosen) // 2 :], *chosen[: len(chosen) // 2]]:
            name = f"{study.test.ids[at]}, Dice of {BY_KEY[order_key].title} {values[at]:.3f}"
            panels[name] = report.panel(
                study.test.images[at].numpy(),
                {"reference": truth[at], **{title: found[at] for title, found in masks.items()}},
                title=name,
                spacing=spacing[at].tolist(),
                label_names=study.test.label_names,
            )
        return panels


def network_of(study: SeedStudy, method: Method) -> Any:
    """Return the network of a finished method that is one network."""
    if method.kind == "start":
        return study.start(method.start)
    if method.kind in ("loop", "more"):
        return study.actor(study.run_folder(method.key))
    return study.actor(study.folder / "networks" / f"{method.key}.pt")


def missing(study: SeedStudy, method: Method) -> str:
    """Say why a method cannot take part; empty if it can."""
    cfg = study.cfg
    if method.role == "bound" and not study.target_has_labels:
        return "the target has no training labels"
    if method.way in ("reward", "both", "mixed") and (cfg.reward.head != "class" or not cfg.learns_reward):
        return "the config's reward net tells no classes (reward.head class)"
    if method.way in ("corrector", "both", "mixed") and cfg.corrector.kind == "none":
        return "the config has no corrector"
    return ""


def note(folder: Path, key: str, reason: str) -> None:
    """Keep the reason why a method was left out."""
    path = folder / "left_out.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, key: reason}, indent=1), encoding="utf-8")


def collect(folder: Path, methods: Sequence[Method] = METHODS, seeds: Sequence[int] = ()) -> Outcome:
    """Read the finished work of a comparison, or of parts of it that ran in several processes.

    Args:
        folder: Folder of a comparison.
        methods: Rows to read, as far as they are there.
        seeds: Seeds to read; all of the folder if left out.
    """
    outcome = Outcome()
    found = sorted(
        (int(path.name.partition("_")[2]), path)
        for path in folder.glob("seed_*")
        if path.name.partition("_")[2].isdigit()
    )
    reasons: dict[str, str] = {}
    used = [(seed, path) for seed, path in found if not seeds or seed in seeds]
    for seed, path in used:
        for method in methods:
            file = path / "scores" / f"{method.key}.json"
            if not file.is_file():
                continue
            content = json.loads(file.read_text(encoding="utf-8"))
            outcome.seconds.setdefault(method.key, {})[seed] = float(content["seconds"])
            for key, value in content["scores"].items():
                outcome.scores.setdefault(key, {})[seed] = Scores.from_dict(value)
        judged = path / "scores" / trust.NAME
        if judged.is_file():
            content = json.loads(judged.read_text(encoding="utf-8"))
            for name, values in content["finding"].items():
                outcome.finding.setdefault(name, {})[seed] = trust.numbers(values)
            for name, values in content["trust"].items():
                outcome.trust.setdefault(name, {})[seed] = trust.numbers(values)
        left = path / "left_out.json"
        if left.is_file():
            reasons.update(json.loads(left.read_text(encoding="utf-8")))
    outcome.notes += [
        f"{BY_KEY[key].title} was left out: {reason}."
        for key, reason in reasons.items()
        if key in {method.key for method in methods} and len(outcome.scores.get(key, {})) < len(used)
    ]
    return outcome


def ts_it(
    manager: PluginManager,
    resolve: Resolve,
    folder: Path,
    *,
    steps: int | None = None,
    say: Callable[[str], None] = lambda _line: None,
    command: Sequence[str] = (),
) -> dict[str, float]:
    """Train TS-IT alone, keep its networks in ``tsit.pt``, and return its scores on labelled test images."""
    cfg = resolve(()).config
    study = SeedStudy(manager, resolve, folder, int(cfg.train.seed), say=say, command=command)
    budget = replace(
        study.budget, steps=steps or study.budget.steps + study.source_steps, lr=cfg.source.lr, clip=0.0
    )
    say(f"TS-IT: {study.domains.classes - 1} networks, {budget.steps} steps each")
    network = tsit_networks(study, budget)
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"method": "rl4seg", "label_names": dict(study.domains.label_names), "step": budget.steps}
    write_checkpoint(folder / "tsit.pt", {"tsit": network.state_dict()}, meta)
    say(f"networks: {folder / 'tsit.pt'}")
    try:
        test = study.test
    except MedrlError as error:
        say(f"no scores: {error.why or error.what}")
        return {}
    found = score(network, test, study.rules, device=study.device).summary()
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def aligned(heads: Sequence[str], cells: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return a table as lines; the first `left` columns are set left, the others right."""
    widths = [max(len(line[at]) for line in [heads, *cells]) for at in range(len(heads))]

    def line(parts: Sequence[str]) -> str:
        words = [
            part.ljust(width) if at < left else part.rjust(width)
            for at, (part, width) in enumerate(zip(parts, widths, strict=True))
        ]
        return "  ".join(words).rstrip()

    return [line(heads), *(line(parts) for parts in cells)]


_SUBTITLE = (
    "A network was trained on labelled source images and adapted to unlabelled target images in several "
    "ways. Every row is scored on the same labelled target images, which no training saw."
)
