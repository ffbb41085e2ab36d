"""Volumes of spars: reading, labels of images, masks for evaluation, and the way back to the file's grid.

`load` makes of a config sets of prepared volumes, mapped from the cache and split by patient. Masks are
opened by `VolumeSet.open_masks` alone.
"""

from .implant import implant_lesions
from .loading import Loaded, Masks, load, load_set, load_volumes, open_volumes
from .plan import VolumePlan, prepare_mask, prepare_volume, restore
from .presence import read_presence
from .sets import VolumeSet

__all__ = [
    "Loaded",
    "Masks",
    "VolumePlan",
    "VolumeSet",
    "implant_lesions",
    "load",
    "load_set",
    "load_volumes",
    "open_volumes",
    "prepare_mask",
    "prepare_volume",
    "read_presence",
    "restore",
]
