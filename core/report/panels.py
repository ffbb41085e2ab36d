"""Overlay panels: slices of an image with label maps, scrolled through in the page.

The page holds one sheet of all slices for the image and one for each label map (grey values are label
values); the script cuts out a slice, and draws labels as outlines or fills and the difference of two maps.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medrl.core.errors import DataError
from medrl.core.volume import to_ras

from .page import escape, script_json

PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (0, 114, 178),
    (255, 255, 255),
)
"""Colours that people with colour-vision deficiency tell apart (Okabe and Ito 2008), then white."""

ERRORS = (("missed", (255, 82, 82)), ("too much", (255, 225, 77)), ("wrong label", (190, 130, 255)))
"""What a difference shows, with its colours."""

MAX_SIZE = 256
"""Longer sides of a slice are thinned out for the page."""
MAX_SLICES = 72
CANVAS = 520
"""Pixels of the longer side of a view."""

_ENDS = {0: ("P", "A", "S", "I"), 1: ("R", "L", "S", "I"), 2: ("R", "L", "A", "P")}
_PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}


def overlay_panel(
    image: NDArray[Any] | Mapping[str, NDArray[Any]],
    labels: Mapping[str, NDArray[Any]] | None = None,
    *,
    title: str = "",
    affine: NDArray[np.float64] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    names: Mapping[str, int] | None = None,
    difference: tuple[str, str] | None = None,
    axis: int | None = None,
    caption: str = "",
) -> str:
    """Return a panel that scrolls through the slices of a case.

    Args:
        image: `(X, Y, Z)`, or several of them by name; labels are drawn on the first.
        labels: Label maps `(X, Y, Z)` by name, such as ``reference`` and ``prediction``.
        title: Heading, such as the case identifier.
        affine: Voxels to RAS mm; with it the views are turned as radiologists look at images, and the
            edges carry letters (R is the patient's right).
        spacing: Voxel size in mm where there is no affine.
        names: Label values by name, for the legend.
        difference: Names of two label maps, the reference first; adds a view of where they differ.
        axis: Direction that is scrolled: 0 left to right, 1 back to front, 2 up. Left out: the thickest
            slices.
        caption: Words below.

    Raises:
        DataError: Shapes differ, or `difference` names a map that is not there.
    """
    images = dict(image) if isinstance(image, Mapping) else {"image": image}
    maps = dict(labels or {})
    _check(images, maps, difference)
    matrix = affine if affine is not None else np.diag([*(float(v) for v in spacing), 1.0])
    pictures = {name: _ras(data, matrix)[0] for name, data in images.items()}
    found = {name: _ras(data, matrix)[0] for name, data in maps.items()}
    size_mm = _ras(next(iter(images.values())), matrix)[1]
    first = next(iter(pictures.values()))
    cut = _axis(first.shape, size_mm) if axis is None else axis
    chosen = _slices(first.shape[cut], cut, list(found.values()))
    horizontal, vertical = (other for other in range(3) if other != cut)
    step = (_stride(first.shape[horizontal]), _stride(first.shape[vertical]))
    stacks = {name: _stack(data, cut, chosen, step) for name, data in pictures.items()}
    label_stacks = {name: _stack(data, cut, chosen, step) for name, data in found.items()}
    n, h, w = next(iter(stacks.values())).shape
    columns = max(1, math.ceil(math.sqrt(n * h / w)))
    pitch, rise = -(-w // 8) * 8, -(-h // 8) * 8
    sheets: list[str] = []

    def add(stack: NDArray[np.uint8], *, exact: bool) -> int:
        sheets.append(_data_url(_sheet(stack, columns, pitch, rise), exact=exact))
        return len(sheets) - 1

    image_at = {name: add(_grey(stack), exact=False) for name, stack in stacks.items()}
    label_at = {name: add(_indices(stack), exact=True) for name, stack in label_stacks.items()}
    background = next(iter(image_at.values()))
    views: list[dict[str, Any]] = [{"image": at} for at in image_at.values()]
    views += [{"image": background, "labels": at} for at in label_at.values()]
    headings = [*image_at, *label_at]
    if difference is not None:
        views.append({"image": background, "difference": [label_at[difference[0]], label_at[difference[1]]]})
        headings.append("difference")
    union = np.zeros((n, h, w), dtype=bool)
    for stack in label_stacks.values():
        union |= stack != 0
    voxels = union.sum(axis=(1, 2)).tolist()
    values = sorted({int(v) for stack in label_stacks.values() for v in np.unique(stack)} - {0})
    width_mm, height_mm = w * step[0] * size_mm[horizontal], h * step[1] * size_mm[vertical]
    scale = CANVAS / max(width_mm, height_mm)
    data = {
        "n": n,
        "w": w,
        "h": h,
        "columns": columns,
        "pitch": pitch,
        "rise": rise,
        "sheets": sheets,
        "views": views,
        "voxels": voxels,
        "numbers": [k + 1 for k in chosen],
        "total": int(first.shape[cut]),
        "colours": {str(value): _colour(value) for value in values},
        "errors": [colour for _, colour in ERRORS],
    }
    canvas = (max(16, round(width_mm * scale)), max(16, round(height_mm * scale)))
    ends = _ENDS[cut] if affine is not None else ("", "", "", "")
    html = "".join(_view(name, canvas, ends, _PLANES[cut]) for name in headings)
    start = int(np.argmax(voxels)) + 1 if any(voxels) else n // 2 + 1
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="panel">{heading}<div class="views">{html}</div>'
        f"{_controls(n, start, bool(maps))}{_legend(values, names or {}, difference is not None)}{words}"
        f'<script type="application/json">{script_json(data)}</script></figure>'
    )


def gallery(panels: Mapping[str, str]) -> str:
    """Return several panels of which one is shown, chosen by name."""
    if len(panels) < 2:
        return "".join(panels.values())
    options = "".join(f"<option>{escape(name)}</option>" for name in panels)
    return (
        f'<div class="gallery"><p><label>case <select class="cases">{options}</select></label></p>'
        f"{''.join(panels.values())}</div>"
    )


def _check(
    images: Mapping[str, NDArray[Any]],
    maps: Mapping[str, NDArray[Any]],
    difference: tuple[str, str] | None,
) -> None:
    shapes = {name: _volume(data).shape for name, data in {**images, **maps}.items()}
    if not images or len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
        raise DataError("an overlay panel needs (X, Y, Z) arrays of one shape", why=f"found {shapes}")
    if difference is not None and not set(difference) <= set(maps):
        raise DataError("an overlay panel", why=f"no label maps {difference} among {sorted(maps)}")


def _volume(data: NDArray[Any]) -> NDArray[Any]:
    return data[0] if data.ndim == 4 and data.shape[0] == 1 else data


def _ras(data: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], tuple[float, float, float]]:
    return to_ras(_volume(data), affine)


def _axis(shape: Sequence[int], size_mm: Sequence[float]) -> int:
    """Return the direction to scroll: that of a single slice, else of the thickest slices, else up."""
    thin = [axis for axis in range(3) if shape[axis] == 1]
    if thin:
        return thin[-1]
    thickest = max(range(3), key=lambda axis: size_mm[axis])
    return thickest if size_mm[thickest] > 1.2 * min(size_mm) else 2


def _slices(count: int, axis: int, maps: Sequence[NDArray[Any]]) -> list[int]:
    """Return the slices to show: all, or where there are too many, those around the labels, thinned out."""
    low, high = 0, count
    if count > MAX_SLICES:
        others = tuple(other for other in range(3) if other != axis)
        labelled = np.zeros(count, dtype=bool)
        for data in maps:
            labelled |= data.any(axis=others)
        hit = np.flatnonzero(labelled)
        if hit.size:
            low, high = max(0, int(hit[0]) - 3), min(count, int(hit[-1]) + 4)
    return sorted(set(np.linspace(low, high - 1, min(MAX_SLICES, high - low)).round().astype(int).tolist()))


def _stride(length: int) -> int:
    return max(1, -(-length // MAX_SIZE))


def _stack(data: NDArray[Any], axis: int, chosen: Sequence[int], step: tuple[int, int]) -> NDArray[Any]:
    """Return slices `(n, rows, columns)`: top row first, the patient's right on the left."""
    stack = np.moveaxis(data, axis, 0)[list(chosen)]
    stack = stack[:, :: step[0], :: step[1]].transpose(0, 2, 1)[:, ::-1]
    return stack[:, :, ::-1] if axis != 0 else stack


def _grey(stack: NDArray[Any]) -> NDArray[np.uint8]:
    """Return grey values between the percentiles 0.5 and 99.5 of what is not background."""
    values = stack.astype(np.float32)
    inside = values[values != values.min()]
    low, high = np.percentile(inside, (0.5, 99.5)) if inside.size else (0.0, 1.0)
    low = min(float(low), float(np.median(values)))
    scaled = np.clip((values - low) / max(float(high) - low, 1e-12), 0.0, 1.0) * 255
    return np.asarray(scaled, dtype=np.uint8)


def _indices(stack: NDArray[Any]) -> NDArray[np.uint8]:
    if stack.size and (int(stack.max()) > 255 or int(stack.min()) < 0):
        raise DataError("an overlay panel shows label values from 0 to 255", why=f"found {int(stack.max())}")
    return stack.astype(np.uint8)


def _sheet(stack: NDArray[np.uint8], columns: int, pitch: int, rise: int) -> NDArray[np.uint8]:
    n, h, w = stack.shape
    sheet = np.zeros((-(-n // columns) * rise, columns * pitch), dtype=np.uint8)
    for k in range(n):
        top, left = (k // columns) * rise, (k % columns) * pitch
        sheet[top : top + h, left : left + w] = stack[k]
    return sheet


def _data_url(sheet: NDArray[np.uint8], *, exact: bool) -> str:
    """Return the sheet as PNG, or as JPEG where that is smaller and need not be exact."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(sheet))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    kind, content = "png", buffer.getvalue()
    if not exact and len(content) > 100_000:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=88)
        kind, content = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _view(name: str, canvas: tuple[int, int], ends: Sequence[str], plane: str) -> str:
    letters = "".join(
        f'<span class="{side}">{letter}</span>' for side, letter in zip("lrud", ends, strict=True) if letter
    )
    picture = (
        f'<canvas width="{canvas[0]}" height="{canvas[1]}" role="img"'
        f' aria-label="{escape(name)}, {plane} slice"></canvas>'
    )
    return f'<div class="view"><b>{escape(name)}</b><div class="frame">{picture}{letters}</div></div>'


def _controls(n: int, start: int, labelled: bool) -> str:
    hidden = "" if labelled else " hidden"
    slide = (
        '<div class="slide"><canvas width="600" height="16" aria-hidden="true"></canvas>'
        f'<input class="slices" type="range" min="1" max="{n}" value="{start}" aria-label="slice"></div>'
    )
    choices = (("outline", "outline"), ("fill", "fill"), ("none", "off"))
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in choices)
    strength = '<input class="opacity short" type="range" min="0.1" max="1" step="0.05" value="0.45">'
    return (
        f'<div class="controls">{slide}<output></output>'
        f'<label{hidden}>labels <select class="style">{options}</select></label>'
        f"<label{hidden}>strength {strength}</label></div>"
    )


def _legend(values: Sequence[int], names: Mapping[str, int], difference: bool) -> str:
    lookup = {value: name for name, value in names.items()}
    items = [(lookup.get(value, f"label {value}"), _colour(value)) for value in values]
    if difference:
        items += [(f"difference: {name}", colour) for name, colour in ERRORS]
    return (
        '<ul class="legend">'
        + "".join(
            f'<li><i style="background:rgb({",".join(map(str, colour))})"></i>{escape(name)}</li>'
            for name, colour in items
        )
        + "</ul>"
    )


def _colour(value: int) -> tuple[int, int, int]:
    return PALETTE[(value - 1) % len(PALETTE)]
