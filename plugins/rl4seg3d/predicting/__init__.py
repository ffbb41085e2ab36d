"""Prediction of files: any model, one file at a time, everything about it in a report."""

from .model import Model, NetReward, RewardModel, load_model
from .running import run
from .segmenting import Segmenter, largest_blobs

__all__ = ["Model", "NetReward", "RewardModel", "Segmenter", "largest_blobs", "load_model", "run"]
