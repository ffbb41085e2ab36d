"""One pair, where it is from, and pairs as tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .split import Part


@dataclass(frozen=True, kw_only=True)
class PairOrigin:
    """Where one pair is from.

    Attributes:
        id: Of the image.
        subject: Of the image.
        kind: How the label map was made.
        domain: source or target.
        iteration: In which round it was made.
        strength: Of noise, contrast or temperature; 0 where there is none.
        number: Tells several pairs of one image, kind and strength apart.
        seed: From which all its draws are derived.
        maker: Which network made the label map, if there are several.
        partner: Subject of a label map that was swapped in.
        style_target: Index of the target image from which the style was borrowed, or −1.
    """

    id: str
    subject: str
    kind: str
    domain: str
    iteration: int = 0
    strength: float = 0.0
    number: int = 0
    seed: int = 0
    maker: str = ""
    partner: str = ""
    style_target: int = -1

    def name(self) -> str:
        """Digest of what tells this pair from all others."""
        told = (self.domain, self.id, self.iteration, self.kind, float(self.strength), self.number, self.seed)
        return digest(json.dumps(told).encode())[:32]


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """One line of the manifest.

    Attributes:
        name: Of the pair.
        part: train, val or test, by subject.
        origin: Where it is from.
        image: SHA-256 of the bytes of the image.
        action: The same of the label map to judge.
        truth: The same of the reference label map.
        shard: Number of its shard.
        index: Its place there.
    """

    name: str
    part: Part
    origin: PairOrigin
    image: str
    action: str
    truth: str
    shard: int
    index: int

    @property
    def id(self) -> str:
        """Of the image."""
        return self.origin.id

    @property
    def subject(self) -> str:
        """Of the image."""
        return self.origin.subject


class PairBatch(NamedTuple):
    """Pairs as tensors: images ``(N, C, *S)`` float32 in [0, 1], actions and truths ``(N, *S)`` int64."""

    images: Tensor
    actions: Tensor
    truths: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        """Move to a device."""
        return PairBatch(*(item.to(device) for item in self))


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
