"""What the network's channels mean: nested regions with a sigmoid each, or exclusive classes with a softmax.

Prostate labels are 0 background, 1 benign prostate, 2 cancer, 3 clinically significant cancer.

Source: specification §2; region_converter.py and validation_visualizer.py of the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.core.errors import ConfigError, DataError, did_you_mean

THRESHOLD = 0.5

FAMILIES = ("nnunet", "provicnet", "prostatlasdiff")
"""Conventions of the teachers' stored logits."""


@dataclass(frozen=True)
class Target:
    """The channels of a network and how they become labels.

    Attributes:
        kind: Its name, see `make_target`.
        names: One name for each channel.
        sets: The label values of each channel; with `softmax`, channel 0 is the background.
        softmax: Exclusive classes instead of independent regions.
        focus: Channels that quality and reward look at: cancer in the prostate, otherwise every structure.
        prostate: The labels are those of the prostate, so that the published class weights apply.
    """

    kind: str
    names: tuple[str, ...]
    sets: tuple[tuple[int, ...], ...]
    softmax: bool
    focus: tuple[int, ...]
    prostate: bool = False

    @property
    def channels(self) -> int:
        """Number of network outputs."""
        return len(self.sets)

    @property
    def structures(self) -> tuple[int, ...]:
        """Channels that are no background."""
        return tuple(range(1 if self.softmax else 0, self.channels))

    def encode(self, labels: Tensor) -> Tensor:
        """Turn labels ``(B, D, H, W)`` or ``(B, 1, D, H, W)`` into targets ``(B, C, D, H, W)`` of 0 and 1.

        Raises:
            DataError: A label belongs to no channel (class mode, where every voxel has a class).
        """
        if labels.dim() == 5:
            labels = labels[:, 0]
        channels = [
            torch.isin(labels, torch.tensor(values, dtype=labels.dtype, device=labels.device))
            for values in self.sets
        ]
        target = torch.stack(channels, dim=1)
        if self.softmax and not bool(target.any(dim=1).all()):
            unknown = torch.unique(labels[~target.any(dim=1)]).tolist()
            raise DataError(
                "labels of a batch",
                why=f"values {unknown} belong to no class; known: {[v for s in self.sets for v in s]}",
                do="name every label in dataset.json",
            )
        return target.float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn logits ``(B, C, ...)`` into float32 probabilities of the same shape."""
        logits = logits.float()
        return torch.softmax(logits, dim=1) if self.softmax else torch.sigmoid(logits)

    def decide(self, probabilities: Tensor) -> Tensor:
        """Turn probabilities ``(B, C, ...)`` into hard channels: above 0.5, or the most probable class."""
        if not self.softmax:
            return probabilities > THRESHOLD
        best = probabilities.argmax(dim=1, keepdim=True)
        return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, best, True)

    def decode(self, probabilities: Tensor) -> Tensor:
        """Turn probabilities ``(B, C, ...)`` into labels ``(B, ...)``, int64.

        Regions are written in channel order, the later over the earlier, each with its first label.
        """
        if self.softmax:
            values = torch.tensor([labels[0] for labels in self.sets], device=probabilities.device)
            return values[probabilities.argmax(dim=1)]
        found = torch.zeros(
            (probabilities.shape[0], *probabilities.shape[2:]), dtype=torch.int64, device=probabilities.device
        )
        for channel, labels in enumerate(self.sets):
            found[probabilities[:, channel] > THRESHOLD] = labels[0]
        return found


BINARY = Target("binary", ("prostate", "cancer"), ((1, 2, 3), (2, 3)), False, (1,), True)
THREE_CLASS = Target(
    "3class", ("prostate", "cancer", "significant_cancer"), ((1, 2, 3), (2, 3), (3,)), False, (1, 2), True
)

BINARY_CLASSES = Target(
    "binary_classes", ("background", "prostate", "cancer"), ((0,), (1,), (2, 3)), True, (2,), True
)


def nested(labels: Mapping[str, int]) -> Target:
    """Nested regions of any label set: channel k holds the k-th label and all after it.

    >>> nested({"background": 0, "organ": 1, "tumour": 2}).sets
    ((1, 2), (2,))
    """
    names, values = _foreground(labels)
    sets = tuple(tuple(values[k:]) for k in range(len(values)))
    return Target("nested", tuple(names), sets, False, tuple(range(len(values))))


def separate(labels: Mapping[str, int]) -> Target:
    """One sigmoid channel for each label.

    >>> separate({"background": 0, "anterior": 1, "posterior": 2}).sets
    ((1,), (2,))
    """
    names, values = _foreground(labels)
    return Target("separate", tuple(names), tuple((v,) for v in values), False, tuple(range(len(values))))


def classes(labels: Mapping[str, int]) -> Target:
    """One softmax class for each label, the background first.

    >>> classes({"background": 0, "anterior": 1, "posterior": 2}).sets
    ((0,), (1,), (2,))
    """
    names, values = _foreground(labels)
    sets = ((0,), *((v,) for v in values))
    focus = tuple(range(1, len(sets)))
    return Target("classes", ("background", *names), sets, True, focus)


def make_target(kind: str, labels: Mapping[str, int] | None = None) -> Target:
    """Make the target of a kind.

    ``binary`` and ``3class`` are prostate regions, ``binary_classes`` the same without regions (background,
    prostate, cancer); ``nested``, ``separate`` and ``classes`` fit any labels.

    Raises:
        ConfigError: The kind is unknown, or needs labels and has none.
    """
    fixed = {target.kind: target for target in (BINARY, THREE_CLASS, BINARY_CLASSES)}
    if kind in fixed:
        return fixed[kind]
    makers = {"nested": nested, "separate": separate, "classes": classes}
    if kind not in makers:
        raise ConfigError(f"target kind '{kind}'", why=did_you_mean(kind, [*fixed, *makers]))
    return makers[kind](labels or {})


def _foreground(labels: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Names and values of all labels but 0, by value.

    Raises:
        ConfigError: There is none, or two names share a value.
    """
    pairs = sorted(((int(value), name) for name, value in labels.items() if int(value) != 0))
    values = [value for value, _ in pairs]
    if not values or min(values) < 0 or len(set(values)) != len(values):
        raise ConfigError(
            "labels of the dataset",
            why=f"expected distinct positive values beside the background, got {dict(labels)}",
        )
    return [name for _, name in pairs], values


