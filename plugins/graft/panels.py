"""Pictures of some cases at a validation: the images, the reference, the student and every teacher.

One PNG for each case shows its most telling slice: that with the most cancer, else with the most prostate,
else the middle one. The first row holds the channels and the reference, the second the student's probability
of each channel and its decision, and one row for each teacher the same of that teacher.

Deviation: drawn without matplotlib, in a fraction of its time, so that every epoch can have pictures. The
original draws none in the setting that it ships (specification §8, 14).

Source: specification §7; validation_visualizer.py of the original.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import nn

from medrl.core.dataset import load_case
from medrl.core.errors import DataError
from medrl.core.volume import write_volume
from medrl.core.volume.write import write_bytes

from .config import GraftConfig
from .data import GraftData
from .models import as_output
from .regions import Target, teacher_probabilities
from .samples import Batch, collate, from_network
from .validation import validation_cases

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime
    from medrl.core.types import Case

_log = logging.getLogger("medrl.graft")

FOLDER = Path("visualizations") / "validation_vis"
PICTURE = "center_slice_comparison.png"
LISTING = "pictures.json"
"""File of the run folder that names the newest pictures, for the report."""
COLOURS = (
    (0, 0, 0), (31, 84, 214), (22, 158, 70), (250, 214, 30), (214, 60, 46), (150, 80, 200), (0, 180, 200),
    (255, 150, 30), (255, 255, 255),
)  # fmt: skip
"""Of label values; 0 to 3 are black, blue, green and yellow, as upstream. Larger ones use them again."""
SIDE = 176
"""Least height of a tile in pixels; small slices are enlarged by a whole factor."""
CAPTION = 16
GAP = 4
DPI = 150


class Panels:
    """Draws the same few cases again and again.

    Args:
        rt: The run folder.
        cfg: How many cases.
        data: The cases and the teachers.
    """

    def __init__(self, rt: Runtime, cfg: GraftConfig, data: GraftData) -> None:
        self.rt, self.cfg, self.data = rt, cfg, data
        count = cfg.validation.panels
        self.cases = {"train": data.labelled[:count], "val": validation_cases(cfg, data)[:count]}

    @torch.no_grad()
    def draw(self, student: nn.Module, *, epoch: int) -> list[Path]:
        """Write the pictures of an epoch, one folder for each case; on the main rank only.

        Raises:
            RuntimeFault: The disk is full.
        """
        was_training = student.training
        student.eval()
        listing, paths = [], []
        try:
            for mode, cases in self.cases.items():
                for case in cases:
                    batch = self._batch(case)
                    folder = self.rt.run.dir / FOLDER / f"epoch_{epoch:03d}_{mode}" / f"case_{case.id}"
                    rows, labels = self._rows(student, batch)
                    write_bytes(folder / PICTURE, png(picture(rows)))
                    if self.cfg.validation.nifti:
                        self._write_volumes(folder, case, labels)
                    paths.append(folder / PICTURE)
                    listing.append(
                        {
                            "title": f"{'training' if mode == 'train' else 'validation'} case {case.id}",
                            "path": str((folder / PICTURE).relative_to(self.rt.run.dir)),
                            "caption": f"epoch {epoch}",
                        }
                    )
        finally:
            student.train(was_training)
        write_bytes(self.rt.run.dir / LISTING, (json.dumps(listing, indent=2) + "\n").encode())
        return paths

    def _batch(self, case: Case) -> Batch:
        """One case as training sees it, without changes, with what the teachers say where they say it."""
        shown = self._teachers_know(case)
        sample = self.data.samples([case], teachers=shown)[0]
        batch = collate([sample], self.rt.device)
        return self.data.complete(batch, taps=()) if shown else batch

    def _teachers_know(self, case: Case) -> bool:
        """Whether every teacher can be shown; feature files may hold the training cases only."""
        if not self.data.teachers or not all(case.id in teacher for teacher in self.data.teachers):
            return False
        expected = self.data.store.expected(self.data.store.get(case))
        try:
            for teacher in self.data.teachers:
                teacher.check(expected)
        except DataError as error:
            _log.warning("no picture of the teachers: %s", error)
            return False
        return True

    def _rows(self, student: nn.Module, batch: Batch) -> tuple[list[list[Tile]], dict[str, NDArray[Any]]]:
        """Tiles of the picture, and label maps ``(D, H, W)`` by name."""
        target = self.data.plan.target
        truth = target.encode(batch.label)
        k = telling_slice(truth[0].cpu().numpy(), batch.mask[0].cpu().numpy(), target)
        label = batch.label[0].cpu().numpy()
        channels = zip(self.data.plan.channel_names, batch.image[0].cpu().numpy(), strict=True)
        rows = [[*((name, grey(image[k])) for name, image in channels), ("reference", coloured(label[k]))]]
        maps = {"reference": label}
        with torch.autocast(batch.image.device.type, enabled=False):
            said = {"student": target.probabilities(as_output(student(batch.image)).main)}
        for name, logits, family in zip(
            self.data.teacher_names if batch.logits else (), batch.logits, self.data.families, strict=False
        ):
            said[name] = teacher_probabilities(logits, target, family)
        for name, p in said.items():
            decided = target.decode(p)[0].cpu().numpy()
            maps[name] = decided
            tiles = [
                (f"{name}: {target.names[c]}", heat(p[0, c, k].float().cpu().numpy()))
                for c in target.structures
            ]
            rows.append([*tiles, (f"{name}: decision", coloured(decided[k]))])
        return rows, maps

    def _write_volumes(self, folder: Path, case: Case, maps: Mapping[str, NDArray[Any]]) -> None:
        """Write image and label maps on the grid of the case, so that viewers lay them over each other."""
        prepared = self.data.store.get(case)
        window = self.data.store.expected(prepared).window
        image, _ = load_case(self.data.dataset, case, with_label=False)
        for name, channel in zip(self.data.plan.channel_names, image.data, strict=True):
            write_volume(folder / f"{name}.nii.gz", channel, image, kind="image")
        for name, found in maps.items():
            full = window.put_back(found.astype(np.int64), prepared.shape)
            write_volume(folder / f"{name}.nii.gz", from_network(full[None])[0], image, kind="label")


Tile = tuple[str, NDArray[np.uint8]]
"""Caption, and ``(H, W, 3)`` colours."""


def telling_slice(truth: NDArray[Any], mask: NDArray[Any], target: Target) -> int:
    """The slice with the most of what matters, else with the most of any structure, else the middle one.

    Args:
        truth: ``(C, D, H, W)`` encoded labels.
        mask: ``(D, H, W)`` organ mask.
        target: Which channels matter.
    """
    organ = mask if mask.any() and not mask.all() else np.zeros_like(mask)
    for chosen in (truth[list(target.focus)], truth[list(target.structures)], organ[None]):
        counts = (chosen > 0).sum(axis=(0, 2, 3))
        if counts.any():
            return int(counts.argmax())
    return int(truth.shape[1] // 2)


def grey(image: NDArray[Any]) -> NDArray[np.uint8]:
    """``(H, W)`` intensities as grey between their percentiles 1 and 99."""
    low, high = np.percentile(image, (1.0, 99.0))
    scaled = np.clip((image - low) / max(float(high - low), 1e-6), 0.0, 1.0)
    return np.repeat((scaled * 255).astype(np.uint8)[..., None], 3, axis=2)


def heat(p: NDArray[Any]) -> NDArray[np.uint8]:
    """``(H, W)`` probabilities from black over red and yellow to white."""
    levels = np.clip(p, 0.0, 1.0)[..., None] * 3.0 - np.arange(3.0)
    return np.asarray(np.clip(levels, 0.0, 1.0) * 255, dtype=np.uint8)


def coloured(labels: NDArray[Any]) -> NDArray[np.uint8]:
    """``(H, W)`` label values in `COLOURS`."""
    values = labels.astype(np.int64)
    table = np.array(COLOURS, dtype=np.uint8)
    later = 1 + (values - 1) % (len(table) - 1)
    shown: NDArray[np.uint8] = table[np.where(values < len(table), values, later)]
    return shown


def picture(rows: Sequence[Sequence[Tile]]) -> NDArray[np.uint8]:
    """Put tiles of one size together, each under its caption."""
    height, width = rows[0][0][1].shape[:2]
    factor = max(1, -(-SIDE // max(height, width)))
    high, wide = height * factor, width * factor
    columns = max(len(row) for row in rows)
    size = (columns * (wide + GAP) + GAP, len(rows) * (high + CAPTION + GAP) + GAP)
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (caption, tile) in enumerate(row):
            left, top = GAP + c * (wide + GAP), GAP + r * (high + CAPTION + GAP)
            pen.text((left, top + 1), _fitting(pen, caption, wide), fill=(0, 0, 0))
            enlarged = Image.fromarray(tile).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + CAPTION))
    return np.asarray(sheet)


def png(image: NDArray[np.uint8]) -> bytes:
    """The bytes of a PNG file at 150 dpi."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", dpi=(DPI, DPI))
    return buffer.getvalue()


def _fitting(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text, shortened where it is wider than its tile."""
    while len(text) > 1 and pen.textlength(text) > width:
        text = text[:-2] + "…"
    return text
