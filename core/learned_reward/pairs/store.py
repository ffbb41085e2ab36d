"""Pairs on disk: shards of bytes that are mapped into memory, and a manifest of where each pair is from.

A folder holds ``manifest.json`` and shards of up to 512 pairs, each a file in the format of
`medrl.core.cache_entry` with the arrays ``images`` ``(n, C, *S)``, ``actions`` and ``truths`` ``(n, *S)``,
all uint8, named by the digest of its content. The manifest is written last: a folder without one is
unfinished. Nothing in it depends on time, place or machine, so that the same pairs give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medrl.core.cache_entry import CachedArrays, DamagedEntry, open_entry, plain_arrays, write_entry
from medrl.core.errors import DataError
from medrl.core.rng import numpy_generator
from medrl.core.volume.write import write_bytes

from .rows import PairBatch, PairOrigin, PairRow, digest
from .split import Part, SubjectSplit

MANIFEST = "manifest.json"
FORMAT = "medrl reward pairs"
VERSION = 1
_SUFFIX = ".shard"


class PairWriter:
    """Writes a folder of pairs; `close` makes it complete.

    Args:
        folder: Made if missing. A manifest in it is removed at once, shards that are no longer named at the
            end.
        classes: K ≤ 256.
        split: Part of each subject, written beside each pair.
        provenance: Plain values for the manifest, such as the hash of the actor.
        shard_size: Pairs in one file.

    As a context manager it is closed where no error occurred; after an error the folder has no manifest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        classes: int,
        split: SubjectSplit,
        provenance: Mapping[str, Any] | None = None,
        shard_size: int = 512,
    ) -> None:
        if not 2 <= classes <= 256:
            raise DataError("pairs", why=f"{classes} classes do not fit a byte")
        self.folder = Path(folder)
        self.classes = classes
        self.split = split
        self.provenance = dict(provenance or {})
        self.shard_size = shard_size
        self._rows: list[PairRow] = []
        self._names: set[str] = set()
        self._shape: tuple[int, ...] | None = None
        self._shards: list[dict[str, Any]] = []
        self._waiting: list[tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def add(self, image: Tensor, action: Tensor, truth: Tensor, origin: PairOrigin) -> PairRow:
        """Add one pair.

        Args:
            image: ``(C, *S)`` in [0, 1], stored as round(255·x), or uint8.
            action: ``(*S)`` label map to judge.
            truth: ``(*S)`` reference label map.
            origin: Where it is from.

        Raises:
            DataError: Other shapes than before, labels outside [0, K), a subject paired with one of another
                part, or the same pair twice.
        """
        case, part = origin.id, self.split.part(origin.subject)
        if origin.partner and self.split.part(origin.partner) != part:
            raise DataError(
                "pairs",
                case=case,
                why=f"{origin.subject} is in {part}, the swapped {origin.partner} is not; it would leak",
            )
        name = origin.name()
        if name in self._names:
            raise DataError(
                "pairs",
                case=case,
                why=f"{origin.kind} {origin.strength} of iteration {origin.iteration} came twice",
            )
        arrays = (_bytes_of_image(image), self._labels(action, case), self._labels(truth, case))
        shape = arrays[0].shape
        if self._shape is None:
            self._shape = shape
        if shape != self._shape or arrays[1].shape != shape[1:] or arrays[2].shape != shape[1:]:
            raise DataError(
                "pairs",
                case=case,
                why=f"image {shape}, label maps {arrays[1].shape} and {arrays[2].shape}; the first image "
                f"was {self._shape}",
            )
        row = PairRow(
            name=name,
            part=part,
            origin=origin,
            image=digest(arrays[0].tobytes()),
            action=digest(arrays[1].tobytes()),
            truth=digest(arrays[2].tobytes()),
            shard=len(self._shards),
            index=len(self._waiting),
        )
        self._names.add(name)
        self._rows.append(row)
        self._waiting.append(arrays)
        if len(self._waiting) == self.shard_size:
            self._flush()
        return row

    def close(self) -> PairSet:
        """Write what is waiting and the manifest, remove old shards, and open the result.

        Raises:
            RuntimeFault: The disk is full or the folder cannot be written.
        """
        self._flush()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "classes": self.classes,
            "shape": list(self._shape or ()),
            "split": {
                "validation": self.split.validation,
                "test": self.split.test,
                "seed": self.split.seed,
            },
            "provenance": self.provenance,
            "shards": self._shards,
            "pairs": [asdict(row) for row in self._rows],
        }
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        write_bytes(self.folder / MANIFEST, text.encode() + b"\n", suffix=".json")
        named = {shard["file"] for shard in self._shards}
        for path in self.folder.glob(f"*{_SUFFIX}"):
            if path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()
        return PairSet(self.folder)

    def _labels(self, labels: Tensor, case: str) -> NDArray[np.uint8]:
        values = labels.detach().cpu().numpy()
        if values.size and (values.min() < 0 or values.max() >= self.classes):
            raise DataError(
                "pairs",
                case=case,
                why=f"labels from {values.min()} to {values.max()} for {self.classes} classes",
            )
        return np.ascontiguousarray(values, dtype=np.uint8)

    def _flush(self) -> None:
        if not self._waiting:
            return
        names = ("images", "actions", "truths")
        arrays = {name: np.stack([item[i] for item in self._waiting]) for i, name in enumerate(names)}
        ready, types = plain_arrays(arrays)
        file = io.BytesIO()
        write_entry(file, ready, types, {"pairs": len(self._waiting)})
        content = file.getvalue()
        content_hash = digest(content)
        name = f"{len(self._shards):05d}-{content_hash[:16]}{_SUFFIX}"
        write_bytes(self.folder / name, content, suffix=_SUFFIX)
        self._shards.append({"file": name, "sha256": content_hash, "pairs": len(self._waiting)})
        self._waiting.clear()


