"""Synthetic apical echocardiography: a left ventricle in its wall, in a sector of speckle, as real files.

A heart is drawn as numbers (`draw_heart`), put on a grid (`rasterise`), seen by a machine (`draw_look`) and
painted (`paint`); `write_echo` writes cases in nnU-Net raw layout. Case k depends on the seed, the domain and
k alone. Label maps keep the anatomical rules of echocardiography.

Left atrium, right heart, mitral valve and papillary muscle are in the images; of them, the label maps hold
the atrium, if asked for. Arrays are ``(across, depth)`` with the apex at small depth, as in CAMUS.
"""

from __future__ import annotations

from .anatomy import ATRIUM, LABELS, Anatomy, Heart, draw_heart, rasterise
from .painting import Look, Style, draw_look, paint
from .writing import CHANNELS, Phantom, case_name, make_case, write_echo

__all__ = [
    "ATRIUM",
    "CHANNELS",
    "LABELS",
    "Anatomy",
    "Heart",
    "Look",
    "Phantom",
    "Style",
    "case_name",
    "draw_heart",
    "draw_look",
    "make_case",
    "paint",
    "rasterise",
    "write_echo",
]
