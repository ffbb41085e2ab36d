"""`medrl kspace eval`, `baselines`, `export-mask`: trained policies and their rivals on one set of cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from medrl.core.errors import ConfigError, DataError

from . import evaluate, figures, parts
from .data import load_data
from .domain import Data, Part, SliceInfo
from .evaluate import BASELINES, FULL, ORACLES, Curves
from .observer import CaseObserver
from .policies import AgentLines, LinePolicy
from .restoring import Restored, open_run

if TYPE_CHECKING:
    from medrl.core.manager import PluginManager


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        summary: As in ``summary.json``.
        report: Path of ``report.html``.
    """

    curves: Curves
    summary: dict[str, Any]
    report: Path

    def lines(self) -> list[str]:
        """A table of Dice and SSIM of slices for people."""
        found = [f"{'policy':42} {'lines':>6} {'Dice':>7} {'SSIM':>7}"]
        for entry in self.summary["policies"].values():
            for row in entry["budgets"].values():
                dice, ssim = row["slice_dice"]["mean"], row["slice_ssim"]["mean"]
                found.append(f"{entry['title']:42} {row['lines']:6.1f} {dice:7.4f} {ssim:7.4f}")
        return found


def run(
    manager: PluginManager,
    runs: Sequence[Path],
    folder: Path,
    *,
    data: Path | None = None,
    budgets: Sequence[int] = (),
    split: str = "auto",
    cases: int = 0,
    against: Sequence[str] = (),
    with_policy: bool = True,
    seed: int = 0,
    device: str = "auto",
    threads: int = 1,
    say: Callable[[str], None] = lambda _line: None,
) -> Study:
    """Measure runs and rivals, write tables and a report.

    All policies are judged with the reward model of the first run; rivals that are fitted are fitted on its
    training cases.

    Raises:
        ConfigError: A rival is unknown, or runs do not fit each other.
        DataError: The cases have no labels where labels are needed, or a patient was trained on.
    """
    if threads:
        torch.set_num_threads(threads)
    place = _device(device)
    opened = [open_run(path, manager, place) for path in runs]
    first = opened[0]
    known, part = _data(first, data, split)
    observer, info = _observer(first, known, part, place, cases)
    names = _rivals(against, with_labels=observer.cases.labels is not None)
    chosen = tuple(budgets) or first.cfg.budget.eval
    policies: dict[str, LinePolicy] = {}
    if with_policy:
        for number, one in enumerate(opened):
            if number and one.cfg.acquisition != first.cfg.acquisition:
                raise ConfigError(str(runs[number]), why="its acquisition differs from that of the first run")
            name = "policy" if len(opened) == 1 else runs[number].name
            policies[name] = Seen(one, AgentLines(one.policy()))
    training = first.training(known.cases("train", first.cfg, place), known.info("train", first.cfg))
    policies |= evaluate.rivals(names, training, parts.quality(first.cfg), max(chosen))
    notes = known.slices(part).caveats
    curves = evaluate.run(observer, known, info, policies, chosen, seed=seed, notes=notes, say=say)
    path = evaluate.write(curves, known, folder, observer.cases.ids)
    content = evaluate.summary(curves, known)
    content |= {"part": part, "cases": len(observer.cases), "differences": _differences(curves)}
    path.write_text(json.dumps(evaluate.plain(content), indent=1) + "\n", encoding="utf-8")
    report = figures.write_report(folder / "report.html", curves, content, observer, first)
    return Study(curves, content, report)


class Seen:
    """A policy that sees with the networks of its own run.

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


def export_masks(
    manager: PluginManager,
    run_path: Path,
    folder: Path,
    *,
    data: Path | None = None,
    lines: int | None = None,
    split: str = "auto",
    device: str = "auto",
) -> int:
    """Write ``masks.npy`` ``(N, A)`` bool, ``cases.txt`` and ``lines.csv``; return N.

    A row of ``lines.csv`` is one line of one case: case, place in the order, column from 0, and offset from
    the k-space centre.
    """
    place = _device(device)
    run_ = open_run(run_path, manager, place)
    known, part = _data(run_, data, split)
    observer, _ = _observer(run_, known, part, place, 0)
    budget = lines or max(run_.cfg.budget.eval)
    case = torch.arange(len(observer.cases), device=place)
    order = AgentLines(run_.policy()).order(observer, case, budget, torch.Generator()).cpu()
    masks = observer.cases.rows("initial", case).cpu().clone().scatter_(1, order, value=True)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "masks.npy", masks.numpy(), allow_pickle=False)
    (folder / "cases.txt").write_text("\n".join(observer.cases.ids) + "\n", encoding="utf-8")
    width = observer.cases.width
    rows = [
        {"case": name, "place": at, "line": int(line), "offset": int(line) % width - width // 2}
        for name, row in zip(observer.cases.ids, order.tolist(), strict=True)
        for at, line in enumerate(row)
    ]
    evaluate.write_csv(folder / "lines.csv", rows)
    return len(observer.cases)


# -- private -----------------------------------------------------------------------------------------


def _data(run_: Restored, root: Path | None, split: str) -> tuple[Data, Part]:
    """The dataset of a run, or another one, and the part that is measured."""
    config = run_.cfg.data if root is None else run_.cfg.data.model_copy(update={"root": root})
    known = Data(load_data(config, run_.cfg.sample))
    if dict(known.label_names) != dict(run_.plan.label_names):
        raise DataError(
            str(config.root),
            why=f"its labels are {dict(known.label_names)}, those of the run {dict(run_.plan.label_names)}",
        )
    part: Part = "val" if split == "val" else "test"
    if split == "auto":
        part = "test" if known.has("test") and known.slices("test").labels is not None else "val"
    if part == "test":
        both = run_.patients & set(known.slices("test").patients)
        if both:
            raise DataError("test cases", why=f"patient {min(both)} was trained on or watched")
    return known, part


def _observer(
    run_: Restored, known: Data, part: Part, device: torch.device, limit: int
) -> tuple[CaseObserver, list[list[SliceInfo]]]:
    cases = known.cases(part, run_.cfg, device)
    info = known.info(part, run_.cfg)
    if limit and limit < len(cases):
        kept = evaluate.spread(len(cases), limit).tolist()
        cases, info = cases.select(kept), [info[number] for number in kept]
    return run_.observer(cases), info


def _rivals(names: Sequence[str], *, with_labels: bool) -> list[str]:
    if list(names) == ["all"]:
        return [*BASELINES, *ORACLES] if with_labels else list(BASELINES)
    return list(names)


def _differences(curves: Curves) -> dict[str, Any]:
    """Every policy of a run against each rival, paired."""
    own = [name for name in curves.measured if name not in (*BASELINES, *ORACLES, FULL)]
    others = [name for name in curves.measured if name != FULL]
    return {
        f"{name} - {other}": {
            metric: evaluate.differences(curves, name, other, metric=metric) for metric in ("dice", "ssim")
        }
        for name in own
        for other in others
        if other != name
    }


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