class PairSet:
    """Pairs of one folder or of several, such as those of all iterations so far.

    Args:
        folders: Folders that a `PairWriter` closed.

    Attributes:
        rows: Where each pair is from, in the order of their numbers.
        classes: K.
        shape: (C, *S).

    Raises:
        DataError: A folder is unfinished or damaged, the folders do not fit together, or a subject is in two
            parts.
    """

    def __init__(self, folders: Path | Sequence[Path]) -> None:
        self.folders = [Path(item) for item in ([folders] if isinstance(folders, str | Path) else folders)]
        self.rows: list[PairRow] = []
        self.classes = 0
        self.shape: tuple[int, ...] = ()
        self.provenance: list[Mapping[str, Any]] = []
        self._files: list[Path] = []
        self._open: dict[int, CachedArrays] = {}
        for folder in self.folders:
            self._read(folder)
        self._shard = np.array([row.shard for row in self.rows], dtype=np.int64)
        self._index = np.array([row.index for row in self.rows], dtype=np.int64)
        self._check_subjects()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> PairBatch:
        """One pair, as a batch of one."""
        return self.batch([number])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def batch(self, numbers: Sequence[int] | NDArray[np.int64]) -> PairBatch:
        """Read pairs by their numbers, in the order asked for.

        Raises:
            DataError: A shard is damaged or missing.
        """
        asked = np.asarray(numbers, dtype=np.int64)
        channels, *size = self.shape
        images = np.empty((len(asked), channels, *size), np.uint8)
        actions, truths = (np.empty((len(asked), *size), np.uint8) for _ in range(2))
        shards = self._shard[asked]
        for shard in np.unique(shards):
            at = np.flatnonzero(shards == shard)
            rows = self._index[asked[at]]
            arrays = self._arrays(int(shard))
            images[at], actions[at], truths[at] = (
                arrays[name][rows] for name in ("images", "actions", "truths")
            )
        return PairBatch(
            torch.from_numpy(images).float().div_(255.0),
            torch.from_numpy(actions).long(),
            torch.from_numpy(truths).long(),
        )

    def numbers(
        self,
        part: Part | None = None,
        *,
        kinds: Iterable[str] | None = None,
        iterations: Iterable[int] | None = None,
    ) -> NDArray[np.int64]:
        """Numbers of the pairs of a part, of some kinds or iterations; all where nothing is said."""
        kept = None if kinds is None else set(kinds)
        rounds = None if iterations is None else set(iterations)
        found = [
            number
            for number, row in enumerate(self.rows)
            if (part is None or row.part == part)
            and (kept is None or row.origin.kind in kept)
            and (rounds is None or row.origin.iteration in rounds)
        ]
        return np.array(found, dtype=np.int64)

    def newest(self) -> NDArray[np.int64]:
        """Numbers of the pairs of each image's last iteration, for images that were predicted again."""
        last: dict[tuple[str, str], int] = {}
        origins = [row.origin for row in self.rows]
        for origin in origins:
            key = origin.domain, origin.id
            last[key] = max(last.get(key, origin.iteration), origin.iteration)
        found = [i for i, origin in enumerate(origins) if last[origin.domain, origin.id] == origin.iteration]
        return np.array(found, dtype=np.int64)

    def counts(self) -> dict[str, int]:
        """Number of pairs of each kind."""
        return dict(sorted(Counter(row.origin.kind for row in self.rows).items()))

    def fingerprint(self) -> str:
        """SHA-256 over all manifests, which hold the digests of all pairs."""
        whole = hashlib.sha256()
        for folder in self.folders:
            whole.update(hashlib.sha256((folder / MANIFEST).read_bytes()).digest())
        return whole.hexdigest()

    def _read(self, folder: Path) -> None:
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise DataError(str(path), why=f"expected '{FORMAT}', version {VERSION}")
            classes, shape = int(content["classes"]), tuple(int(size) for size in content["shape"])
            rows = [PairRow(**{**row, "origin": PairOrigin(**row["origin"])}) for row in content["pairs"]]
            files = [folder / Path(shard["file"]).name for shard in content["shards"]]
            sound = all(0 <= row.shard < len(files) for row in rows)
            provenance = dict(content["provenance"])
        except FileNotFoundError as error:
            raise DataError(
                str(folder), why=f"it has no {MANIFEST}", do="make the pairs again; they are unfinished"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                str(path), why=f"damaged manifest ({error})", do="make the pairs again"
            ) from error
        if not sound:
            raise DataError(str(path), why="a pair lies in a shard that is not listed", do="make them again")
        if self.classes and rows and (classes, shape) != (self.classes, self.shape):
            raise DataError(
                str(folder),
                why=f"{classes} classes of {shape}, the pairs before have {self.classes} of {self.shape}",
            )
        if rows:
            self.classes, self.shape = classes, shape
        first = len(self._files)
        self._files += files
        self.rows += [replace(row, shard=row.shard + first) for row in rows] if first else rows
        self.provenance.append(provenance)

    def _arrays(self, shard: int) -> CachedArrays:
        if shard not in self._open:
            path = self._files[shard]
            try:
                self._open[shard] = open_entry(path)
            except (OSError, DamagedEntry) as error:
                raise DataError(
                    str(path), why=f"damaged shard ({error})", do="make the pairs again"
                ) from error
        return self._open[shard]

    def _check_subjects(self) -> None:
        parts: dict[str, Part] = {}
        for row in self.rows:
            for subject in (row.subject, row.origin.partner):
                if subject and parts.setdefault(subject, row.part) != row.part:
                    raise DataError(
                        "pairs",
                        case=row.id,
                        why=f"subject {subject} is in {parts[subject]} and in {row.part}",
                        do="use one split in all iterations",
                    )


