"""Anatomical validity beside a plain scikit-image implementation of the same nine rules.

Prints CPU seconds on one thread, both arms alternating in one process on the same masks, and compares
verdicts and values on masks of many kinds. A larger ratio means that medrl is faster.

    OMP_NUM_THREADS=1 python benchmarks/validity.py
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure, morphology

from medrl.core.validity import Rules, check, is_valid, load_rules

Mask = NDArray[np.uint8]
SQUARE = np.ones((3, 3), dtype=bool)
LIMITS = {
    "erosion_ratio_before_myo_split": (0.12, math.inf),
    "width_ratio_between_lv_and_myo": (0, 4.15),
    "frontier_ratio_between_lv_and_bg_no_atr": (0.05, 1.5),
}


# The plain implementation: the definitions one after the other, with scikit-image, on the whole image.


def plain_values(mask: Mask) -> dict[str, float]:
    """Return the nine measures of a mask (X, Y)."""
    image = mask.T
    lv, myo = image == 1, image == 2
    small = image.size / 2**14
    return {
        "lv_pixels": float(not lv.any()),
        "holes_in_lv": plain_holes(lv),
        "holes_in_epi": plain_holes(lv | myo),
        "disconnectivity_in_lv": plain_disconnectivity(lv),
        "disconnectivity_in_myo": plain_disconnectivity(myo),
        "holes_between_lv_and_myo": plain_gap(lv, myo, small),
        "erosion_ratio_before_myo_split": plain_erosion_ratio(myo, small),
        "width_ratio_between_lv_and_myo": plain_width_ratio(lv, myo),
        "frontier_ratio_between_lv_and_bg_no_atr": plain_frontier_ratio(lv, image == 0),
    }


def plain_verdict(values: dict[str, float]) -> bool:
    """Return whether every measure lies within its limits; no limits mean exactly 0."""
    limits = {name: LIMITS.get(name, (0, 0)) for name in values}
    return all(limits[name][0] <= value <= limits[name][1] for name, value in values.items())


def plain_holes(region: NDArray[np.bool_]) -> float:
    """Count pixels of 8-connected background pieces that do not reach the edge."""
    around = np.pad(~region, 1, constant_values=True)
    pieces = measure.regionprops(measure.label(around, connectivity=2))
    return float(sum(piece.area for piece in pieces if piece.bbox[0] != 0))


def plain_disconnectivity(region: NDArray[np.bool_]) -> float:
    """Count pixels outside the largest 8-connected component."""
    areas = sorted(piece.area for piece in measure.regionprops(measure.label(region, connectivity=2)))
    return float(sum(areas[:-1]))


def plain_own_holes(region: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the 4-connected holes of a region that hold no pixel of the other one; all arrays are padded."""
    found = np.zeros_like(region)
    for piece in measure.regionprops(measure.label(~region, connectivity=1)):
        rows, columns = piece.coords.T
        if piece.bbox[0] != 0 and not other[rows, columns].any():
            found[rows, columns] = True
    return found


def plain_gap(lv: NDArray[np.bool_], myo: NDArray[np.bool_], small: float) -> float:
    """Count pixels enclosed by both regions and their own holes."""
    lv, myo = np.pad(lv, 1), np.pad(myo, 1)
    filled = lv | myo | plain_own_holes(lv, myo) | plain_own_holes(myo, lv)
    pieces = measure.regionprops(measure.label(~filled, connectivity=1))
    count = sum(piece.area for piece in pieces if piece.bbox[0] != 0)
    return float(count) if count > small else 0.0


def plain_erosion_ratio(region: NDArray[np.bool_], small: float) -> float:
    """Erode until there is not exactly one component."""
    if not region.any() or region.all():
        return math.nan
    thickness = ndimage.distance_transform_edt(region).max()
    erosions, left = 0, region
    while measure.label(left, connectivity=2, return_num=True)[1] == 1:
        left = morphology.erosion(left, SQUARE, mode="ignore")
        left = morphology.remove_small_objects(left, max_size=math.ceil(small) - 1)
        erosions += 1
    return erosions / thickness


def plain_width_ratio(lv: NDArray[np.bool_], myo: NDArray[np.bool_]) -> float:
    """Divide the widths in the row of the common centroid."""
    if not (lv | myo).any():
        return math.nan
    row = int(ndimage.center_of_mass(lv | myo)[0])
    widths = lv[row].sum(), myo[row].sum()
    return float(widths[0] / widths[1]) if all(widths) else math.nan


def plain_frontier_ratio(lv: NDArray[np.bool_], background: NDArray[np.bool_]) -> float:
    """Divide the pixels of the LV that touch background by the width of the LV."""
    if not lv.any():
        return math.nan
    count = (lv & morphology.dilation(background, SQUARE)).sum()
    box = measure.regionprops(lv.astype(np.uint8))[0].bbox
    return float(count if count > 1 else 0) / (box[3] - box[1])


# Masks.


def phantom(size: int, rng: np.random.Generator, *, wall: float = 0.06) -> Mask:
    """Return a mask (X, Y): a tilted half ellipse in a shell, cut at the base."""
    y, x = np.mgrid[:size, :size] / size - np.array([0.5, 0.5])[:, None, None]
    angle = rng.uniform(-0.4, 0.4)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    half_width, half_length = rng.uniform(0.12, 0.18), rng.uniform(0.26, 0.34)
    base = rng.uniform(0.1, 0.2)
    inner = (u / half_width) ** 2 + (v / half_length) ** 2 <= 1
    outer = (u / (half_width + wall)) ** 2 + (v / (half_length + wall)) ** 2 <= 1
    mask = np.where(inner, 1, np.where(outer, 2, 0)) * (v <= base)
    return np.ascontiguousarray(mask.T.astype(np.uint8))


