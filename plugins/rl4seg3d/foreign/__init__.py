"""Weights that other programs wrote: taken apart by their names, networks rebuilt from shapes."""

from .converting import convert
from .reading import WEIGHT_PARTS, Weights, read_weights
from .scripted import Scripted, load_scripted

__all__ = ["WEIGHT_PARTS", "Scripted", "Weights", "convert", "load_scripted", "read_weights"]
