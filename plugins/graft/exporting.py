"""The student of a checkpoint, or a teacher, for `medrl model export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from medrl.core.export import Network

from .models import LogitsOnly
from .plans import SamplePlan
from .teachers import restore

if TYPE_CHECKING:
    from medrl.core.checkpoint import Checkpoint
    from medrl.core.manager import PluginManager

_PREPARED = {
    "stats": "z-score of each channel by the statistics of the dataset",
    "mask": "z-score of each channel inside the organ mask",
    "volume": "z-score of each channel over the whole image",
}
_TURN = {"_target_": "Transposed", "indices": [0, 3, 2, 1]}


def networks(checkpoint: Checkpoint, manager: PluginManager) -> dict[str, Network]:
    """Rebuild the network; it takes windows ``(N, C, D, H, W)`` of whole images."""
    _, plan, network = restore(checkpoint, manager)
    before, after = _transforms(plan)
    names = plan.target.names
    return {
        "student": Network(
            module=LogitsOnly(network),
            weights=network,
            inputs={"image": (len(plan.channel_names), *plan.size)},
            activation="softmax" if plan.target.softmax else "sigmoid",
            preparation=f"axes Z, Y, X; {_PREPARED[plan.normalization]}",
            value_range=(-2.0, 4.0),
            axes="ZYX",
            channel_names=plan.channel_names,
            label_names={name: number for number, name in enumerate(names)},
            windows=True,
            before=before,
            after=after,
        )
    }


def _transforms(plan: SamplePlan) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """MONAI transforms, where it has those of the plan: no organ mask, and labels numbered as classes."""
    common = plan.statistics.get("*")
    same = plan.target.softmax and list(plan.target.sets) == [(k,) for k in range(plan.target.channels)]
    if (
        plan.needs_mask
        or not same
        or (plan.normalization == "stats" and (common is None or len(plan.statistics) > 1))
    ):
        return [], []
    scale: dict[str, Any] = {"_target_": "NormalizeIntensityd", "keys": "image", "channel_wise": True}
    if plan.normalization == "stats" and common is not None:
        scale |= {"subtrahend": list(common[0]), "divisor": [value or 1.0 for value in common[1]]}
    before: list[dict[str, Any]] = [{**_TURN, "keys": "image"}, scale]
    after: list[dict[str, Any]] = [
        {**_TURN, "keys": "pred"},
        {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
    ]
    return before, after