def noisy(mask: Mask, part: float, rng: np.random.Generator) -> Mask:
    """Give a part of the pixels a random label."""
    chosen = rng.random(mask.shape) < part
    return np.where(chosen, rng.integers(0, 3, mask.shape), mask).astype(np.uint8)


def warped(mask: Mask, rng: np.random.Generator) -> Mask:
    """Move the pixels by a smooth random field of up to a tenth of the image."""
    size = mask.shape[0]
    field = ndimage.zoom(rng.normal(0, 0.04 * size, (2, 5, 5)), (1, size / 5, size / 5), order=1)
    return ndimage.map_coordinates(mask, np.indices(mask.shape) + field, order=0)


def blobs(mask: Mask, rng: np.random.Generator) -> Mask:
    """Relabel a few squares."""
    mask = mask.copy()
    for _ in range(rng.integers(1, 4)):
        x, y = rng.integers(0, mask.shape[0], 2)
        side = rng.integers(1, max(2, mask.shape[0] // 8))
        mask[x : x + side, y : y + side] = rng.integers(0, 3)
    return mask


def various(count: int) -> list[tuple[str, Mask]]:
    """Return masks of every kind and several sizes."""
    rng = np.random.default_rng(1)
    kinds: dict[str, Callable[[Mask], Mask]] = {
        "clean": lambda mask: mask,
        "warped": lambda mask: warped(mask, rng),
        "noisy": lambda mask: noisy(mask, rng.choice([0.0005, 0.005, 0.05]), rng),
        "shifted": lambda mask: np.roll(
            mask, rng.integers(-mask.shape[0] // 2, mask.shape[0] // 2, 2), (0, 1)
        ),
        "pushed out": lambda mask: ndimage.shift(mask, rng.uniform(-0.4, 0.4, 2) * mask.shape[0], order=0),
        "relabelled": lambda mask: blobs(mask, rng),
        "turned": lambda mask: np.rot90(mask, rng.integers(1, 4)).copy(),
        "thin": lambda mask: phantom(mask.shape[0], rng, wall=rng.uniform(0.005, 0.03)),
        "blurred noise": lambda mask: np.digitize(
            ndimage.gaussian_filter(rng.normal(size=mask.shape), rng.uniform(1, 5)), [-0.02, 0.02]
        ).astype(np.uint8),
    }
    names = list(kinds)
    sizes = (48, 64, 96, 128, 256)
    return [
        (names[k % len(names)], kinds[names[k % len(names)]](phantom(sizes[k % len(sizes)], rng)))
        for k in range(count)
    ]


# Measurement.


def differences(rules: Rules, count: int) -> str:
    """Compare verdicts and values; values may differ by rounding only."""
    wrong, worst, valid, kinds = 0, 0.0, 0, set()
    for kind, mask in various(count):
        ours, theirs = check(mask, rules), plain_values(mask)
        wrong += ours.valid != plain_verdict(theirs) or is_valid(mask, rules) != ours.valid
        for name, value in theirs.items():
            if math.isnan(value) and math.isnan(ours.values[name]):
                continue
            gap = abs(value - ours.values[name])
            worst = max(worst, math.inf if math.isnan(gap) else gap)
        valid += ours.valid
        kinds.add(kind)
    return (
        f"{count} masks of {len(kinds)} kinds, {valid} valid: {wrong} verdicts differ, values by {worst:.1e}"
    )


def cpu_milliseconds(
    arms: dict[str, Callable[[Mask], object]], masks: list[Mask], repeats: int
) -> dict[str, float]:
    """Return the smallest CPU time a mask of each arm, alternating."""
    best = dict.fromkeys(arms, math.inf)
    for call in arms.values():
        call(masks[0])
    for _ in range(repeats):
        for name, call in arms.items():
            start = time.process_time()
            for mask in masks:
                call(mask)
            best[name] = min(best[name], (time.process_time() - start) / len(masks) * 1e3)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=int, default=8, help="masks a row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compare", type=int, default=1000, help="masks whose verdicts are compared")
    options = parser.parse_args()
    rules = load_rules("echo")
    rng = np.random.default_rng(0)
    arms: dict[str, Callable[[Mask], object]] = {
        "plain": lambda mask: plain_verdict(plain_values(mask)),
        "check": lambda mask: check(mask, rules),
        "is_valid": lambda mask: is_valid(mask, rules),
    }
    print(
        f"{'CPU ms a mask of 256²':34s}{'plain':>9s}{'check':>9s}{'ratio':>8s}{'is_valid':>10s}{'ratio':>8s}"
    )
    for name, part in {"clean": 0.0, "1 % noise": 0.01, "5 % noise": 0.05, "20 % noise": 0.2}.items():
        masks = [noisy(phantom(256, rng), part, rng) for _ in range(options.masks)]
        took = cpu_milliseconds(arms, masks, options.repeats)
        ratios = {arm: took["plain"] / took[arm] for arm in ("check", "is_valid")}
        print(
            f"{name:34s}{took['plain']:9.2f}{took['check']:9.2f}{ratios['check']:8.1f}"
            f"{took['is_valid']:10.2f}{ratios['is_valid']:8.1f}"
        )
    print(differences(rules, options.compare))


if __name__ == "__main__":
    main()
