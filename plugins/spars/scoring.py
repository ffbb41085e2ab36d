"""Scores of windows: what a trained classifier says of any place in a volume.

Dense scorers have a map of voxels, from which the scores of all windows of all sizes follow by box sums.
Networks score windows one by one; the compact one has a dense form too, whose cells are averaged.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.checkpoint import load_into
from medrl.core.errors import ConfigError

from .boxsum import integral, window_means
from .mil.features import cell_features, to_voxels
from .mil.gate import Statistic, gated
from .mil.maps import CellNetwork, ClusterMap, map_of
from .mil.windows import cut
from .models.compact import BEYOND, MARGIN, STRIDE, CompactNet, check_window
from .models.faithful import INPUT, FaithfulNet, FusedFaithfulNet

Size = tuple[int, int, int]
Reduce = Literal["mean", "max"]

_TOP = 8
"""Cells whose mean is the score of a whole volume."""
_PRESENT = 1


@runtime_checkable
class Scorer(Protocol):
    """What a trained classifier offers; all of them are `torch.nn.Module` too.

    Attributes:
        kind: ``fraction``, ``presence``, ``compact`` or ``faithful``.
        has_dense: Whether there is a map of voxels.
        reduce: With a dense map, what a window's score is of the voxels in it: their mean or their maximum.
        label_source: What it was learned from, ``image`` or ``crop``.
    """

    kind: str
    has_dense: bool
    reduce: Reduce
    label_source: str

    @property
    def digest(self) -> str:
        """SHA-256 of weights and settings."""
        ...

    def dense(self, volume: Tensor) -> Tensor:
        """Map ``(X, Y, Z)`` float32 in [0, 1] of a volume ``(X, Y, Z)``.

        Raises:
            ConfigError: There is none for this kind.
        """
        ...

    def windows(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Scores ``(M,)`` float32 in [0, 1] of windows with minimum corners ``(M, 3)`` in voxels."""
        ...

    def image_score(self, volume: Tensor) -> float:
        """A number that is the higher the likelier the volume holds the object."""
        ...

    def settings(self) -> dict[str, Any]:
        """Plain values from which `build_scorer` makes it again, given its state."""
        ...