def draw(
    numbers: NDArray[np.int64], size: int, *, seed: int, step: int, rank: int = 0, world: int = 1
) -> NDArray[np.int64]:
    """Numbers for one training step: passes over all in an order of their own, one after the other.

    Args:
        numbers: To draw from, such as `PairSet.numbers("train")`.
        size: Of the batch of a rank.
        seed: Of the orders.
        step: From 0; any step can be asked for, so that a resumed run draws the same.
        rank: Of this process; ranks divide each step's ``size * world`` numbers among them.
        world: Number of processes.

    Raises:
        DataError: There is nothing to draw from.

    >>> draw(np.arange(4), 2, seed=0, step=1).shape
    (2,)
    """
    count = len(numbers)
    if count == 0:
        raise DataError("pairs", why="no pair to draw from", do="make more pairs, or split them otherwise")
    first = (step * world + rank) * size
    places = np.arange(first, first + size)
    drawn = np.empty(size, dtype=np.int64)
    for epoch in np.unique(places // count):
        order = numpy_generator(seed, "pairs", int(epoch)).permutation(count)
        at = places // count == epoch
        drawn[at] = numbers[order[places[at] % count]]
    return drawn


def _bytes_of_image(image: Tensor) -> NDArray[np.uint8]:
    if image.dtype != torch.uint8:
        image = image.detach().float().clamp(0.0, 1.0).mul(255.0).round().to(torch.uint8)
    return np.ascontiguousarray(image.cpu().numpy())
