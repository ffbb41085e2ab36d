"""The report of an evaluation: curves over lines, which lines were chosen, and pictures of cases."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from medrl.core.report import Section, curves, gallery, overlay_panel, paragraphs, simple_table, write_page

from .evaluate import FULL, TITLES, Curves
from .observer import CaseObserver
from .restoring import Restored

PANELS = 4
CHARTS = {
    "slice_dice": "Dice of slices",
    "slice_ssim": "SSIM of slices",
    "volume_dice": "Dice of volumes",
    "slice_nmse": "NMSE of slices",
}


def write_report(
    path: Path, found: Curves, summary: Mapping[str, Any], observer: CaseObserver, run: Restored
) -> Path:
    """Write ``report.html``.

    Args:
        path: Where to.
        found: What was measured.
        summary: As in ``summary.json``.
        observer: Of the measured cases.
        run: Whose reward model was used.
    """
    sections = [
        Section("Results", table(summary) + paragraphs(summary["notes"]), _RESULTS),
        Section("Quality over lines", curves(points(summary), limit=4, axis="acquired lines"), _CURVES),
        Section("Which lines", histograms(found), _LINES),
    ]
    if summary.get("differences"):
        sections.append(Section("Paired differences", differences(summary["differences"]), _DIFFERENCES))
    shown = panels(found, observer)
    if shown:
        sections.append(Section("Cases", gallery(shown), _PANELS))
    facts = {
        "run": run.path.parent.parent.name,
        "cases": len(observer.cases),
        "geometry": observer.cases.geometry,
        "initial lines": run.cfg.acquisition.init_center,
        "reconstruction": run.cfg.acquisition.recon,
    }
    return write_page(path, "kspace: quality over acquired lines", sections, facts=facts)


def table(summary: Mapping[str, Any]) -> str:
    """All policies and budgets with intervals."""
    heads = ["policy", "lines", "R", "Dice, slices", "Dice, volumes", "HD95 mm", "SSIM", "NMSE", "EF error"]
    keys = ("slice_dice", "volume_dice", "volume_hd95", "slice_ssim", "slice_nmse", "abs_ef_error")
    rows = [
        [entry["title"], row["lines"], f"{row['acceleration']:.1f}", *(shown(row[key]) for key in keys)]
        for entry in summary["policies"].values()
        for row in entry["budgets"].values()
    ]
    own = [number for number, row in enumerate(rows) if row[0] == TITLES["policy"]]
    return simple_table(heads, rows, emphasise=own)


def shown(value: Mapping[str, Any]) -> str:
    """A mean with its interval; a dash for none."""
    mean, low, high = (value[key] for key in ("mean", "low", "high"))
    if mean is None or not math.isfinite(mean):
        return "–"
    if low is None or not math.isfinite(low):
        return f"{mean:.3f}"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def points(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points of the charts, with lines in the place of steps."""
    rows: dict[float, dict[str, Any]] = {}
    for name, entry in summary["policies"].items():
        if name == FULL:
            continue
        for row in entry["budgets"].values():
            at = rows.setdefault(row["lines"], {"step": row["lines"]})
            for key, title in CHARTS.items():
                if row[key]["mean"] is not None and math.isfinite(row[key]["mean"]):
                    at[f"{title}/{entry['title']}"] = row[key]["mean"]
    return [rows[lines] for lines in sorted(rows)]


def differences(found: Mapping[str, Any]) -> str:
    """Table of paired differences of slices."""
    rows = [
        [pair, budget, *(shown(by_metric[metric].get(budget, _NONE)) for metric in ("dice", "ssim"))]
        for pair, by_metric in found.items()
        for budget in by_metric["dice"]
    ]
    return simple_table(["difference", "budget", "Dice", "SSIM"], rows)


_NONE = {"mean": None, "low": None, "high": None}


def histograms(found: Curves) -> str:
    """One strip for each policy at its largest budget: how many of the cases acquired each line."""
    parts = []
    for name, by_budget in found.masks.items():
        if name == FULL:
            continue
        budget = max(by_budget)
        share = by_budget[budget].float().mean(dim=0).numpy()
        parts.append(
            f"<figure><figcaption>{TITLES.get(name, name)}, {budget} chosen lines</figcaption>"
            f'<img alt="share of cases by line" src="{strip(share)}" '
            'style="width:100%;height:1.5rem;image-rendering:pixelated"></figure>'
        )
    return "".join(parts)


def strip(share: NDArray[Any]) -> str:
    """A grey strip of shares in 0 to 1, white is all cases, one pixel high, as the address of a picture."""
    return data_url(np.rint(255.0 * np.clip(share, 0.0, 1.0)).astype(np.uint8)[None])


def data_url(grey: NDArray[np.uint8]) -> str:
    """A grey picture ``(H, W)`` as an address that holds it."""
    file = io.BytesIO()
    Image.fromarray(grey).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@torch.no_grad()
def panels(found: Curves, observer: CaseObserver, *, most: int = PANELS) -> dict[str, str]:
    """Reconstructions and segmentations of some cases at the smallest budget, beside all lines."""
    cases = observer.cases
    step = max(1, len(cases) // most)
    names = [name for name in found.masks if name != FULL][:2]
    result: dict[str, str] = {}
    for number in range(0, len(cases), step)[:most]:
        index = torch.tensor([number], device=cases.device)
        images: dict[str, NDArray[Any]] = {"all lines": _voxels(cases.rows("target", index)[0])}
        maps: dict[str, NDArray[Any]] = {}
        if cases.labels is not None:
            maps["reference"] = _voxels(cases.rows("labels", index)[0])
        for name in names:
            budget = min(found.masks[name])
            mask = found.masks[name][budget][number].unsqueeze(0).to(cases.device)
            view = observer.view(index, mask, segment=True, gradient=False)
            title = f"{TITLES.get(name, name)}, {budget} chosen lines"
            images[title] = _voxels(view.magnitude[0])
            if view.logits is not None:
                maps[title] = _voxels(view.logits.argmax(dim=1)[0])
        result[cases.ids[number]] = overlay_panel(images, maps, title=cases.ids[number], axis=2)
    return result


def _voxels(values: torch.Tensor) -> NDArray[Any]:
    """Rows and columns (or slices first) as ``(X, Y, Z)``, rows from the top."""
    array = values.cpu().numpy()
    array = array[None] if array.ndim == 2 else array
    array = array.astype(np.uint8) if array.dtype.kind in "iu" else array
    voxels: NDArray[Any] = np.ascontiguousarray(array.transpose(2, 1, 0)[::-1, ::-1])
    return voxels


_RESULTS = (
    "Means over patients with 95 % bootstrap intervals. Dice of slices leaves out labels that are absent; "
    "Dice of volumes counts all slices of a frame. A policy has to beat low to high and the fixed mask, "
    "not random lines."
)
_CURVES = "Acquired lines, the initial ones included, against quality."
_LINES = (
    "From the left end of k-space to the right: white lines were acquired in all cases, black ones in none."
)
_DIFFERENCES = "The same cases, first policy minus second; an interval that excludes 0 is a difference."
_PANELS = "Reconstructions and segmentations from the fewest lines, beside the image from all lines."
