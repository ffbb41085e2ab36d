"""Observers: from the case, mask and counters of an observation to what an agent reads.

Rollouts keep masks only; images and features are made from them when they are needed, and those of the
last step of an environment are remembered, because its reward needed them as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medrl.core.errors import ConfigError
from medrl.plugins.kspace.agent.policy import Needs, Seen
from medrl.plugins.kspace.cases import Cases
from medrl.plugins.kspace.features import ColumnFeatures
from medrl.plugins.kspace.imaging import Imaging, View


class CaseObserver:
    """Sees the acquisitions of some cases.

    Args:
        cases: The cases.
        imaging: Reconstruction and segmentation; none for agents that only need lines.
        features: What column agents read; None for agents that read images.
    """

    def __init__(
        self, cases: Cases, imaging: Imaging | None = None, features: ColumnFeatures | None = None
    ) -> None:
        self.cases = cases
        self.imaging = imaging if imaging is not None else Imaging()
        self.features = features
        self._known: tuple[Tensor, Tensor, View] | None = None

    @property
    def gradient(self) -> bool:
        """Whether views need the derivative of the entropy."""
        return self.features is not None and self.features.needs_gradient

    @property
    def classes(self) -> int:
        """K, the classes of the segmentation network; 0 without one."""
        return self.imaging.classes

    def on(self, cases: Cases) -> CaseObserver:
        """The same observer of other cases."""
        return CaseObserver(cases, self.imaging, self.features)

    def view(
        self,
        case: Tensor,
        mask: Tensor,
        *,
        coil_images: Tensor | None = None,
        segment: bool = True,
        gradient: bool | None = None,
    ) -> View:
        """Look at acquisitions.

        Args:
            case: ``(B,)``.
            mask: ``(B, A)``.
            coil_images: Zero-filled ``(B, [C], [D], H, W)``, if they are known already.
            segment: Run the segmentation network.
            gradient: With the derivative of the entropy; None is as the features need it.
        """
        image = self.imaging.reconstruct(self.cases, case, mask, coil_images)
        if not segment:
            return View(image=image)
        want = self.gradient if gradient is None else gradient
        return self.look(image, case, gradient=want)

    def look(self, image: Tensor, case: Tensor, *, gradient: bool) -> View:
        """Segment images ``(B, [D], H, W)`` of cases ``(B,)``; see `Imaging.look`."""
        del case
        return self.imaging.look(image, self.cases, gradient=gradient)

    def remember(self, case: Tensor, mask: Tensor, view: View) -> None:
        """Keep a view for the next call of `seen` with the same cases ``(B,)`` and masks ``(B, A)``."""
        self._known = (case.clone(), mask.clone(), view)

    def forget(self) -> None:
        """Drop what was remembered: the images may change."""
        self._known = None

    def features_of(self, observation: Mapping[str, Tensor]) -> Seen:
        """The features of an observation, whatever agent reads them.

        Raises:
            ConfigError: The observer has none.
        """
        blind = self.features is not None and self.features.blind
        return self.seen(observation, "lines" if blind else "features")

    def seen(self, observation: Mapping[str, Tensor], needs: Needs) -> Seen:
        """What an agent with these needs reads of an observation; see `LineAgent.needs`.

        Raises:
            ConfigError: The observer has no features, and the agent reads them.
        """
        if needs != "image" and "columns" in observation:
            return observation
        case, mask = observation["case"].flatten(), observation["mask"].to(torch.bool)
        if needs == "image":
            seen = {"image": _complex(self._look(case, mask, segment=False).image)}
            seen["remaining"] = observation["remaining"]
            if self.cases.slices is not None:
                seen["slices"] = self.cases.rows("slices", case)
            return seen
        if self.features is None or (needs == "lines") != self.features.blind:
            raise ConfigError(
                "observer",
                why=f"the agent needs {needs}, the observer has "
                f"{'none' if self.features is None else ', '.join(self.features.groups)}",
                do="build the observer's features for this agent",
            )
        view = None
        if self.features.needs_view:
            view = self._look(case, mask, segment=self.features.needs_classes)
        return self.features(self.cases, observation, view)

    def _look(self, case: Tensor, mask: Tensor, *, segment: bool) -> View:
        if self._known is not None:
            known_case, known_mask, view = self._known
            enough = not segment or self.imaging.segmenter is None or view.logits is not None
            enough = enough and (not segment or not self.gradient or view.gradient is not None)
            if enough and torch.equal(known_mask, mask) and torch.equal(known_case, case):
                return view
        return self.view(case, mask, segment=segment)


def _complex(image: Tensor) -> Tensor:
    return image if image.is_complex() else torch.complex(image, torch.zeros_like(image))
