"""Test-time optimisation: a copy of the actor learns on one file, rewarded by the reward nets.

Nothing is left behind: the copy lives for one file, reward nets are frozen, and everything random comes
from the seed and the content of the file.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medrl.core import rng
from medrl.core.rl.pixelwise import ppo_terms

from .predict_config import TTOConfig
from .windows import WINDOW, chunks, take

Judge = Callable[[Tensor, Tensor], Tensor]
"""Images `(N, 1, X, Y, 4)` and labels `(N, X, Y, 4)` to the fused reward `(N, X, Y, 4)` in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What happened on one file.

    Attributes:
        worst: Mean reward of the worst frame, before (first) and after each pass.
        mean: Mean reward of all frames likewise.
        best: The pass whose weights were best; 0 is the start.
        stopped_early: Whether passes were left out for lack of progress.
        accepted: Whether the result of the optimised actor was kept.
        why: Why not, or why it was not tried.
    """

    worst: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    best: int = 0
    stopped_early: bool = False
    accepted: bool = False
    why: str = ""
    final: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the report."""
        return {key: value for key, value in asdict(self).items() if value not in ("", (), {})}


def content_seed(seed: int, images: Tensor) -> int:
    """Return the seed of a file: it depends on its frames and on nothing that was done before."""
    digest = hashlib.sha256(np.ascontiguousarray(images.cpu().numpy()).tobytes()).hexdigest()
    return rng.derive_seed(seed, "rl4seg3d", "tto", digest)


def optimise(
    network: nn.Module, judge: Judge, images: Tensor, config: TTOConfig, *, device: torch.device
) -> tuple[nn.Module | None, Trace]:
    """Improve a copy of the actor on one sequence.

    In each pass, each chunk of four frames is shown with changed contrast and noise; labels are drawn,
    rewarded, and the clipped surrogate of the drawn labels is lowered. The baseline is the mean reward of a
    frame.

    Deviations: numerator and denominator of the ratio see the same changed chunk (the original divides the
    policy on one image by that on another); a pass counts only if its worst frame has a higher mean reward
    than before the first; passes are scored by the reward itself, which is not stretched frame by frame.

    Args:
        network: The actor; it is not changed.
        judge: The fused reward.
        images: `(X, Y, T)`.
        config: Settings.
        device: Where they compute.

    Returns:
        The best copy, or None where no pass was better than the start; and what happened.

    Source: RL4Seg3D, PPO_3d.py, `ttoptimize`.
    """
    generator = torch.Generator().manual_seed(content_seed(config.seed, images))
    with torch.inference_mode(mode=False), torch.enable_grad():
        actor = copy.deepcopy(network).float().to(device).eval().requires_grad_(requires_grad=True)
        for head in getattr(actor, "deep_supervision_heads", ()):
            head.requires_grad_(requires_grad=False)
        learned = [weight for weight in actor.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(learned, lr=config.lr)
        parts = chunks(images.shape[-1])
        first = _scores(actor, judge, images, parts, device)
        worst, mean = [min(first)], [sum(first) / len(first)]
        best, kept = 0, None
        stopped = False
        for number in range(1, config.passes + 1):
            for frames in parts:
                _step(actor, network, judge, take(images, frames), config, optimizer, generator, device)
            scores = _scores(actor, judge, images, parts, device)
            worst.append(min(scores))
            mean.append(sum(scores) / len(scores))
            if worst[-1] > worst[best]:
                best, kept = number, copy.deepcopy(actor.state_dict())
            elif number - best >= config.patience and number < config.passes:
                stopped = True
                break
    trace = Trace(worst=tuple(worst), mean=tuple(mean), best=best, stopped_early=stopped)
    if kept is None:
        return None, trace
    actor.load_state_dict(kept)
    return actor.requires_grad_(requires_grad=False), trace


def _step(
    actor: nn.Module,
    reference: nn.Module,
    judge: Judge,
    chunk: Tensor,
    config: TTOConfig,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    """Learn from one chunk `(X, Y, 4)`: gradients of its views are added before one step."""
    optimizer.zero_grad(set_to_none=True)
    for _ in range(config.views):
        seen = _changed(chunk, generator)[None, None].to(device)
        log_p = torch.log_softmax(actor(seen).float(), dim=1)
        with torch.no_grad():
            noise = torch.rand(log_p.shape, generator=generator).clamp_(1e-10, 1.0 - 1e-7).to(device)
            actions = (log_p - torch.log(-torch.log(noise))).argmax(dim=1)  # Gumbel: a draw from the policy
            reward = judge(seen, actions)
            known = torch.log_softmax(reference(seen).float(), dim=1).gather(1, actions[:, None])[:, 0]
            baseline = reward.mean(dim=(1, 2), keepdim=True).expand_as(reward)
        taken = log_p.gather(1, actions[:, None])[:, 0]
        terms = ppo_terms(
            taken,
            taken.detach(),
            known,
            reward,
            baseline,
            clip=config.clip,
            kl=config.kl,
            entropy=-(log_p.exp() * log_p).sum(dim=1),
            entropy_coef=config.entropy,
        )
        (terms.actor / config.views).backward()  # type: ignore[no-untyped-call]
    learned = [weight for group in optimizer.param_groups for weight in group["params"]]
    if config.clip_norm > 0:
        torch.nn.utils.clip_grad_norm_(learned, config.clip_norm)
    if all(bool(torch.isfinite(weight.grad).all()) for weight in learned if weight.grad is not None):
        optimizer.step()


def _changed(chunk: Tensor, generator: torch.Generator) -> Tensor:
    """Change the contrast by 0.4 to 0.8, add noise of σ 0.001 to 0.01, divide by the largest value."""
    factor = 0.4 + 0.4 * float(torch.rand((), generator=generator))
    sigma = 0.001 + 0.009 * float(torch.rand((), generator=generator))
    mean = chunk.mean(dim=(-3, -2), keepdim=True)
    changed = (factor * chunk + (1.0 - factor) * mean).clamp(0.0, 1.0)
    changed = (changed + sigma * torch.randn(chunk.shape, generator=generator)).clamp_(min=0.0)
    largest = float(changed.max())
    return changed / largest if largest > 0.0 else changed


@torch.no_grad()
def _scores(
    actor: nn.Module, judge: Judge, images: Tensor, parts: list[list[int]], device: torch.device
) -> list[float]:
    """Return the mean reward of the most probable labels of each frame."""
    found: dict[int, float] = {}
    for frames in parts:
        window = take(images, frames)[None, None].to(device)
        labels = actor(window).argmax(dim=1)
        reward = judge(window, labels)[0].mean(dim=(0, 1))
        for place in range(WINDOW):
            found.setdefault(frames[place], float(reward[place]))
    return [found[frame] for frame in sorted(found)]
