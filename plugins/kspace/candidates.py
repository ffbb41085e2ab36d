"""What each further line would bring: exact, with the labels, for all lines of many acquisitions at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.rewards import Quality
from medrl.plugins.kspace.under_way import UnderWay

AT_ONCE = 256


@torch.no_grad()
def quality_with_each(
    observer: CaseObserver, quality: Quality, case: Tensor, mask: Tensor, *, at_once: int = AT_ONCE
) -> tuple[Tensor, Tensor]:
    """Quality of acquisitions as they are, and with each line more.

    Args:
        observer: Of the cases.
        quality: Of acquisitions; it may need labels.
        case: ``(B,)``.
        mask: ``(B, A)`` lines acquired.
        at_once: Images that are reconstructed and segmented at once.

    Returns:
        ``(B,)``, and ``(B, A)`` with minus infinity for lines that cannot be acquired.
    """
    cases = observer.cases
    case, mask = case.to(cases.device).flatten(), mask.to(cases.device)
    legal = cases.rows("possible", case) & ~mask
    most = int(legal.sum(dim=1).max()) if len(case) else 0
    lines = legal.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    now, after = [], []
    for rows in _parts(len(case), max(1, at_once // max(most, 1)), cases.device):
        found = _rows(observer, quality, case[rows], mask[rows], lines[rows], at_once)
        now.append(found[0])
        after.append(found[1])
    if not now:
        return torch.zeros(0, device=cases.device), torch.zeros(mask.shape, device=cases.device)
    values = torch.full(mask.shape, -torch.inf, device=cases.device)
    values.scatter_(1, lines, torch.cat(after))
    return torch.cat(now), values.masked_fill(~legal, -torch.inf)


def gains(
    observer: CaseObserver, quality: Quality, case: Tensor, mask: Tensor, *, at_once: int = AT_ONCE
) -> Tensor:
    """What each further line adds to the quality ``(B, A)``; minus infinity for illegal lines."""
    now, after = quality_with_each(observer, quality, case, mask, at_once=at_once)
    return after - now.unsqueeze(1)


@torch.no_grad()
def quality_of(
    observer: CaseObserver, quality: Quality, case: Tensor, mask: Tensor, *, at_once: int = AT_ONCE
) -> Tensor:
    """Quality ``(B,)`` of acquisitions of cases ``(B,)`` with lines ``(B, A)``."""
    cases = observer.cases
    case, mask = case.to(cases.device).flatten(), mask.to(cases.device)
    found = [torch.zeros(0, device=cases.device)]
    for rows in _parts(len(case), at_once, cases.device):
        view = observer.view(case[rows], mask[rows], segment=quality.needs_labels, gradient=False)
        found.append(quality.score(view, quality.truth(cases, case[rows])).total)
    return torch.cat(found)


def population_greedy(
    observer: CaseObserver, quality: Quality, case: Tensor, budget: int, *, at_once: int = AT_ONCE
) -> Tensor:
    """The best line for all cases together, then the best after it, and so on: ``(budget,)`` int64.

    A mask that does not depend on the case, chosen on training cases with their labels: what an adaptive
    policy has to beat.

    Args:
        observer: Of the cases.
        quality: Whose mean over the cases grows.
        case: ``(B,)`` cases that count.
        budget: Number of lines.
        at_once: Images at once.

    Raises:
        ConfigError: Fewer lines than the budget are possible in every case.

    Source: Pineda et al. 2020, non-adaptive oracle (pg_mri).
    """
    masks = observer.cases.rows("initial", case).clone()
    order: list[int] = []
    for _ in range(budget):
        line, _ = _best(observer, quality, case, masks, at_once)
        masks[:, line] = True
        order.append(line)
    return torch.tensor(order, dtype=torch.int64)


def exchanged(
    observer: CaseObserver,
    quality: Quality,
    case: Tensor,
    order: Tensor,
    *,
    sweeps: int = 3,
    at_once: int = AT_ONCE,
) -> Tensor:
    """Improve a set of lines ``(n,)`` by exchanging one at a time, until a sweep changes nothing.

    Args:
        observer: Of the cases.
        quality: Whose mean over the cases grows; it never falls.
        case: ``(B,)`` cases that count.
        order: The lines; an exchanged one keeps its place.
        sweeps: At most so many passes over all lines.
        at_once: Images at once.
    """
    lines = [int(line) for line in order]
    initial = observer.cases.rows("initial", case)
    for _ in range(sweeps):
        changed = False
        for place, line in enumerate(lines):
            masks = initial.clone()
            masks[:, lines[:place] + lines[place + 1 :]] = True
            better, values = _best(observer, quality, case, masks, at_once)
            if float(values[better]) > float(values[line]) + 1e-7:
                lines[place], changed = better, True
        if not changed:
            break
    return torch.tensor(lines, dtype=torch.int64)


def _parts(count: int, size: int, device: torch.device) -> Sequence[Tensor]:
    return torch.split(torch.arange(count, device=device), size)


def _best(
    observer: CaseObserver, quality: Quality, case: Tensor, masks: Tensor, at_once: int
) -> tuple[int, Tensor]:
    """The line with the largest mean quality, and the means ``(A,)``; lines illegal for one case are out."""
    _, after = quality_with_each(observer, quality, case, masks, at_once=at_once)
    mean = after.double().mean(dim=0)
    best = int(mean.argmax())
    if not bool(torch.isfinite(mean[best])):
        raise ConfigError(
            "fixed mask", why="no line is left that all cases can acquire", do="lower the budget"
        )
    return best, mean


def _rows(
    observer: CaseObserver, quality: Quality, case: Tensor, mask: Tensor, lines: Tensor, at_once: int
) -> tuple[Tensor, Tensor]:
    under_way = UnderWay(observer.cases, quality, case, mask)
    segment = quality.needs_labels
    view = observer.view(case, mask, coil_images=under_way.images, segment=segment, gradient=False)
    now = quality.score(view, under_way.truth).total
    found: list[Tensor] = []
    each = torch.arange(len(case), device=case.device)
    for part in torch.split(lines, max(1, at_once // len(case)), dim=1):
        count = part.shape[1]
        images = under_way.with_each(part).flatten(0, 1)
        owner = each.repeat_interleave(count)
        masks = mask[owner].scatter(1, part.reshape(-1, 1), value=True)
        more = observer.view(case[owner], masks, coil_images=images, segment=segment, gradient=False)
        scores = quality.score(more, under_way.truth.select(owner)).total
        found.append(scores.view(len(case), count))
    return now, torch.cat(found, dim=1)
