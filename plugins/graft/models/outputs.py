"""What a student network returns: logits from high to low resolution, and the features that are distilled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from medrl.core.errors import ConfigError


class StudentOutput(NamedTuple):
    """The result of one forward pass.

    Attributes:
        logits: From full resolution down, each ``(B, C, D', H', W')``; one without deep supervision.
        features: Taps by name: ``neg1`` ``(B, F1, D, H, W)`` and ``neg2`` ``(B, F2, D', H', W')``.
    """

    logits: list[Tensor]
    features: dict[str, Tensor]

    @property
    def main(self) -> Tensor:
        """Logits at full resolution ``(B, C, D, H, W)``."""
        return self.logits[0]


def as_output(result: Any) -> StudentOutput:
    """Read the result of any segmentation network as a `StudentOutput`.

    Networks of other plugins return a tensor, or a list of tensors from high to low resolution; they have
    no taps, so feature distillation with them is refused where the taps are asked for.

    Raises:
        ConfigError: The network returns something else, as one that judges whole images does.
    """
    if isinstance(result, StudentOutput):
        return result
    scales = [result] if isinstance(result, Tensor) else result
    if isinstance(scales, (list, tuple)) and scales and all(isinstance(item, Tensor) for item in scales):
        if all(item.ndim == 5 for item in scales):
            return StudentOutput(list(scales), {})
        found = f"shapes {[tuple(item.shape) for item in scales]}, not logits of every voxel"
    else:
        found = f"{type(result).__name__}, not logits"
    raise ConfigError(
        "model of the student",
        why=f"its forward returned {found}",
        do="choose a segmentation model, for example --set model.name=graft.tiny",
    )


def tap(output: StudentOutput, name: str) -> Tensor:
    """Return the features of one tap.

    Raises:
        ConfigError: The student has no such tap.
    """
    if name not in output.features:
        have = ", ".join(sorted(output.features)) or "none"
        raise ConfigError(
            f"features '{name}' of the student",
            why=f"the model offers: {have}",
            do="choose a graft model, or distil logits only",
        )
    return output.features[name]


class LogitsOnly(nn.Module):
    """A network that returns only the logits at full resolution, as sliding-window inference wants them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Return ``(B, C, D, H, W)`` logits."""
        return as_output(self.network(image)).main


@contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of some modules during one forward pass.

    The hooks live only inside the block, so that copies of a network never share them.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
