"""File names of images: suffixes, stems, and what to skip."""

from __future__ import annotations

from pathlib import Path

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd", ".dcm")
"""Suffixes that `read_volume` opens."""


def image_suffix(path: Path) -> str:
    """Return the image suffix in lower case, or an empty string: ``x.NII.GZ`` gives ``.nii.gz``."""
    name = path.name.lower()
    return next((suffix for suffix in IMAGE_SUFFIXES if name.endswith(suffix)), "")


def image_stem(path: Path) -> str:
    """Return the name without its image suffix; other dots stay: ``x.1.nii`` gives ``x.1``."""
    suffix = image_suffix(path)
    return path.name[: -len(suffix)] if suffix else path.name


def is_image_file(path: Path) -> bool:
    """Whether this is a visible file with an image suffix (``._x.nii`` of archives is not)."""
    return not path.name.startswith(".") and bool(image_suffix(path)) and path.is_file()
