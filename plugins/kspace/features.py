"""What a compact agent knows of every column, and of the whole image; only acquired lines are used.

| group | of every column |
|-|-|
| lines | acquired, mirror acquired, place, distance from the centre, remaining and taken lines |
| energy | energy of the column and of its mirror, where acquired |
| spectra | energy per column of the magnitude, the class probabilities, their entropy, the predicted image |
| gradient | that of the entropy's derivative, and the drop of entropy that the predicted column would bring |

Of the whole image there are `pooled` features: areas and centroids of the classes, mean entropy, and the
mean of the network's deepest features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.imaging import View

Group: TypeAlias = str

GROUPS: tuple[Group, ...] = ("lines", "energy", "spectra", "gradient", "pooled")
BLIND: tuple[Group, ...] = ("lines",)

FLOOR = 1e-4
"""Energy below which columns look alike."""

DARK = 1e-3
"""Magnitude below which a pixel has no phase."""


class ColumnFeatures:
    """Features of columns and images, with the same names and number for every batch.

    Args:
        cases: Their number of columns and geometry; points are not supported.
        groups: Which groups, see the module; `lines` always take part, and features that need a
            segmentation network vanish without one.
        classes: K of the segmentation network; 0 without one.
        predicts: Whether the network predicts the image.
        deep: Length of its deepest features.

    Attributes:
        names: Names of the F features of a column.
        pooled_names: Names of the G features of the image.
        needs_view: Whether the image is looked at.
        needs_gradient: Whether the derivative of the entropy is.

    Raises:
        ConfigError: A group is unknown, or the lines are points.
    """

    def __init__(
        self,
        cases: Cases,
        *,
        groups: Sequence[Group] = GROUPS,
        classes: int = 0,
        predicts: bool = False,
        deep: int = 0,
    ) -> None:
        unknown = sorted(set(groups) - set(GROUPS))
        if unknown:
            raise ConfigError("features", why=f"unknown: {', '.join(unknown)}", do=", ".join(GROUPS))
        if cases.points:
            raise ConfigError(
                "features of columns",
                why="the lines are points (kz, ky)",
                do="choose whole lines, or another policy",
            )
        self.groups = tuple(group for group in GROUPS if group in groups or group == "lines")
        self.classes = int(classes)
        self.names: list[str] = ["acquired", "mirror", "place", "distance", "remaining", "taken"]
        self.pooled_names: list[str] = []
        if "energy" in groups:
            self.names += ["energy", "mirror_energy"]
        if "spectra" in groups:
            self.names += ["magnitude", *[f"class{k}" for k in range(classes)]]
            self.names += ["entropy"] if classes else []
            self.names += ["prediction"] if predicts else []
        if "gradient" in groups and classes:
            self.names += ["entropy_gradient"] + (["entropy_drop"] if predicts else [])
        if "pooled" in groups and classes:
            self.pooled_names = [f"area{k}" for k in range(classes)]
            self.pooled_names += [f"{axis}{k}" for k in range(1, classes) for axis in ("row", "column")]
            self.pooled_names += ["entropy", *[f"deep{k}" for k in range(deep)]]
        self.needs_view = any(group in groups for group in ("spectra", "gradient", "pooled"))
        self.needs_gradient = "entropy_gradient" in self.names

    @property
    def blind(self) -> bool:
        """Whether nothing of what was measured takes part."""
        return self.groups == BLIND

    @property
    def needs_classes(self) -> bool:
        """Whether the image is segmented."""
        return self.needs_view and self.classes > 0

    def __call__(
        self, cases: Cases, observation: Mapping[str, Tensor], view: View | None
    ) -> dict[str, Tensor]:
        """Compute ``columns`` ``(B, F, W)`` and ``pooled`` ``(B, G)``, float32, of an observation.

        Args:
            cases: The cases that it speaks of.
            observation: ``case``, ``mask``, ``remaining`` and ``taken``.
            view: What is seen of them; `lines` and `energy` do without.
        """
        mask = observation["mask"].to(cases.device)
        rows = self._lines(mask, observation)
        slices = None
        if cases.slices is not None:
            slices = cases.rows("slices", observation["case"].flatten())
        if "energy" in self.groups:
            energy = cases.line_energy[observation["case"].flatten()] * mask
            rows += [_logarithm(energy), _logarithm(_mirrored(energy))]
        pooled: list[Tensor] = []
        if view is not None and self.needs_view:
            seen = _Maps(view, slices)
            rows += self._spectra(seen) if "spectra" in self.groups else []
            rows += self._gradient(seen, mask) if self.needs_gradient else []
            pooled = self._pooled(seen) if self.pooled_names else []
        columns = torch.stack(rows, dim=1)
        if columns.shape[1] != len(self.names):
            raise ConfigError(
                "features",
                why=f"{columns.shape[1]} were found, {len(self.names)} are expected: {', '.join(self.names)}",
                do="use the segmentation network that the features were built for",
            )
        whole = torch.cat(pooled, dim=1) if pooled else columns.new_zeros(len(columns), 0)
        return {"columns": columns, "pooled": whole}

    def _lines(self, mask: Tensor, observation: Mapping[str, Tensor]) -> list[Tensor]:
        width = mask.shape[1]
        place = (torch.arange(width, device=mask.device) - width // 2) / (width / 2)
        acquired = mask.float()
        counts = [observation[name].to(mask.device).view(-1, 1) / width for name in ("remaining", "taken")]
        return [
            acquired,
            _mirrored(acquired),
            place.expand(mask.shape),
            place.abs().expand(mask.shape),
            *[count.float().expand(mask.shape) for count in counts],
        ]

    def _spectra(self, seen: _Maps) -> list[Tensor]:
        maps = [seen.view.magnitude]
        if seen.view.logits is not None:
            maps += [*seen.view.probabilities.unbind(dim=1), seen.view.entropy]
        if seen.view.prediction is not None:
            maps.append(seen.view.prediction)
        return seen.spectra(maps)

    def _gradient(self, seen: _Maps, mask: Tensor) -> list[Tensor]:
        view = seen.view
        if view.gradient is None:
            raise ConfigError("features", why="the derivative of the entropy was not computed")
        rows = seen.spectra([view.gradient])
        if view.prediction is not None:
            # Nearly 0 where the image is: its phase means nothing there.
            image = (
                view.image
                if view.image.is_complex()
                else torch.complex(view.image, torch.zeros_like(view.image))
            )
            phase = torch.view_as_real(image) / (view.magnitude + DARK).unsqueeze(-1)
            # Displacing both maps alike changes no product of their transforms.
            slope, expected = (
                torch.view_as_real(
                    torch.fft.fft(torch.view_as_complex(part.unsqueeze(-1) * phase), norm="ortho")
                )
                for part in (view.gradient, view.prediction)
            )
            change = torch.fft.fftshift(seen.per_column(slope * expected, -3).sum(dim=-1), dim=-1)
            rows.append(torch.asinh(-change) * ~mask)
        return rows

    def _pooled(self, seen: _Maps) -> list[Tensor]:
        # Means over columns, and over rows: what centroids need of the maps.
        sides = [seen.of_classes(seen.view.probabilities.mean(dim=axis)) for axis in (-1, -2)]
        areas = sides[0].mean(dim=-1)
        found = [areas]
        weight = areas[:, 1:] + FLOOR
        places = [torch.linspace(-1.0, 1.0, side.shape[-1], device=areas.device) for side in sides]
        centres = [
            (side[:, 1:] * place).mean(dim=-1) / weight for side, place in zip(sides, places, strict=True)
        ]
        found.append(torch.stack(centres, dim=2).flatten(1))
        found.append(seen.mean(seen.view.entropy))
        if seen.view.deep is not None:
            deep = seen.view.deep
            found.append(seen.over_slices(deep) if deep.ndim == 3 else deep)
        return found


class _Maps:
    """Maps of a view, and their means over what is there."""

    def __init__(self, view: View, slices: Tensor | None) -> None:
        self.view = view
        self._weight = None
        if slices is not None:
            self._weight = slices.float() / slices.sum(dim=1, keepdim=True).clamp_min(1)

    def over_slices(self, values: Tensor) -> Tensor:
        """Mean of ``(B, D, ...)`` over the slices that are there."""
        if self._weight is None:
            return values.mean(dim=1)
        return (values * self._weight.view(*self._weight.shape, *[1] * (values.ndim - 2))).sum(dim=1)

    def of_classes(self, values: Tensor) -> Tensor:
        """Mean of ``(B, K, [D], n)`` over the slices that are there: ``(B, K, n)``."""
        return self.over_slices(values.transpose(1, 2)) if values.ndim == 4 else values

    def per_column(self, values: Tensor, readout: int) -> Tensor:
        """Sum of ``(B, [D], H, W, ...)`` along the readout axis, mean over slices."""
        columns = values.sum(dim=readout)
        return self.over_slices(columns) if values.ndim + readout == 2 else columns

    def mean(self, maps: Tensor) -> Tensor:
        """Mean of ``(B, [D], H, W)`` over pixels: ``(B, 1)``."""
        flat = maps.mean(dim=(-2, -1))
        return (self.over_slices(flat) if flat.ndim == 2 else flat).unsqueeze(1)

    def spectra(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Energy per column of real maps ``(B, [D], H, W)``, on a logarithmic scale: ``(B, W)`` each.

        The transform along the readout keeps the energy of each column, so that it is left out; columns at
        ±k of real maps have equal energies.
        """
        width = int(maps[0].shape[-1])
        half = torch.view_as_real(torch.fft.rfft(torch.stack(list(maps)), norm="ortho"))
        # Along the rows first: that sum runs over memory in its order.
        power = half.square_().sum(dim=-3).sum(dim=-1)
        if power.ndim == 4:
            power = torch.stack([self.over_slices(one) for one in power])
        distance = (torch.arange(width, device=power.device) - width // 2).abs()
        return list(_logarithm(power)[..., distance].unbind())


def _logarithm(energy: Tensor) -> Tensor:
    return torch.log1p(energy / FLOOR) / 4.0


def _mirrored(columns: Tensor) -> Tensor:
    """At column c what lies at the opposite frequency; an even width has none opposite of its first."""
    width = columns.shape[1]
    opposite = (2 * (width // 2) - torch.arange(width, device=columns.device)) % width
    return columns[:, opposite]
