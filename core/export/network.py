"""What can be exported: a network with the meaning of its inputs and outputs, and a phantom to try it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from medrl.core import rng

PHANTOM = 1
"""Version of the drawing of `phantom`; a file says which one its record is about."""
Activation: TypeAlias = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Network:
    """One network of a checkpoint.

    Attributes:
        module: Takes one float32 tensor ``(N, *shape)`` for each input, in the order of `inputs`; gives one
            tensor, or a tuple in the order of `outputs`. `export` sets it to evaluation mode.
        inputs: Shape of one sample of each input, without N, by name.
        weights: The part of `module` whose names of parameters are those of the file; None is `module`.
        outputs: Names of the outputs.
        activation: What makes probabilities of the first output.
        preparation: How an image becomes the input, in one sentence.
        value_range: Smallest and largest usual value of the inputs.
        axes: Names of the axes of the first input behind N and channel, such as ``ZYX``.
        channel_names: Channels of the first input, if they have names.
        label_names: Channels of the first output, if they are labels.
        windows: The network sees windows of an image, which may be larger.
        before: MONAI transforms (``{"_target_": …}``) that do what `preparation` says, from the loaded
            image ``(C, X, Y, Z)`` under the key ``image``; empty if MONAI has none that do.
        after: MONAI transforms that turn probabilities under the key ``pred`` into a label map.
    """

    module: nn.Module
    inputs: Mapping[str, tuple[int, ...]]
    weights: nn.Module | None = None
    outputs: Sequence[str] = ("logits",)
    activation: Activation = "softmax"
    preparation: str = ""
    value_range: tuple[float, float] = (0.0, 1.0)
    axes: str = ""
    channel_names: Sequence[str] = ()
    label_names: Mapping[str, int] = field(default_factory=dict)
    windows: bool = False
    before: Sequence[Mapping[str, Any]] = ()
    after: Sequence[Mapping[str, Any]] = ()

    def facts(self) -> dict[str, Any]:
        """What goes into the exported file, as plain values."""
        return {
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "outputs": list(self.outputs),
            "activation": self.activation,
            "preparation": self.preparation,
            "value_range": list(self.value_range),
            "axes": self.axes,
            "channel_names": list(self.channel_names),
            "label_names": dict(self.label_names),
            "windows": self.windows,
        }

    def phantoms(self, samples: int = 1) -> tuple[Tensor, ...]:
        """One phantom ``(samples, *shape)`` for each input."""
        return tuple(
            phantom((samples, *shape), seed=number, value_range=self.value_range)
            for number, shape in enumerate(self.inputs.values())
        )

    @torch.no_grad()
    def answers(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What the network says, by the names of its outputs."""
        return named(self.module.eval()(*inputs), self.outputs)


def named(found: Any, outputs: Sequence[str]) -> dict[str, Tensor]:
    """The outputs of a module by name."""
    values = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    return {name: value.detach().float() for name, value in zip(outputs, values, strict=True)}


def phantom(shape: Sequence[int], *, seed: int = 0, value_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """A seeded phantom ``(N, C, *S)``: three soft ellipsoids in noise, other ones in each sample and channel.

    The same numbers on every machine. Without spatial axes, ``(N, F)``, it is noise.

    Args:
        shape: Of the tensor.
        seed: Of the drawing.
        value_range: The values lie in this range.
    """
    generator = rng.numpy_generator(seed, "export", "phantom")
    low, high = value_range
    space = [int(size) for size in shape[2:]]
    found = np.empty(tuple(shape), dtype=np.float32)
    axes = [np.linspace(-1.0, 1.0, size) if size > 1 else np.zeros(1) for size in space]
    for index in np.ndindex(*(int(size) for size in shape[:2])):
        values = 0.2 + 0.05 * generator.standard_normal(space)
        for level in (0.5, 0.25, -0.4):
            centre = generator.uniform(-0.4, 0.4, len(space))
            radius = generator.uniform(0.25, 0.7, len(space))
            parts = np.meshgrid(*axes, indexing="ij", sparse=True) if space else []
            distance = sum(
                (((part - c) / r) ** 2 for part, c, r in zip(parts, centre, radius, strict=True)),
                np.zeros(()),
            )
            values = values + level / (1.0 + np.exp(8.0 * (distance - 1.0)))
        found[index] = low + (high - low) * np.clip(values, 0.0, 1.0)
    return torch.from_numpy(found)
