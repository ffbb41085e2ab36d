"""Scores of all windows of all volumes, computed when first asked for, once, and kept on disk.

The scorer is frozen and windows lie on a lattice, so that a score is a number to look up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from medrl.core.cache import Cache, make_key
from medrl.core.errors import ConfigError, RuntimeFault
from medrl.plugins.spars.boxsum import integral, lattice_means, scaled_window
from medrl.plugins.spars.lattice import Lattice, Lattices, Size, Start, triple

VERSION = "1"
"""Of what tables on disk hold."""


class WindowScorer(Protocol):
    """What a table asks of a classifier; see `medrl.plugins.spars.scoring.Scorer`."""

    @property
    def kind(self) -> str:
        """Its name in the config."""
        ...

    @property
    def has_dense(self) -> bool:
        """Whether there is a map of voxels."""
        ...

    @property
    def digest(self) -> str:
        """Hash of weights and settings."""
        ...

    def dense(self, volume: Tensor) -> Tensor:
        """Map ``(X, Y, Z)`` of a volume."""
        ...

    def windows(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Scores ``(M,)`` of windows with corners ``(M, 3)``."""
        ...


class ScoreTable:
    """Scores of windows, looked up by volume and corner.

    A scorer with a dense form fills the table of a volume at once. Any other scores the windows that are
    asked for, each of them once, those of all episodes in one batch; if its scores follow from the contents
    of windows alone (it says so as ``local``), those of all volumes too.

    Args:
        volumes: N of ``(X, Y, Z)`` float32; sizes may differ.
        scorer: Frozen.
        window: In voxels.
        stride: In voxels, one number or three.
        start: Where episodes begin; it moves the lattice, see `Lattice.of`.
        ids: N names; numbers if left out.
        cache: Keeps tables on disk; None for memory alone.
        content: N hashes of the volumes as they were prepared; computed here if left out.
        interpolation: How windows are enlarged before they are scored; part of the key.
        scales: Relative sizes of windows about the same centre whose mean scores are averaged; any but
            ``(1.0,)`` needs a dense scorer.
        batch: Windows that are scored at once.
        device: Of the table; that of the first volume if left out.

    Attributes:
        lattices: Of the volumes.
        scored: Windows scored so far by this object; those of a dense form count all of a volume.
    """

    def __init__(
        self,
        volumes: Sequence[Tensor],
        scorer: WindowScorer,
        *,
        window: Sequence[int],
        stride: Sequence[int] | int = 4,
        start: Start = "centre",
        ids: Sequence[str] | None = None,
        cache: Cache | None = None,
        content: Sequence[str] | None = None,
        interpolation: str = "none",
        scales: Sequence[float] = (1.0,),
        batch: int = 64,
        device: torch.device | None = None,
    ) -> None:
        names = tuple(ids) if ids is not None else tuple(str(number) for number in range(len(volumes)))
        if len(names) != len(volumes) or (content is not None and len(content) != len(volumes)):
            raise ConfigError("score table", why=f"{len(volumes)} volumes, {len(names)} names")
        if tuple(scales) != (1.0,) and not scorer.has_dense:
            raise ConfigError(
                f"score.scales {list(scales)}",
                why=f"scores of '{scorer.kind}' have no dense form",
                do="--set score.scales=[1.0]",
            )
        self.volumes, self.scorer, self.ids = list(volumes), scorer, names
        self.window: Size = triple(window, "window")
        self.device = device or (volumes[0].device if volumes else torch.device("cpu"))
        self.lattices = Lattices(
            [Lattice.of(tuple(volume.shape), self.window, stride, start) for volume in volumes], self.device
        )
        self.stride: Size = self.lattices[0].stride
        self.start: Start = start
        self.cache, self.interpolation = cache, interpolation
        self.scales, self.batch = tuple(float(scale) for scale in scales), max(1, int(batch))
        self.scored = 0
        self._content = list(content) if content is not None else [""] * len(self.volumes)
        self._values = torch.full((self.lattices.total,), torch.nan, device=self.device)
        self._opened = torch.zeros(len(self.volumes), dtype=torch.bool)
        self._dirty = torch.zeros(len(self.volumes), dtype=torch.bool)
        self._dense: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.volumes)

    @property
    def fills(self) -> bool:
        """Whether all windows of a volume are scored at once, at little more than the cost of one."""
        return self.scorer.has_dense or callable(getattr(self.scorer, "lattice", None))

    # -- looking up --------------------------------------------------------------------------------

    def scores(self, case: Tensor, corners: Tensor) -> Tensor:
        """Scores ``(E,)`` float32 of windows with corners ``(E, 3)`` in volumes ``(E,)``.

        Raises:
            ConfigError: A corner is not on the lattice.
        """
        return self.at(case, self.lattices.node(case, corners))

    def at(self, case: Tensor, node: Tensor) -> Tensor:
        """Scores ``(...)`` float32 of the windows at nodes ``(..., 3)`` in volumes ``(...)``."""
        where = self.lattices.flat(case, node)
        found = self._values[where]
        missing = found.isnan()
        if bool(missing.any()):
            self._make(case.expand(where.shape)[missing], where[missing])
            found = self._values[where]
        return found

    def full(self, index: int) -> Tensor:
        """Scores of all windows of a volume ``(Lx, Ly, Lz)`` float32."""
        lattice, base = self.lattices[index], int(self.lattices.base[index])
        every = torch.arange(base, base + lattice.size, device=self.device)
        missing = every[self._values[every].isnan()]
        if len(missing):
            self._make(torch.full_like(missing, index), missing)
        return self._values[every].view(lattice.counts)

    def fill(self) -> None:
        """Score every window of every volume."""
        for index in range(len(self)):
            self.full(index)

    def values(self) -> Tensor:
        """All scores so far, of all volumes ``(total,)`` by `Lattices.flat`; NaN where there is none."""
        return self._values

    def dense(self, index: int) -> Tensor | None:
        """The score of every voxel ``(X, Y, Z)`` float32, or None where the scorer has no dense form."""
        if not self.scorer.has_dense:
            return None
        if index not in self._dense:
            self._dense = {index: self.scorer.dense(self.volumes[index]).to(self.device, torch.float32)}
        return self._dense[index]

    def scaled(self, index: int, scales: Sequence[float]) -> Tensor:
        """Mean of the dense score in windows of other sizes about the same centres ``(Lx, Ly, Lz)``.

        Raises:
            ConfigError: The scorer has no dense form.
        """
        dense = self.dense(index)
        if dense is None:
            raise ConfigError(
                "windows of several scales", why=f"scores of '{self.scorer.kind}' have no dense form"
            )
        sums, lattice = integral(dense), self.lattices[index]
        each = [lattice_means(sums, lattice, scaled_window(self.window, scale)) for scale in scales]
        return torch.stack(each).mean(dim=0)

    # -- keeping -----------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """Hash of everything that the scores follow from, of all volumes."""
        return hashlib.sha256("".join(self.key(index) for index in range(len(self))).encode()).hexdigest()

    def key(self, index: int) -> str:
        """Key on disk of the scores of a volume: everything that they follow from."""
        lattice = self.lattices[index]
        params: Mapping[str, Any] = {
            "scorer": self.scorer.digest,
            "kind": self.scorer.kind,
            "window": list(self.window),
            "stride": list(self.stride),
            "offset": list(lattice.offset),
            "shape": list(lattice.shape),
            "interpolation": self.interpolation,
            "scales": list(self.scales),
        }
        return make_key(self._hash(index), params, f"spars-table-{VERSION}")

    def flush(self) -> None:
        """Write to disk what was scored since; windows that another process scored are kept."""
        if self.cache is None:
            return
        for index in torch.nonzero(self._dirty).flatten().tolist():
            values = self._part(index)
            other = self._stored(index)
            if other is not None:
                values.copy_(torch.where(values.isnan(), other, values))
            self.cache.put(self.key(index), {"scores": values.cpu()}, {"id": self.ids[index]})
            self._dirty[index] = False

    # -- private -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _make(self, case: Tensor, where: Tensor) -> None:
        """Score windows by their flat numbers, each once; first look on disk."""
        for index in torch.unique(case).tolist():
            own = torch.unique(where[case == index])
            if not bool(self._opened[index]):
                self._opened[index] = True
                stored = self._stored(index)
                if stored is not None:
                    self._part(index).copy_(stored)
            own = own[self._values[own].isnan()]
            if len(own) and self.fills:
                self._fill_at_once(index)
                case, where = case[case != index], where[case != index]
        todo = torch.unique(where)
        todo = todo[self._values[todo].isnan()]
        if len(todo):
            self._score(todo)

    def _fill_at_once(self, index: int) -> None:
        """Score a volume through the dense form."""
        lattice, volume = self.lattices[index], self.volumes[index]
        if self.scales != (1.0,):
            found = self.scaled(index, self.scales)
        elif self.scorer.has_dense:
            found = self.scorer.windows(volume, lattice.corners(self.device), self.window)
        else:
            whole: Callable[..., Tensor] = self.scorer.lattice  # type: ignore[attr-defined]
            found = whole(volume, self.window, self.stride, lattice.offset)
        self._put(index, torch.arange(lattice.size, device=self.device), found.flatten())
        self.scored += lattice.size
        self._dirty[index] = True
        self.flush()

    def _score(self, todo: Tensor) -> None:
        """Score windows, those of all volumes together where the scorer sees nothing else of them."""
        owner = torch.searchsorted(self.lattices.base, todo, right=True) - 1
        if not getattr(self.scorer, "local", False):
            for index in torch.unique(owner).tolist():
                for flat in torch.split(todo[owner == index], self.batch):
                    inside = flat - self.lattices.base[index]
                    corners = self._corners(index, inside)
                    self._put(index, inside, self.scorer.windows(self.volumes[index], corners, self.window))
                self._dirty[index] = True
        else:
            for flat, of in zip(torch.split(todo, self.batch), torch.split(owner, self.batch), strict=True):
                self._score_together(flat, of)
        self.scored += len(todo)

    def _score_together(self, flat: Tensor, owner: Tensor) -> None:
        """Score windows of several volumes, put behind each other as one volume."""
        wx, wy, wz = self.window
        pieces = []
        for index in torch.unique(owner).tolist():
            corners = self._corners(index, flat[owner == index] - self.lattices.base[index])
            volume = self.volumes[index]
            pieces += [volume[x : x + wx, y : y + wy, z : z + wz] for x, y, z in corners.tolist()]
        line = torch.zeros(len(pieces), 3, dtype=torch.int64, device=self.device)
        line[:, 0] = torch.arange(len(pieces), device=self.device) * wx
        found = self.scorer.windows(torch.cat(pieces), line, self.window)
        for index in torch.unique(owner).tolist():
            self._put(index, flat[owner == index] - self.lattices.base[index], found[owner == index])
            self._dirty[index] = True

    def _corners(self, index: int, inside: Tensor) -> Tensor:
        lattice = self.lattices[index]
        return lattice.corner(lattice.unflat(inside))

    def _put(self, index: int, inside: Tensor, found: Tensor) -> None:
        values = found.detach().to(self.device, torch.float32)
        if values.shape != inside.shape or not bool(torch.isfinite(values).all()):
            raise RuntimeFault(
                f"scores of {self.ids[index]}",
                why=f"{tuple(values.shape)} values, expected {len(inside)} finite ones",
                do="look at the classifier: its training may have diverged",
            )
        self._part(index)[inside] = values

    def _part(self, index: int) -> Tensor:
        base = int(self.lattices.base[index])
        return self._values[base : base + self.lattices[index].size]

    def _stored(self, index: int) -> Tensor | None:
        if self.cache is None:
            return None
        entry = self.cache.get(self.key(index))
        if entry is None:
            return None
        stored = entry.tensor("scores").to(self.device)
        return stored if len(stored) == self.lattices[index].size else None

    def _hash(self, index: int) -> str:
        if not self._content[index]:
            values = self.volumes[index].detach().cpu().contiguous()
            head = f"{tuple(values.shape)} {values.dtype}".encode()
            self._content[index] = hashlib.sha256(head + values.numpy().tobytes()).hexdigest()
        return self._content[index]
