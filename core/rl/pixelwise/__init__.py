"""Policies that choose a label in every pixel or voxel of an image, as one-step episodes.

The state is an image ``(N, C, *S)``, the action a label map ``(N, *S)``, the reward a map ``(N, *S)`` in
[0, 1]. `S` is any number of spatial dimensions, such as (H, W) or (H, W, T), and there may be any number of
labels K ≥ 2. One optimisation of one batch reads::

    batch = rollout(actor, reference, images, reward_fn, config, generator=generator)
    if guard.check(batch):
        stats = update(actor, critic, batch, config, step=step)

where ``step(part, loss)`` goes backward and steps the optimiser of ``"actor"`` or ``"critic"``; through the
runtime it is::

    def step(part, loss):
        rt.backward(loss, cases=ids)
        return rt.step(optimizers[part], clip_norm=clip_norms[part])
"""

from medrl.core.rl.pixelwise.arithmetic import (
    PPOTerms,
    action_log_probs,
    binary_log_probs,
    categorical_kl,
    categorical_log_probs,
    group_mean,
    most_probable,
    pixel_entropy,
    policy_gradient_loss,
    ppo_terms,
    value_loss,
)
from medrl.core.rl.pixelwise.guard import CollapseGuard
from medrl.core.rl.pixelwise.rollout import PixelPolicy, RewardFn, Rollout, rollout
from medrl.core.rl.pixelwise.sampling import correlated_categorical, smooth_normal
from medrl.core.rl.pixelwise.settings import PixelwisePPOConfig
from medrl.core.rl.pixelwise.update import (
    PixelCritic,
    Step,
    UpdateStats,
    plain_steps,
    policy_gradient_update,
    update,
)

__all__ = [
    "CollapseGuard",
    "PPOTerms",
    "PixelCritic",
    "PixelPolicy",
    "PixelwisePPOConfig",
    "RewardFn",
    "Rollout",
    "Step",
    "UpdateStats",
    "action_log_probs",
    "binary_log_probs",
    "categorical_kl",
    "categorical_log_probs",
    "correlated_categorical",
    "group_mean",
    "most_probable",
    "pixel_entropy",
    "plain_steps",
    "policy_gradient_loss",
    "policy_gradient_update",
    "ppo_terms",
    "rollout",
    "smooth_normal",
    "update",
    "value_loss",
]
