"""One scan acquired by a policy: its lines, its reconstruction, its segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Prepared, RawScan, SliceSet, Stacked, prepare
from .domain import cases_of
from .observer import CaseObserver
from .policies import AgentLines
from .restoring import Restored


@dataclass(frozen=True, eq=False)
class Acquired:
    """What became of a scan of N slices.

    Attributes:
        prepared: The scan as the networks see it, and the way back.
        magnitude: ``(N, H, W)`` reconstruction, in the units of the networks.
        probabilities: ``(N, K, H, W)``; None without a segmentation network.
        records: For each case (slice, stack or volume) its name, the lines in their order, the initial ones,
            and the acceleration.
    """

    prepared: Prepared
    magnitude: Tensor
    probabilities: Tensor | None
    records: list[dict[str, Any]]

    @property
    def image(self) -> Tensor:
        """``(N, H, W)`` reconstruction in the intensities of the file."""
        scale, offset = (part.view(-1, 1, 1) for part in (self.prepared.scale, self.prepared.offset))
        return self.magnitude * scale + offset


@torch.no_grad()
def acquire(
    run: Restored, raw: RawScan, name: str, *, budget: int, stop_below: float | None = None
) -> Acquired:
    """Acquire a scan line by line, reconstruct and segment it.

    Args:
        run: Policy and networks.
        raw: The scan, complete; of images k-space is simulated as in training.
        name: Of the scan; the simulation depends on it.
        budget: Lines beyond the initial ones.
        stop_below: Stop once the mean entropy of a pixel, in nats, is below this; the lines after it are
            left out.

    Raises:
        ConfigError: The budget does not fit the scan or the agent.
        DataError: The scan cannot be prepared.
    """
    prepared = prepare(raw, run.plan, name)
    slices = _as_set(prepared, raw, run, name)
    cases = cases_of(slices, run.cfg)
    device = next(run.policy().parameters()).device
    observer = run.observer(cases.to(device))
    case = torch.arange(len(cases), device=device)
    order = AgentLines(run.policy()).order(observer, case, budget, torch.Generator())
    initial = observer.cases.rows("initial", case)
    counts = torch.full((len(cases),), budget, device=device)
    if stop_below is not None and run.imaging.segmenter is not None:
        counts = _enough(observer, case, initial, order, stop_below)
    mask = _masked(initial, order, counts)
    view = observer.view(case, mask, segment=True, gradient=False)
    groups = [[number] for number in range(len(slices))]
    if cases.geometry != "slice":
        groups = [list(volume) for volume in slices.volumes]
    columns = int((observer.cases.possible | observer.cases.initial).sum(dim=1).max())
    records = []
    for number, lines in enumerate(order.tolist()):
        taken = int(counts[number])
        records.append(
            {
                "case": cases.ids[number],
                "initial": torch.nonzero(initial[number]).flatten().tolist(),
                "lines": lines[:taken],
                "acceleration": columns / max(1, int(mask[number].sum())),
            }
        )
    probabilities = None if view.logits is None else _by_slice(view.probabilities, groups)
    return Acquired(prepared, _by_slice(view.magnitude.unsqueeze(1), groups)[:, 0], probabilities, records)


def _as_set(prepared: Prepared, raw: RawScan, run: Restored, name: str) -> SliceSet:
    count = len(raw.names)
    measured = raw.kspace is not None
    return SliceSet(
        ids=tuple(f"{name}_{one}" for one in raw.names),
        cases=(name,) * count,
        patients=(name,) * count,
        frames=raw.frames,
        slices=tuple(number if number >= 0 else place for place, number in enumerate(raw.slices)),
        spacing_mm=torch.tensor([prepared.spacing_mm] * count, dtype=torch.float64),
        kspace=Stacked([prepared.kspace]),
        target=Stacked([prepared.target]),
        labels=None,
        sensitivities=None if prepared.sensitivities is None else Stacked([prepared.sensitivities]),
        padding=prepared.padding.expand(count, -1).clone(),
        label_names=run.plan.label_names,
        simulation=None if measured else run.plan.simulation,
        keys=tuple(raw.names),
    )


def _enough(
    observer: CaseObserver, case: Tensor, initial: Tensor, order: Tensor, stop_below: float
) -> Tensor:
    """How many lines ``(B,)`` each case needs until its entropy is below a threshold; at least one.

    The policy does not know that an acquisition may end early, so that the first lines are those of the whole
    order.
    """
    budget = order.shape[1]
    counts = torch.full((len(case),), budget, device=case.device)
    for taken in range(budget - 1, 0, -1):
        mask = _masked(initial, order, torch.full_like(counts, taken))
        view = observer.view(case, mask, segment=True, gradient=False)
        probs = view.probabilities
        entropy = -(probs * probs.clamp_min(1e-12).log()).sum(dim=1).flatten(1).mean(dim=1)
        counts = torch.where(entropy < stop_below, taken, counts)
    return counts


def _masked(initial: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """Initial lines and the first `counts` ``(B,)`` of an order ``(B, n)``."""
    mask = initial.clone()
    taken = torch.arange(order.shape[1], device=order.device) < counts.unsqueeze(1)
    for place in range(order.shape[1]):
        rows = taken[:, place]
        mask[rows, order[rows, place]] = True
    return mask


def _by_slice(values: Tensor, groups: list[list[int]]) -> Tensor:
    """Maps ``(B, C, [D], H, W)`` of cases as ``(N, C, H, W)`` of slices, in the order of the scan."""
    flat = values.cpu().float()
    if flat.ndim == 4:
        return flat
    count = sum(len(group) for group in groups)
    found = torch.zeros(count, flat.shape[1], *flat.shape[-2:])
    for row, group in enumerate(groups):
        for depth, number in enumerate(group):
            found[number] = flat[row, :, depth]
    return found
