r"""What is measured on a label map: exists, area, holes, components, gap, frontier, width and erosion ratios.

All are read in pixels of the map, rows running down the picture:

- ``exists``: 1 if the region is empty, else 0.
- ``area``: pixels, mm² or part of the image.
- ``holes``: pixels enclosed by the region, 8-connected; what reaches the edge of the image is not enclosed.
- ``components``: pixels outside the largest 8-connected component ("disconnectivity").
- ``gap``: pixels between two regions: those that both together enclose (4-connected), without the holes that
  lie in one region alone. At most 1/`ignore_one_in` of the image counts as 0.
- ``frontier_ratio``: pixels of the region that touch the other one (8 neighbours; a single one counts as 0)
  over the width of the region's bounding box.
- ``width_ratio``: pixels of the region over pixels of the other one in the row of their common centroid.
- ``erosion_ratio``: number of erosions by a 3×3 square until there is not exactly one 8-connected component,
  over the largest distance to the outside of the region. After each erosion, 4-connected pieces below
  1/`ignore_one_in` of the image are removed. What lies outside the image is not outside the region.

NaN means that there is nothing to measure: an empty region, no pixel of one region in the row, a region that
fills the image.

Source: `vital/metrics/evaluate/segmentation.py` (vitalab). Deviations: background that is cut off from pixel
(0, 0) but reaches the edge of the image is no gap; an empty region has the frontier ratio NaN instead of 0;
erosion of a region that fills the image is NaN instead of endless.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medrl.core.errors import ConfigError

from .label_map import EIGHT, FOUR, LabelMap, Mask, grown
from .rules import Rule


def measure(labels: LabelMap, rule: Rule) -> float:
    """Return the value that a rule asks for.

    Raises:
        ConfigError: An area in mm² is wanted and the map has no spacing.
    """
    return _MEASURES[rule.measure](labels, rule)


def passes(labels: LabelMap, rule: Rule) -> bool:
    """Return ``rule.passes(measure(labels, rule))``, without the exact value where a bound decides."""
    if rule.measure == "erosion_ratio" and rule.high == math.inf:
        return _erodes_long_enough(labels, rule)
    return rule.passes(measure(labels, rule))


def _exists(labels: LabelMap, rule: Rule) -> float:
    return float(labels.part(rule.region).pixels == 0)


def _area(labels: LabelMap, rule: Rule) -> float:
    pixels = labels.part(rule.region).pixels
    if rule.unit == "px":
        return float(pixels)
    if rule.unit == "fraction":
        return pixels / labels.image_pixels if labels.image_pixels else math.nan
    if labels.spacing is None:
        raise ConfigError(f"rule {rule.name}", why="an area in mm² needs the spacing of the map")
    return pixels * labels.spacing[0] * labels.spacing[1]


def _holes(labels: LabelMap, rule: Rule) -> float:
    return float(labels.enclosed(rule.region))


def _components(labels: LabelMap, rule: Rule) -> float:
    part = labels.part(rule.region)
    return float(part.pixels - part.largest)


def _gap(labels: LabelMap, rule: Rule) -> float:
    """Count the enclosed pieces of the complement of both regions that have neighbours in each of them.

    That is the definition without labelling the holes of each region: a piece whose neighbours all lie in
    one region is a hole of that region alone.
    """
    around = labels.surroundings(rule.region, rule.other)
    if around.enclosed.size == 0:
        return 0.0
    first, second = labels.mask(rule.region), labels.mask(rule.other)
    between = around.beside(first & ~second) & around.beside(second & ~first)
    pixels = int(np.count_nonzero(between[around.owner]))
    return float(pixels) if pixels > _ignored(labels, rule) else 0.0


def _frontier_ratio(labels: LabelMap, rule: Rule) -> float:
    part = labels.part(rule.region)
    if part.pixels == 0:
        return math.nan
    near = grown(labels.mask(rule.other)[part.box][part.inside])
    touching = int(np.count_nonzero(near & part.mask[part.inside]))
    width = int(part.mask.shape[1 - labels.rules.row_axis]) - 2
    return (touching if touching > 1 else 0) / width


def _width_ratio(labels: LabelMap, rule: Rule) -> float:
    axis = labels.rules.row_axis
    first, second = labels.mask(rule.region), labels.mask(rule.other)
    both = np.count_nonzero(first | second, axis=1 - axis)
    total = int(both.sum())
    if total == 0:
        return math.nan
    row = int(both @ np.arange(both.size)) // total
    widths = [int(np.count_nonzero(mask.take(row, axis=axis))) for mask in (first, second)]
    return widths[0] / widths[1] if all(widths) else math.nan


def _erosion_ratio(labels: LabelMap, rule: Rule) -> float:
    r"""Erode by thresholds :math:`E_k = \{D > k\}` of one chessboard distance transform D.

    A threshold need not know which pieces were removed before: a 3×3 square is 4-connected, so every piece of
    :math:`E_{k+1}` lies in one piece of :math:`E_k`, and in a removed one only smaller ones can lie.
    """
    part = labels.part(rule.region)
    if part.pixels == 0 or part.fills_image:
        return math.nan
    if part.largest != part.pixels:
        return 0.0
    inside = part.mask[part.inside]
    depth = ndimage.distance_transform_cdt(inside, "chessboard")
    least = _ignored(labels, rule)
    erosions = 1
    while _pieces(depth > erosions, least) == 1:
        erosions += 1
    return erosions / float(ndimage.distance_transform_edt(inside).max())


def _erodes_long_enough(labels: LabelMap, rule: Rule) -> bool:
    """Decide whether the erosion ratio reaches its lower limit.

    No Euclidean distance is larger than the square root of 2 times the largest depth, so that few erosions
    are enough for a yes; otherwise the ratio is measured.
    """
    part = labels.part(rule.region)
    if part.pixels == 0 or part.fills_image or part.largest != part.pixels:
        return rule.passes(measure(labels, rule))
    depth = ndimage.distance_transform_cdt(part.mask[part.inside], "chessboard")
    enough = math.floor(rule.low * math.sqrt(2) * float(depth.max())) + 1
    least = _ignored(labels, rule)
    if all(_pieces(depth > erosions, least) == 1 for erosions in range(1, enough)):
        return True
    return rule.passes(measure(labels, rule))


def _pieces(mask: Mask, least: float) -> int:
    """Return the number of 8-connected components of what 4-connected pieces of `least` pixels leave."""
    numbers, count = ndimage.label(mask, FOUR)
    if count == 0:
        return 0
    if least > 1:
        large: NDArray[np.bool_] = np.bincount(numbers.ravel()) >= least
        large[0] = False
        count = int(np.count_nonzero(large))
        if count > 1:
            mask = large[numbers]
    return count if count < 2 else int(ndimage.label(mask, EIGHT)[1])


def _ignored(labels: LabelMap, rule: Rule) -> float:
    """Return the size in pixels up to which gaps and pieces are ignored."""
    return labels.image_pixels / rule.ignore_one_in if rule.ignore_one_in else 0.0


_MEASURES: dict[str, Callable[[LabelMap, Rule], float]] = {
    "exists": _exists,
    "area": _area,
    "holes": _holes,
    "components": _components,
    "gap": _gap,
    "frontier_ratio": _frontier_ratio,
    "width_ratio": _width_ratio,
    "erosion_ratio": _erosion_ratio,
}
