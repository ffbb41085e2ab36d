"""From the frames of a sequence to probabilities and reward maps, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medrl.core.errors import RuntimeFault

from ..tta import IDENTITY, MeanOfViews, View, views
from ..windows import Blend, Blender, plan_time, weight_map

Windowed = Callable[[Tensor, Tensor], Tensor]
"""Images `(N, 1, X, Y, 4)` and labels `(N, X, Y, 4)` to what is blended, `(N, X, Y, 4)`."""


class Segmenter:
    """Runs networks over sequences; what it holds does not grow with their length.

    All views of a window are done before the next window, and a frame leaves as soon as no further window
    sees it.

    Args:
        device: Where networks run.
        dtype: Precision of their forward pass; None for float32.
        blend: How windows are joined.
        batch: Views in one call of a network.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        blend: Blend = "gaussian",
        batch: int = 1,
    ) -> None:
        self.device, self.dtype, self.blend, self.batch = device, dtype, blend, batch

    @torch.inference_mode()
    def probabilities(
        self, network: nn.Module, images: Tensor, *, tta: bool
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Predict a sequence.

        Args:
            network: Gives logits `(N, K, X, Y, 4)` of `(N, 1, X, Y, 4)`.
            images: `(X, Y, T)`.
            tta: Mean over 25 views instead of the plain one.

        Yields:
            `(frame, probabilities (K, X, Y))`, in order.

        Raises:
            RuntimeFault: The network gives values that are not finite.
        """
        width, height, length = images.shape
        chosen: tuple[View, ...] = views(width, height) if tta else (IDENTITY,)
        plan = plan_time(length)
        weights = weight_map(width, height, self.blend).to(self.device)
        blenders = [Blender(weights, plan) for _ in chosen]
        gather = MeanOfViews(chosen, width, height)
        network = network.eval()
        for start in plan.starts:
            window = images[..., plan.window(start)].to(self.device)[None]
            done: dict[int, Tensor] = {}
            for first in range(0, len(chosen), self.batch):
                some = chosen[first : first + self.batch]
                logits = self.logits(network, torch.stack([view.apply(window) for view in some]))
                if not bool(torch.isfinite(logits).all()):
                    raise RuntimeFault("the network gives NaN or infinite values", do="try --precision fp32")
                for number, (view, output) in enumerate(zip(some, logits, strict=True), start=first):
                    for frame, blended in blenders[number].add(output):
                        turned = view.invert(blended.softmax(dim=0)[..., None])[..., 0]
                        done[frame] = gather.add(done.get(frame), number, turned)
            for frame, mean in done.items():
                yield frame, mean.cpu().numpy()

    @torch.inference_mode()
    def reward(self, judge: Windowed, images: Tensor, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Blend what a judge says of windows of a segmented sequence.

        Args:
            judge: See `Windowed`.
            images: `(X, Y, T)`.
            labels: `(X, Y, T)`.

        Yields:
            `(frame, values (X, Y))`, in order.
        """
        plan = plan_time(images.shape[-1])
        blender = Blender(weight_map(images.shape[0], images.shape[1], self.blend).to(self.device), plan)
        for start in plan.starts:
            frames = plan.window(start)
            window = images[..., frames].to(self.device)[None, None]
            with self._autocast():
                values = judge(window, labels[..., frames].to(self.device, torch.int64)[None])
            for frame, value in blender.add(values.float()):
                yield frame, value[0].cpu()

    def logits(self, network: nn.Module, windows: Tensor) -> Tensor:
        """Return float32 logits of windows, in the precision of this segmenter."""
        with self._autocast():
            found: Tensor = network(windows)
        return found.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def largest_blobs(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep the largest 4-connected blob of foreground of each frame `(X, Y, T)`; an empty frame stays empty.

    Deviation: the original fails on an empty frame, and changes its input on a CPU.
    """
    from scipy import ndimage

    result = np.zeros_like(labels)
    for t in range(labels.shape[-1]):
        pieces, count = ndimage.label(labels[..., t] != 0)
        if count:
            sizes = np.bincount(pieces.ravel())[1:]
            result[..., t] = labels[..., t] * (pieces == 1 + int(sizes.argmax()))
    return result


def fused(rewards: Sequence[Tensor], how: str) -> Tensor:
    """Make one reward of several, each `(…)` in [0, 1]."""
    from medrl.core.learned_reward.net import fuse

    return fuse(torch.stack(list(rewards)), how)  # type: ignore[arg-type]
