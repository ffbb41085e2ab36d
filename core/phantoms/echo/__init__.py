"""Synthetic apical echocardiography: a left ventricle in its wall, in a sector of speckle, as real files.

A heart is drawn as numbers (`draw_heart`), put on a grid (`rasterise`), seen by a machine (`draw_look`) and
painted (`paint`); `write_echo` writes cases in nnU-Net raw layout; `write_echo_sequences` beating ones
``(x, y, t)``. Case k depends on the seed, the domain and k alone. Label maps keep the anatomical
rules of echocardiography, sequences the temporal ones too.

Left atrium, right heart, mitral valve and papillary muscle are in the images; of them, the label maps hold
the atrium, if asked for. Arrays are ``(across, depth)`` with the apex at small depth, as in CAMUS.
"""

from __future__ import annotations

from .anatomy import ATRIUM, LABELS, Anatomy, Heart, draw_heart, rasterise
from .beating import Beat, CoherentNormals, contraction, draw_beat, heart_at
from .painting import Look, Style, draw_look, paint
from .sequences import SequencePhantom, make_sequence, write_echo_sequences
from .writing import CHANNELS, Phantom, case_name, make_case, write_echo

__all__ = [
    "ATRIUM",
    "CHANNELS",
    "LABELS",
    "Anatomy",
    "Beat",
    "CoherentNormals",
    "Heart",
    "Look",
    "Phantom",
    "SequencePhantom",
    "Style",
    "case_name",
    "contraction",
    "draw_beat",
    "draw_heart",
    "draw_look",
    "heart_at",
    "make_case",
    "make_sequence",
    "paint",
    "rasterise",
    "write_echo",
    "write_echo_sequences",
]
