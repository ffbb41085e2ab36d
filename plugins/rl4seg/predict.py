"""Prediction on whole images: resize as in training, one pass, back to the grid of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.adaptation.actors import PixelActor
from medrl.core.checkpoint import Checkpoint, load_into
from medrl.core.errors import CheckpointError, ConfigError
from medrl.core.inference import tta_views
from medrl.core.learned_reward import RewardNet
from medrl.core.types import Volume

from . import parts
from .config import Rl4segConfig
from .data.plan import SamplePlan, prepare_volume, restore_volume, slice_axis
from .scoring import largest_blob as keep_largest

if TYPE_CHECKING:
    from medrl.core.jobs import PredictJob
    from medrl.core.manager import PluginManager
    from medrl.core.predicting import PredictOutcome

_AXES = {"x": 0, "y": 1}


def run(job: PredictJob, *, largest_blob: bool | None = None, tta_axes: str | None = None) -> PredictOutcome:
    """Predict every case of a job; several runs are averaged."""
    return job.run(partial(load, job=job, largest_blob=largest_blob, tta_axes=tta_axes))


def load(
    checkpoint: Checkpoint,
    *,
    job: PredictJob,
    largest_blob: bool | None = None,
    tta_axes: str | None = None,
) -> Rl4segPredictor:
    """Make the predictor of a checkpoint: of a whole loop, or of any stage that trains an actor.

    Raises:
        CheckpointError: It holds no actor.
        ConfigError: ``--tta`` is asked for, and no axis may be mirrored.
    """
    cfg, plan, actor = restore(checkpoint, job.manager)
    blob = cfg.predict.largest_blob if largest_blob is None else largest_blob
    axes = cfg.predict.tta_axes if tta_axes is None else _axes(tta_axes)
    if job.tta and not axes:
        raise ConfigError(
            "--tta",
            why="no axis is named along which a mirrored image is as good as the image",
            do="leave it out, or name one: --tta-axes x",
        )
    net = restore_reward(checkpoint, cfg, plan, job.manager) if job.save_uncertainty else None
    device = _device(job.device)
    return Rl4segPredictor(
        plan,
        actor.to(device),
        net=None if net is None else net.to(device),
        device=device,
        precision=job.precision,
        largest_blob=blob,
        tta_axes=axes,
    )


def restore(checkpoint: Checkpoint, manager: PluginManager) -> tuple[Rl4segConfig, SamplePlan, PixelActor]:
    """Rebuild the config, the plan and the actor of a checkpoint.

    Raises:
        CheckpointError: It lacks them, or the weights do not fit.
    """
    try:
        cfg = Rl4segConfig.model_validate(checkpoint.meta["config"])
        plan = SamplePlan.from_meta(checkpoint.meta["plan"])
        weights = checkpoint.states["actor"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why=f"it holds no actor of rl4seg ({type(error).__name__}: {error})",
            do="use a run of `medrl train rl4seg`, or of its stages source, style and ppo",
        ) from error
    if checkpoint.meta.get("stages_done") == 0:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why="no stage of this run is finished yet, so that its actor has learned nothing",
            do="wait for the first stage, or medrl resume RUN",
        )
    classes = len(plan.label_names)
    network = parts.actor_network(cfg, manager, channels=len(plan.channel_names), classes=classes)
    load_into(network, weights)
    actor = parts.as_actor(cfg, network, classes).eval()
    return cfg, plan, actor.requires_grad_(requires_grad=False)


def restore_reward(
    checkpoint: Checkpoint, cfg: Rl4segConfig, plan: SamplePlan, manager: PluginManager
) -> RewardNet:
    """Rebuild the reward net, with its fitted temperature, of a loop, or beside a PPO stage.

    Raises:
        CheckpointError: There is none.
    """
    net = parts.reward_net(cfg, manager, channels=len(plan.channel_names), classes=len(plan.label_names))
    ready = checkpoint.meta.get("reward_ready", "reward" in checkpoint.states)
    if "reward" in checkpoint.states and ready:
        load_into(net, checkpoint.states["reward"])
    elif cfg.inputs.reward is not None and cfg.inputs.reward.exists():
        parts.load_part(cfg.inputs.reward, "reward", net, "inputs.reward")
    else:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}",
            why="--save-uncertainty maps 1 - reward, and no reward net is in it or beside it",
            do="predict with the run folder of a finished loop",
        )
    return net.eval().requires_grad_(requires_grad=False)


class Rl4segPredictor:
    """Segments images with one policy, taking the most probable label of each pixel.

    Args:
        plan: How training prepared an image.
        actor: The policy.
        net: Judges label maps for `uncertainty`.
        device: Where they compute.
        precision: `fp32`, or autocast to `bf16` or `fp16`.
        largest_blob: Keep only the largest 4-connected blob of foreground.
        tta_axes: Axes that test-time augmentation mirrors.
    """

    def __init__(
        self,
        plan: SamplePlan,
        actor: PixelActor,
        *,
        net: RewardNet | None = None,
        device: torch.device,
        precision: str = "fp32",
        largest_blob: bool = True,
        tta_axes: Sequence[str] = (),
    ) -> None:
        self.plan, self.actor, self.net = plan, actor, net
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.largest_blob = largest_blob
        self.views = tta_views([_AXES[axis] for axis in tta_axes])
        self.label_names: Mapping[str, int] = dict(plan.label_names)
        self.channel_names: Sequence[str] = tuple(plan.channel_names)

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> NDArray[Any]:
        """Return ``(K, X, Y, Z)`` class probabilities on the grid of the input, slice by slice.

        Args:
            volume: An image of any size; a third axis is taken as slices or frames.
            tta: Mean over the mirrored views too.
            overlap: Not used: an image is seen whole.
        """
        del overlap
        prepared = prepare_volume(volume, self.plan)
        views = self.views if tta else self.views[:1]
        found = [self._view(prepared.images, view) for view in views]
        probabilities: NDArray[Any] = restore_volume(torch.stack(found).mean(dim=0).numpy(), prepared)
        return probabilities

    def decode(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(K, X, Y, Z)`` probabilities into an ``(X, Y, Z)`` label map."""
        labels: NDArray[Any] = probabilities.argmax(axis=0).astype(np.uint8)
        if not self.largest_blob:
            return labels
        axis = slice_axis((labels.shape[0], labels.shape[1], labels.shape[2]))
        return np.moveaxis(keep_largest(np.moveaxis(labels, axis, 0)), 0, axis)

    def uncertainty(self, volume: Volume, labels: NDArray[Any]) -> NDArray[np.float32]:
        """Return ``(X, Y, Z)`` 1 - r in [0, 1]: how probable the reward net finds each label wrong.

        Args:
            volume: The image.
            labels: ``(X, Y, Z)`` label map to judge.

        Raises:
            CheckpointError: There is no reward net.
        """
        if self.net is None:
            raise CheckpointError("uncertainty", why="the predictor was made without its reward net")
        prepared = prepare_volume(volume, self.plan)
        asked = prepared.labels_to_network(labels)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            rewards = [
                self.net.reward(
                    torch.from_numpy(mask)[None].to(self.device, torch.int64),
                    image[None].to(self.device),
                ).cpu()
                for mask, image in zip(asked, prepared.images, strict=True)
            ]
        doubt = 1.0 - torch.cat(rewards).float()[:, None]
        found: NDArray[np.float32] = restore_volume(doubt.numpy(), prepared)[0]
        return np.clip(found, 0.0, 1.0)

    @torch.inference_mode()
    def _view(self, images: torch.Tensor, view: Any) -> torch.Tensor:
        """Probabilities ``(Z, K, H, W)`` of one mirrored view, turned back."""
        found = []
        for image in images:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                seen = view.apply(image[None].to(self.device))
                found.append(view.invert(self.actor.probabilities(seen)).float().cpu())
        return torch.cat(found)


def _axes(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    wrong = [word for word in words if word not in _AXES]
    if wrong:
        raise ConfigError("--tta-axes", why=f"'{wrong[0]}' is neither x nor y", do="--tta-axes x")
    return words


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