def teacher_probabilities(logits: Tensor, target: Target, family: str = "nnunet") -> Tensor:
    """Read a teacher's stored logits ``(B, K, D, H, W)`` as probabilities of the target's channels.

    - ``nnunet``: sigmoid or softmax of the same channels; three regions for a binary target give
      ``[ch0, max(ch1, ch2)]``.
    - ``provicnet``: four softmax classes (background, prostate, cancer, significant cancer) give
      ``[1−p0, p2+p3]`` or ``[1−p0, p2, p3]``, as the original has it.
    - ``prostatlasdiff``: channel 1 of three slices is the centre slice's cancer logit; its probability is
      σ(x) divided by its largest value in the case, divided by 0.2 and clipped to 1. It says nothing about
      the prostate, whose channel is the cancer's too.

    Returns:
        ``(B, C, D, H, W)`` float32 in [0, 1].

    Raises:
        DataError: The channel count does not fit the family and the target.

    Source: specification §1 and §5; dataset/pimedloader_3d_with_features.py of the original.
    """
    logits = logits.float()
    found = logits.shape[1]
    if family == "nnunet":
        if target.kind == "binary" and found == 3:
            logits = torch.cat((logits[:, :1], logits[:, 1:3].amax(dim=1, keepdim=True)), dim=1)
        elif found != target.channels:
            raise _misfit(family, found, target, [target.channels])
        return target.probabilities(logits)
    if family == "provicnet":
        if found != 4 or target.kind not in ("binary", "3class"):
            raise _misfit(family, found, target, [4])
        return _provicnet(torch.softmax(logits, dim=1), target)
    if family == "prostatlasdiff":
        if found != 3 or not target.prostate:
            raise _misfit(family, found, target, [3])
        maps = torch.sigmoid(logits)
        peak = maps.amax(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
        return (maps[:, 1:2] / peak / 0.2).clamp(0.0, 1.0).expand(-1, target.channels, -1, -1, -1)
    raise ConfigError(f"teacher family '{family}'", why=did_you_mean(family, FAMILIES))


def converted(logits: Tensor, have: Target, want: Target) -> Tensor:
    """Turn logits ``(B, K, ...)`` of one target's channels into those of another, by their label values.

    Classes give regions and joined classes exactly, through log-sum-exp; regions give regions: one of the
    same values, or the largest of several that make it up.

    Raises:
        DataError: The labels of `want` cannot be told from those of `have`.
    """
    if (have.softmax, have.sets) == (want.softmax, want.sets):
        return logits
    channels = []
    for wanted in want.sets:
        inside = [k for k, values in enumerate(have.sets) if set(values) <= set(wanted)]
        exact = [k for k in inside if set(have.sets[k]) == set(wanted)]
        known = {value for k in inside for value in have.sets[k]}
        if known != set(wanted) or (want.softmax and not have.softmax):
            raise DataError(
                "logits of a teacher",
                why=f"it tells {_listed(have)} apart, the student {_listed(want)}",
                do="choose another target.kind, or other teachers",
            )
        if not have.softmax:
            channels.append(logits[:, exact[:1] or inside].amax(dim=1))
            continue
        joined = logits[:, inside].float().logsumexp(dim=1)
        if not want.softmax:
            outside = [k for k in range(len(have.sets)) if k not in inside]
            joined = joined - logits[:, outside].float().logsumexp(dim=1)
        channels.append(joined)
    return torch.stack(channels, dim=1)


def teacher_threshold(family: str) -> float:
    """The probability above which a teacher of this family calls a voxel cancer."""
    return 0.1 if family == "prostatlasdiff" else THRESHOLD


def _provicnet(p: Tensor, target: Target) -> Tensor:
    prostate, cancer, significant = 1.0 - p[:, 0], p[:, 2], p[:, 3]
    if target.channels == 2:
        return torch.stack((prostate, cancer + significant), dim=1)
    return torch.stack((prostate, cancer, significant), dim=1)


def _listed(target: Target) -> str:
    kind = "classes" if target.softmax else "regions"
    return f"{kind} {', '.join(str(set(values)) for values in target.sets)}"


def _misfit(family: str, found: int, target: Target, expected: Sequence[int]) -> DataError:
    return DataError(
        f"logits of a {family} teacher",
        why=f"{found} channels, expected {' or '.join(map(str, expected))} for a {target.kind} target "
        f"({', '.join(target.names)})",
        do="extract the features again with the target of this student",
    )
