"""The actor and critic of the original: a complex convolution, ResNet-18 and the remaining budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.checkpoint import load_foreign, load_into
from medrl.core.errors import ConfigError
from medrl.plugins.kspace.agent.policy import LineAgent, Needs, Seen

KERNEL = 5
POOLED = 512
HIDDEN = 256


class FFTConv(nn.Module):
    """A learned complex 5×5 kernel, 1→1 without bias, whose product with an image is taken in k-space.

    The product of the spectrum of an image with the conjugate spectrum of a kernel is the circular
    cross-correlation of the image with the conjugate kernel, and that is how it is computed here: as a
    convolution of real and imaginary part, without a Fourier transform. The kernel starts real, normal with
    a deviation of 1/25.

    Source: ASMR, ``FFTConv2d`` of the policy network.
    """

    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.randn(KERNEL, KERNEL) / KERNEL**2)
        self.imag = nn.Parameter(torch.zeros(KERNEL, KERNEL))

    def forward(self, image: Tensor) -> Tensor:
        """Give ``(B, H, W)`` complex for ``(B, H, W)`` complex."""
        parts = torch.view_as_real(image).movedim(-1, 1)
        reach = KERNEL // 2
        wide = F.pad(parts, (reach, reach, reach, reach), mode="circular")
        # (a - ib)(x + iy) = (ax + by) + i(ay - bx)
        weight = torch.stack([torch.stack([self.real, self.imag]), torch.stack([-self.imag, self.real])])
        return torch.view_as_complex(F.conv2d(wide, weight).movedim(1, -1).contiguous())


class FaithfulAgent(LineAgent):
    """The network of ASMR, once as the actor and once as the critic.

    Complex image → `FFTConv` → magnitude → centre crop → layer normalisation over all pixels → ResNet-18 →
    linear → layer normalisation → tanh, beside the remaining budget as a one-hot vector → hidden layer →
    logits of all lines, or a value.

    Args:
        actions: Number of lines.
        image_shape: ``(H, W)`` of the crop that is looked at; the layer normalisation has its size.
        steps_dim: Width of the one-hot vector; budgets reach up to one less.
        feature_dim: Width of the image features.
        norm: ``batch``: with stored statistics that never follow the data; ``group``: of 32 groups.
        pretrained: A file with the weights of torchvision's ResNet-18, for both networks.
        policy_gain: Gain of the last layer of the actor; .01 begins with a nearly uniform policy.

    22,805,069 parameters for 256 lines and 256² images.

    Deviation: batch normalisation uses its stored statistics also in training mode. The original normalises
    with each batch, so that the ratio of PPO differs from 1 before the first step. Stacks of slices are new:
    the image features are averaged over slices.

    Source: ASMR ppo_core_multi.py, nn_utils.py; specification §6.
    """

    needs: Needs = "image"

    def __init__(
        self,
        *,
        actions: int = 256,
        image_shape: Sequence[int] = (256, 256),
        steps_dim: int = 60,
        feature_dim: int = 60,
        norm: Literal["batch", "group"] = "batch",
        pretrained: str | Path | None = None,
        policy_gain: float = 1.0,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group"):
            raise ConfigError("kspace.faithful", why=f"norm is {norm!r}", do="batch or group")
        if actions < 1 or len(image_shape) != 2 or min(image_shape) < 1 or steps_dim < 2 or feature_dim < 1:
            raise ConfigError(
                "kspace.faithful",
                why=f"{actions} actions, image_shape {list(image_shape)}, steps_dim {steps_dim}, "
                f"feature_dim {feature_dim}",
                do="positive numbers, two for image_shape, and steps_dim of at least 2",
            )
        self.actions = int(actions)
        self.longest = int(steps_dim) - 1
        shape = (int(image_shape[0]), int(image_shape[1]))
        self.actor = _Network(shape, feature_dim, steps_dim, actions, norm, policy_gain)
        self.critic = _Network(shape, feature_dim, steps_dim, 1, norm, 1.0)
        if pretrained is not None:
            for network in (self.actor, self.critic):
                load_into(network.resnet, _trunk_weights(Path(pretrained), network.resnet))
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; batch normalisation stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def logits(self, seen: Seen) -> Tensor:
        """Logits ``(B, actions)``."""
        out: Tensor = self.actor(seen)
        return out

    def values(self, seen: Seen) -> Tensor:
        """Expected returns ``(B,)``."""
        out: Tensor = self.critic(seen)
        return out[:, 0]


class _Network(nn.Module):
    def __init__(
        self,
        image_shape: tuple[int, int],
        feature_dim: int,
        steps_dim: int,
        outputs: int,
        norm: str,
        gain: float,
    ) -> None:
        # Imported here: MONAI takes three CPU seconds, which runs with other agents need not pay.
        from monai.networks.nets.resnet import resnet18

        super().__init__()
        self.image_shape, self.steps_dim = image_shape, steps_dim
        self.kernel = FFTConv()
        self.pixel_norm = nn.LayerNorm(image_shape)
        self.resnet = resnet18(
            spatial_dims=2,
            n_input_channels=3,
            feed_forward=False,
            conv1_t_size=7,
            conv1_t_stride=2,
            bias_downsample=False,
            norm="batch" if norm == "batch" else ("group", {"num_groups": 32}),
        )
        self.features = nn.Linear(POOLED, feature_dim)
        self.feature_norm = nn.LayerNorm(feature_dim)
        self.hidden = nn.Linear(feature_dim + steps_dim, HIDDEN)
        self.output = nn.Linear(HIDDEN, outputs)
        for layer in (self.features, self.hidden, self.output):
            nn.init.orthogonal_(layer.weight, gain if layer is self.output else 1.0)
            nn.init.zeros_(layer.bias)

    def forward(self, seen: Seen) -> Tensor:
        image, remaining = seen["image"], seen["remaining"]
        flat = image.reshape(-1, *image.shape[-2:])
        pixels = self.pixel_norm(_central(self.kernel(flat).abs(), self.image_shape))
        pooled = self.resnet(pixels.unsqueeze(1).expand(-1, 3, -1, -1))
        if image.ndim == 4:
            pooled = _slice_mean(pooled.view(*image.shape[:2], POOLED), seen.get("slices"))
        features = torch.tanh(self.feature_norm(self.features(pooled)))
        left = F.one_hot(remaining.flatten().long(), self.steps_dim).to(features.dtype)
        out: Tensor = self.output(F.relu(self.hidden(torch.cat([features, left], dim=1))))
        return out.float()


def _trunk_weights(path: Path, resnet: nn.Module) -> dict[str, Tensor]:
    """Weights of a classifier without its last layer and, for other normalisation, without its statistics."""
    own = resnet.state_dict()
    state = {name: value for name, value in load_foreign(path).items() if not name.startswith("fc.")}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    state = {name: value for name, value in state.items() if name in own or not name.endswith(statistics)}
    # Files from before torch 0.4.1 have no counters.
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    return {**counters, **state}


def _central(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop ``(B, H, W)`` around its middle.

    Raises:
        ConfigError: The image is smaller.
    """
    height, width = int(image.shape[1]), int(image.shape[2])
    if height < size[0] or width < size[1]:
        raise ConfigError(
            "kspace.faithful",
            why=f"images are {height}×{width}, the agent looks at {size[0]}×{size[1]}",
            do="set image_shape to the size of the images or less",
        )
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]]


def _slice_mean(pooled: Tensor, slices: Tensor | None) -> Tensor:
    """Mean of ``(B, D, F)`` over the slices ``(B, D)`` that are there."""
    if slices is None:
        return pooled.mean(dim=1)
    weight = slices.to(pooled.dtype).unsqueeze(-1)
    return (pooled * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)