class ScorerModule(nn.Module, ABC):
    """Base of all scorers.

    Args:
        label_source: What it is learned from.

    Attributes:
        ready: 1 once everything is trained; a buffer, so that it is in the state.
        image_midpoint, image_temperature: Turn the score of a whole volume into a probability.
    """

    kind: ClassVar[str]
    has_dense: ClassVar[bool]
    reduce: ClassVar[Reduce] = "mean"
    ready: Tensor
    image_midpoint: Tensor
    image_temperature: Tensor

    def __init__(self, label_source: str = "image") -> None:
        super().__init__()
        self.label_source = label_source
        self.register_buffer("ready", torch.zeros((), dtype=torch.int64))
        self.register_buffer("image_midpoint", torch.tensor(0.5))
        self.register_buffer("image_temperature", torch.tensor(1.0))

    @property
    def digest(self) -> str:
        """SHA-256 of weights and settings."""
        whole = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            array = value.detach().cpu().contiguous()
            whole.update(f"{name}\0{tuple(array.shape)}\0{array.dtype}\0".encode())
            whole.update(array.numpy().tobytes())
        return whole.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.ready.device

    def settings(self) -> dict[str, Any]:
        """Plain values from which `build_scorer` makes it again, given its state."""
        return {"kind": self.kind, "label_source": self.label_source}

    def dense(self, volume: Tensor) -> Tensor:
        """Map of voxels; see `Scorer`.

        Raises:
            ConfigError: There is none for this kind.
        """
        del volume
        raise ConfigError(
            f"classifier.kind {self.kind}",
            why="it scores windows, and has no map of voxels",
            do="--set map.paint=coarse, or --set classifier.kind=fraction",
        )

    def windows(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Scores of windows; see `Scorer`. This one takes them from the dense map."""
        found = self.dense(volume)
        corners = corners.to(found.device)
        if self.reduce == "max":
            return window_maxima(found, corners, window)
        return window_means(integral(found), corners, window)

    @abstractmethod
    def image_score(self, volume: Tensor) -> float:
        """A number that is the higher the likelier the volume holds the object."""

    def image_probability(self, volume: Tensor) -> float:
        """Calibrated probability that a volume holds the object."""
        logit = (self.image_score(volume) - float(self.image_midpoint)) / float(self.image_temperature)
        return float(torch.sigmoid(torch.tensor(logit)))


class PresenceScorer(ScorerModule):
    """The map that labels of images teach directly; a window has its maximum, which saturates.

    Args:
        presence: `ClusterMap` or `CellNetwork`.
        cell: Voxels of a cell.
        label_source: What it is learned from.
    """

    kind = "presence"
    has_dense = True
    reduce = "max"

    def __init__(
        self, presence: ClusterMap | CellNetwork, *, cell: Size = (2, 2, 2), label_source: str = "image"
    ) -> None:
        super().__init__(label_source)
        self.presence = presence
        self.cell = _size(cell)

    def settings(self) -> dict[str, Any]:
        """Plain values; see `Scorer`."""
        return {**super().settings(), "cell": list(self.cell), "presence": map_settings(self.presence)}

    @torch.no_grad()
    def presence_cells(self, features: Tensor) -> Tensor:
        """Presence of all cells, from their features."""
        return map_of(self.presence, features)

    @torch.no_grad()
    def dense(self, volume: Tensor) -> Tensor:
        """Presence of all voxels, cut off at 0 and 1."""
        volume = volume.to(self.device)
        cells = self.presence_cells(cell_features(volume, self.cell))
        return to_voxels(cells, volume.shape, self.cell).clamp(0.0, 1.0)

    def image_score(self, volume: Tensor) -> float:
        """Mean presence of the eight likeliest cells."""
        cells = self.presence_cells(cell_features(volume.to(self.device), self.cell))
        return top_mean(cells)


class FractionScorer(ScorerModule):
    """How much of each cell the object fills; a window has the mean, which tells how full it is.

    Args:
        head: Tells the fraction of a cell.
        presence: Decides which components are kept; None takes the fraction itself.
        cell: Voxels of a cell.
        component: Fraction above which components are formed.
        statistic: What the gate asks of the presence in a component.
        label_source: What it is learned from.

    Attributes:
        teacher: The head of the round before, whose pseudo-masks the present one learns from.
        level: Presence that a component must reach; negative switches the gate off.
        round: Rounds of pseudo-masks that are done.
    """

    kind = "fraction"
    has_dense = True
    level: Tensor
    round: Tensor

    def __init__(
        self,
        head: CellNetwork,
        presence: ClusterMap | CellNetwork | None,
        *,
        cell: Size = (2, 2, 2),
        component: float = 0.3,
        statistic: Statistic = "peak",
        label_source: str = "image",
    ) -> None:
        super().__init__(label_source)
        self.statistic: Statistic = statistic
        self.head = head
        self.teacher = CellNetwork(head_widths(head), features=head.mean.numel())
        self.teacher.requires_grad_(requires_grad=False)
        self.presence = presence
        self.cell = _size(cell)
        self.component = component
        self.register_buffer("level", torch.tensor(-1.0))
        self.register_buffer("round", torch.zeros((), dtype=torch.int64))

    def settings(self) -> dict[str, Any]:
        """Plain values; see `Scorer`."""
        return {
            **super().settings(),
            "cell": list(self.cell),
            "component": self.component,
            "statistic": self.statistic,
            "widths": list(head_widths(self.head)),
            "presence": None if self.presence is None else map_settings(self.presence),
        }

    @torch.no_grad()
    def maps(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Fraction without the gate, and presence, both ``(X, Y, Z)``."""
        volume = volume.to(self.device)
        features = cell_features(volume, self.cell)
        fraction = to_voxels(map_of(self.head, features), volume.shape, self.cell)
        if self.presence is None:
            return fraction, fraction
        return fraction, to_voxels(map_of(self.presence, features), volume.shape, self.cell)

    @torch.no_grad()
    def dense(self, volume: Tensor) -> Tensor:
        """Fraction of all voxels after the gate."""
        fraction, presence = self.maps(volume)
        if float(self.level) < 0.0:
            return fraction
        return gated(
            fraction, presence, float(self.level), component=self.component, statistic=self.statistic
        )

    @torch.no_grad()
    def image_score(self, volume: Tensor) -> float:
        """Mean of the eight fullest cells, without the gate."""
        return top_mean(map_of(self.head, cell_features(volume.to(self.device), self.cell)))


class CompactScorer(ScorerModule):
    """A compact network; windows are scored from crops with their margin, or all at once.

    Args:
        network: Gives logits of cells.
        batch: Crops at once.
        label_source: What it is learned from.

    Attributes:
        temperature: Logits of windows are divided by it.
    """

    kind = "compact"
    has_dense = False
    temperature: Tensor

    def __init__(self, network: CompactNet, *, batch: int = 64, label_source: str = "image") -> None:
        super().__init__(label_source)
        self.network = network
        self.batch = batch
        self.register_buffer("temperature", torch.tensor(1.0))

    def settings(self) -> dict[str, Any]:
        """Plain values; see `Scorer`."""
        channels = [int(conv.out_channels) for conv in self.network.convs if isinstance(conv, nn.Conv3d)]
        return {**super().settings(), "channels": channels}

    def probabilities(self, logits: Tensor) -> Tensor:
        """Scores of logits ``(..., 2)``."""
        return torch.softmax(logits.float() / self.temperature, dim=-1)[..., _PRESENT]

    def window_logits(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Logits ``(M, 2)`` of windows, with gradients, for training.

        Beyond the border of the volume there are zeros in the image, and not in every layer as in scoring.
        """
        cells = check_window(window)
        first = MARGIN // STRIDE
        maps = self.network.cells(cut(volume, corners, window, margin=MARGIN)[:, None])
        inner = maps[:, :, first : first + cells[0], first : first + cells[1], first : first + cells[2]]
        return inner.float().mean(dim=(2, 3, 4))

    @torch.no_grad()
    def lattice(self, volume: Tensor, window: Size, stride: Size, offset: Size = (0, 0, 0)) -> Tensor:
        """Scores ``(Lx, Ly, Lz)`` of all windows with corners ``offset + stride * n``, from one dense pass.

        Equal to `windows` of the same corners. Where stride or offset are not multiples of 4 the volume is
        passed once for each remainder.
        """
        shape = volume.shape
        counts = [(shape[k] - window[k] - offset[k]) // stride[k] + 1 for k in range(3)]
        axes = [torch.arange(counts[k]) * stride[k] + offset[k] for k in range(3)]
        corners = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).view(-1, 3)
        return self._from_cells(volume, corners, window).view(*counts)

    @torch.no_grad()
    def windows(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Scores of windows, each from a crop with a margin; see `Scorer`."""
        cells = check_window(window)
        volume = volume.to(self.device, torch.float32)
        corners = corners.cpu()
        found = torch.empty(len(corners), device=self.device)
        with evaluating(self.network):
            for rows, low, high in _crops(corners, window, volume.shape):
                for part in torch.split(rows, self.batch):
                    first = corners[part] - torch.tensor(low)
                    crops = cut(volume, first, [a + w + b for a, w, b in zip(low, window, high, strict=True)])
                    maps = self.network.cells(crops[:, None])
                    at = [value // STRIDE for value in low]
                    inner = maps[
                        :, :, at[0] : at[0] + cells[0], at[1] : at[1] + cells[1], at[2] : at[2] + cells[2]
                    ]
                    found[part] = self.probabilities(inner.float().mean(dim=(2, 3, 4)))
        return found

    @torch.no_grad()
    def image_score(self, volume: Tensor) -> float:
        """Highest mean logit of 4³ cells anywhere."""
        with evaluating(self.network):
            maps = self.network.cells(volume.to(self.device, torch.float32)[None, None])[0].float()
        difference = maps[_PRESENT] - maps[1 - _PRESENT]
        size = [min(4, int(n)) for n in difference.shape]
        return float(F.avg_pool3d(difference[None, None], size, stride=1).max() / self.temperature)

    def _from_cells(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        cells = check_window(window)
        volume = volume.to(self.device, torch.float32)
        corners = corners.to(self.device)
        found = torch.empty(len(corners), device=self.device)
        shifts = corners % STRIDE
        with evaluating(self.network):
            for shift in torch.unique(shifts, dim=0):
                rows = (shifts == shift).all(dim=1).nonzero().flatten()
                x, y, z = shift.tolist()
                maps = self.network.cells(volume[None, None, x:, y:, z:])[0]
                at = (corners[rows] - shift) // STRIDE
                means = [window_means(integral(part), at, cells) for part in maps]
                found[rows] = self.probabilities(torch.stack(means, dim=-1))
        return found


class FaithfulScorer(ScorerModule):
    """The network of the original on windows that are enlarged trilinearly, as in its training.

    Args:
        network: Gives two logits.
        enlarge: Size that windows are enlarged to.
        batch: Windows at once.
        dtype: Of the convolutions in scoring.
        label_source: What it is learned from.

    Attributes:
        temperature: Logits are divided by it.
        local: A score follows from the contents of its window alone.
    """

    kind = "faithful"
    has_dense = False
    local: ClassVar[bool] = True
    temperature: Tensor

    def __init__(
        self,
        network: FaithfulNet,
        *,
        enlarge: Size = INPUT,
        batch: int = 2,
        dtype: torch.dtype = torch.float32,
        label_source: str = "image",
    ) -> None:
        super().__init__(label_source)
        self.network = network
        self.enlarge = _size(enlarge)
        self.batch = batch
        self.dtype = dtype
        self.register_buffer("temperature", torch.tensor(1.0))

    def settings(self) -> dict[str, Any]:
        """Plain values; see `Scorer`."""
        return {**super().settings(), "enlarge": list(self.enlarge)}

    def window_logits(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Logits ``(M, 2)`` of windows, with gradients, for training."""
        found: Tensor = self.network(self.enlarged(cut(volume, corners, window)))
        return found

    def enlarged(self, crops: Tensor) -> Tensor:
        """Crops ``(M, X, Y, Z)`` as the network takes them, ``(M, 1, *enlarge)``."""
        if tuple(crops.shape[1:]) == self.enlarge:
            return crops[:, None]
        return F.interpolate(crops[:, None], size=self.enlarge, mode="trilinear", align_corners=False)

    @torch.no_grad()
    def windows(self, volume: Tensor, corners: Tensor, window: Size) -> Tensor:
        """Scores of windows; see `Scorer`."""
        volume = volume.to(self.device, torch.float32)
        fused = FusedFaithfulNet(self.network, self.dtype)
        parts = [
            torch.softmax(fused(self.enlarged(cut(volume, part, window))) / self.temperature, dim=1)
            for part in torch.split(corners.cpu(), self.batch)
        ]
        return torch.cat(parts)[:, _PRESENT] if parts else torch.empty(0, device=self.device)

    def image_score(self, volume: Tensor) -> float:
        """Highest score among eight octants of the volume."""
        window = _size([max(1, size // 2) for size in volume.shape])
        ends = [(0, size - part) for size, part in zip(volume.shape, window, strict=True)]
        corners = torch.cartesian_prod(*(torch.tensor(end) for end in ends))
        return float(torch.logit(self.windows(volume, corners, window), eps=1e-6).max())


def build_scorer(config: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> ScorerModule:
    """Make a scorer of its settings, and fill it.

    Args:
        config: What `Scorer.settings` gave.
        state: Its state; None leaves new weights.

    Raises:
        ConfigError: The kind is unknown.
        CheckpointError: The state does not fit.
    """
    kind = str(config["kind"])
    source = str(config.get("label_source", "image"))
    made: ScorerModule
    if kind == "presence":
        made = PresenceScorer(build_map(config["presence"]), cell=_size(config["cell"]), label_source=source)
    elif kind == "fraction":
        presence = config["presence"]
        made = FractionScorer(
            CellNetwork([int(width) for width in config["widths"]]),
            None if presence is None else build_map(presence),
            cell=_size(config["cell"]),
            component=float(config["component"]),
            statistic="share" if config.get("statistic") == "share" else "peak",
            label_source=source,
        )
    elif kind == "compact":
        channels = [int(size) for size in config["channels"]]
        made = CompactScorer(CompactNet(channels=channels), label_source=source)
    elif kind == "faithful":
        made = FaithfulScorer(FaithfulNet(), enlarge=_size(config["enlarge"]), label_source=source)
    else:
        raise ConfigError(
            f"classifier.kind {kind}", why="unknown", do="fraction, presence, compact or faithful"
        )
    if state is not None:
        load_into(made, state)
    return made.eval()


def map_settings(network: ClusterMap | CellNetwork) -> dict[str, Any]:
    """Plain values from which `build_map` makes a presence map again."""
    if isinstance(network, ClusterMap):
        runs, clusters = network.z.shape
        return {"runs": int(runs), "clusters": int(clusters), "full_scale": network.full_scale}
    return {"widths": list(head_widths(network))}


def build_map(settings: Mapping[str, Any]) -> ClusterMap | CellNetwork:
    """Make a presence map with empty weights."""
    if "clusters" in settings:
        scale = float(settings["full_scale"])
        return ClusterMap(int(settings["runs"]), int(settings["clusters"]), full_scale=scale)
    return CellNetwork([int(width) for width in settings["widths"]])


def head_widths(network: CellNetwork) -> tuple[int, ...]:
    """Hidden layers of a cell network."""
    layers = [layer for layer in network.layers if isinstance(layer, nn.Linear)]
    return tuple(int(layer.out_features) for layer in layers[:-1])


def top_mean(cells: Tensor, count: int = _TOP) -> float:
    """Mean of the highest cells."""
    return float(cells.flatten().topk(min(count, cells.numel())).values.mean())


def window_maxima(dense: Tensor, corners: Tensor, window: Sequence[int]) -> Tensor:
    """Maxima ``(M,)`` of a map ``(X, Y, Z)`` in windows with minimum corners ``(M, 3)``."""
    found = dense[None, None]
    for axis in range(3):
        kernel = [1, 1, 1]
        kernel[axis] = int(window[axis])
        found = F.max_pool3d(found, kernel, stride=1)
    x, y, z = corners.unbind(dim=-1)
    return found[0, 0, x, y, z]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch a network to evaluation, and back."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


# -- private -----------------------------------------------------------------------------------------


def _size(values: Sequence[int]) -> Size:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _crops(
    corners: Tensor, window: Size, shape: Sequence[int]
) -> Iterator[tuple[Tensor, list[int], list[int]]]:
    """Groups of windows with the same margins: rows, margin below and above, in voxels.

    The margin is 8 voxels before and 4 behind, or what the volume has, in whole cells on the lattice of the
    corner; at the upper end an incomplete cell, which the dense form leaves out too, may be there.
    """
    below = torch.minimum(corners - corners % STRIDE, torch.tensor(MARGIN))
    left = torch.tensor([int(size) for size in shape]) - corners - torch.tensor(list(window))
    above = left.clamp(max=BEYOND)
    margins = torch.cat([below, above], dim=1)
    kinds, group = torch.unique(margins, dim=0, return_inverse=True)
    for number, kind in enumerate(kinds.tolist()):
        yield (group == number).nonzero().flatten(), kind[:3], kind[3:]
