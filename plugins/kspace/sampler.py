"""How often each training case is drawn: every set of labels as often as any other.

The weights lie in a JSON file beside the digest of the cases that they were made for. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, DataError

from .cases import Cases

SCHEMA = 1


@dataclass(frozen=True)
class Weights:
    """Weights of training cases.

    Attributes:
        dataset_hash: Digest of the cases and their labels, see `digest`.
        ids: N names.
        weights: N positive numbers.
    """

    dataset_hash: str
    ids: tuple[str, ...]
    weights: tuple[float, ...]

    def tensor(self) -> Tensor:
        """``(N,)`` float32."""
        return torch.tensor(self.weights, dtype=torch.float32)

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        content = {
            "schema": SCHEMA,
            "dataset_hash": self.dataset_hash,
            "ids": list(self.ids),
            "weights": list(self.weights),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_weights(cases: Cases) -> Weights:
    """Weigh cases by the labels that occur in them: b = Σ 2^(label - 1), weight = 1 / number of cases with b.

    Raises:
        DataError: The cases have no labels.

    Source: seed repository, gen_sampler.py; specification §6.
    """
    bits = label_bits(cases)
    counts = Counter(bits.tolist())
    weights = tuple(1.0 / counts[value] for value in bits.tolist())
    return Weights(digest(cases), tuple(cases.ids), weights)


def label_bits(cases: Cases) -> Tensor:
    """The bits of the labels in each case ``(N,)`` int64; bit 0 is label 1.

    Raises:
        DataError: The cases have no labels.
    """
    if cases.labels is None:
        raise DataError("sampler", why="these cases have no labels", do="sampler.kind=uniform")
    found = []
    for number in range(len(cases)):
        values = [value for value in set(cases.labels[number].flatten().tolist()) if value > 0]
        found.append(sum(2 ** (value - 1) for value in values))
    return torch.tensor(found, dtype=torch.int64)


def digest(cases: Cases) -> str:
    """SHA-256 of the names and labels of cases, in their order."""
    whole = hashlib.sha256("\0".join(cases.ids).encode())
    if cases.labels is not None:
        for number in range(len(cases)):
            whole.update(cases.labels[number].to(torch.uint8).contiguous().numpy().tobytes())
    return whole.hexdigest()


def read_weights(path: Path, cases: Cases) -> Weights:
    """Read a file of weights and check that it was made for these cases.

    Raises:
        ConfigError: It does not exist.
        DataError: It is damaged, holds something else, or was made for other cases.
    """
    if not path.is_file():
        raise ConfigError("inputs.sampler", why=f"{path} does not exist", do="medrl kspace make-sampler")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Weights(
            str(content["dataset_hash"]),
            tuple(map(str, content["ids"])),
            tuple(map(float, content["weights"])),
        )
        schema = content["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            str(path),
            why=f"it is no sampler of kspace ({type(error).__name__}); pickled samplers are never opened",
            do="medrl kspace make-sampler",
        ) from error
    _check(path, found, schema, cases.ids)
    if found.dataset_hash != digest(cases):
        raise DataError(str(path), why="labels of its cases have changed", do="medrl kspace make-sampler")
    return found


def _check(path: Path, found: Weights, schema: object, ids: Sequence[str]) -> None:
    """Refuse what does not fit the cases."""
    wrong = ""
    if schema != SCHEMA:
        wrong = f"schema {schema}, expected {SCHEMA}"
    elif len(found.weights) != len(found.ids):
        wrong = f"{len(found.weights)} weights of {len(found.ids)} cases"
    elif not all(math.isfinite(value) and value > 0 for value in found.weights):
        wrong = "a weight is not a positive number"
    elif found.ids != tuple(ids):
        other = sorted(set(found.ids) ^ set(ids))[:3]
        wrong = "it was made for other cases" + (f", such as {', '.join(other)}" if other else "")
    if wrong:
        raise DataError(str(path), why=wrong, do="medrl kspace make-sampler")
