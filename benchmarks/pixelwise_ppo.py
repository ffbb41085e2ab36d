"""One batch of pixel-wise PPO: the schedule of medrl beside the original's, on the same network.

Three arms do the same update of the same policy on the same images with the same reward:

- ``original``: the schedule of RL4Seg's PPO.py. Acting passes images through actor and reference; the rollout
  passes them through both again, and through the critic; each of the k inner steps passes them through all
  three. Distributions are torch's, an action is drawn in every pass although all but the first are thrown
  away, and the value stays in the graph of the policy's loss.
- ``recomputing``: the same passes (actor k + 2, reference k + 2), with medrl's arithmetic and draws.
- ``medrl``: `rollout` and `update`: actor k, reference 1, critic k.

Before anything is timed, ``recomputing`` and ``medrl`` must give the same weights from the same draws.
Printed are images per CPU second on one thread, and ratios of the arms with their range over the repeats.

    python benchmarks/pixelwise_ppo.py [--size 64] [--batch 16] [--batches 4] [--repeats 5]
                                       [--network unet_small|unet] [--init-channels 8]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from medrl.core.adaptation.actors import CategoricalActor, Critic
from medrl.core.rl.pixelwise import (
    PixelwisePPOConfig,
    action_log_probs,
    correlated_categorical,
    pixel_entropy,
    plain_steps,
    ppo_terms,
    rollout,
    update,
)
from medrl.plugins.rl4seg.models import SmallUNet, UNet

ARMS = ("original", "recomputing", "medrl")
SETTINGS = {
    "critic, 5 inner steps": PixelwisePPOConfig(kl=0.05, entropy=0.05, inner_steps=5),
    "constant baseline, 3 inner steps": PixelwisePPOConfig(kl=0.02, inner_steps=3, baseline="constant"),
}


class Scene:
    """Networks, optimisers and images of one arm; all arms begin with equal ones."""

    def __init__(
        self, network: nn.Module, critic: nn.Module | None, images: Tensor, config: PixelwisePPOConfig
    ) -> None:
        self.config, self.images = config, images
        self.actor = CategoricalActor(copy.deepcopy(network), classes=3)
        self.reference = self.actor.frozen()
        self.critic = None if critic is None else Critic(copy.deepcopy(critic))
        self.parts: dict[str, nn.Module] = {"actor": self.actor}
        if self.critic is not None:
            self.parts["critic"] = self.critic
        self.optimizers = {
            name: torch.optim.Adam(part.parameters(), lr=1e-4) for name, part in self.parts.items()
        }
        self.step = plain_steps(self.optimizers, {"actor": config.max_grad_norm})
        self.generator = torch.Generator().manual_seed(0)

    def reward(self, actions: Tensor, images: Tensor) -> Tensor:
        """Bright pixels should be 1, dark ones 0: next to nothing to compute."""
        return (actions == (images[:, 0] > 0.5).long()).float()


def medrl(scene: Scene) -> None:
    """What medrl does."""
    batch = rollout(
        scene.actor, scene.reference, scene.images, scene.reward, scene.config, generator=scene.generator
    )
    update(scene.actor, scene.critic, batch, scene.config, step=scene.step)


def recomputing(scene: Scene) -> None:
    """The passes of the original with the arithmetic of medrl."""
    config, images = scene.config, scene.images
    with torch.no_grad():
        scene.reference.log_probs(images)
        actions = correlated_categorical(scene.actor.log_probs(images).exp(), 0.0, scene.generator)
        rewards = scene.reward(actions, images)
        old = action_log_probs(scene.actor.log_probs(images), actions)
        scene.reference.log_probs(images)
        if scene.critic is not None:
            scene.critic.eval()  # else its statistics would move once more than in medrl's schedule
            scene.critic(images)
            scene.critic.train()
    for _ in range(config.inner_steps):
        maps = scene.actor.log_probs(images)
        with torch.no_grad():
            reference = action_log_probs(scene.reference.log_probs(images), actions)
        values = config.constant if scene.critic is None else scene.critic(images)
        terms = ppo_terms(
            action_log_probs(maps, actions),
            old,
            reference,
            rewards,
            values,
            clip=config.clip,
            kl=config.kl,
            entropy=pixel_entropy(maps) if config.entropy else None,
            entropy_coef=config.entropy,
        )
        scene.step("actor", terms.actor)
        if scene.critic is not None and terms.critic is not None:
            scene.step("critic", terms.critic)


def original(scene: Scene) -> None:
    """The passes, distributions, draws and graphs of the original."""
    config, images = scene.config, scene.images

    def distributions() -> tuple[torch.distributions.Categorical, torch.distributions.Categorical]:
        with torch.no_grad():
            fixed = torch.softmax(scene.reference.logits(images), dim=1)
        live = torch.softmax(scene.actor.logits(images), dim=1)
        return (
            torch.distributions.Categorical(probs=live.permute(0, 2, 3, 1)),
            torch.distributions.Categorical(probs=fixed.permute(0, 2, 3, 1)),
        )

    def evaluate(actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        live, fixed = distributions()
        log_probs, old = live.log_prob(actions), fixed.log_prob(actions)
        live.sample()
        values = config.constant if scene.critic is None else scene.critic(images)
        return log_probs, old, live.entropy(), values

    with torch.no_grad():
        actions = distributions()[0].sample()
        rewards = scene.reward(actions, images)
        acted = evaluate(actions)[0]
    for _ in range(config.inner_steps):
        log_probs, fixed, entropy, values = evaluate(actions)
        with torch.no_grad():
            shaped = rewards - config.kl * (log_probs - fixed)
        advantages = shaped - values
        ratio = (log_probs - acted).exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        loss = -torch.min(advantages * ratio, advantages * clipped).mean() - config.entropy * entropy.mean()
        scene.optimizers["actor"].zero_grad()
        loss.backward(retain_graph=scene.critic is not None)
        nn.utils.clip_grad_norm_([p for part in scene.parts.values() for p in part.parameters()], 0.5)
        scene.optimizers["actor"].step()
        if scene.critic is not None:
            scene.optimizers["critic"].zero_grad()
            (values - rewards).square().mean().backward()
            scene.optimizers["critic"].step()


def check_equal(build: Callable[[], Scene]) -> None:
    """Refuse to compare arms that compute something else."""
    scenes = []
    for run in (recomputing, medrl):
        scene = build()
        run(scene)
        scenes.append(scene)
    for name, part in scenes[0].parts.items():
        for first, second in zip(part.parameters(), scenes[1].parts[name].parameters(), strict=True):
            if not torch.allclose(first, second, rtol=0.0, atol=1e-7):
                raise SystemExit(f"the arms give different weights of the {name}: nothing can be compared")


def seconds(scene: Scene, run: Callable[[Scene], None], batches: int) -> float:
    """CPU seconds of some batches."""
    start = time.process_time()
    for _ in range(batches):
        run(scene)
    return time.process_time() - start


def main() -> None:
    """Time the arms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--network", choices=("unet_small", "unet"), default="unet_small")
    parser.add_argument("--init-channels", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def network(outputs: int) -> nn.Module:
        if options.network == "unet":
            return UNet(out_channels=outputs, init_channels=options.init_channels)
        return SmallUNet(out_channels=outputs)

    actor, critic = network(3), network(1)
    images = torch.rand(options.batch, 1, options.size, options.size)
    print(f"{options.network}, {options.batch} images of {options.size}², one thread, CPU seconds")
    print(f"median of {options.repeats} repeats of {options.batches} batches, ratios with their range\n")
    print("| setting | original, images/s | recomputing | medrl | medrl / original | medrl / recomputing |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, config in SETTINGS.items():

        def build(config: PixelwisePPOConfig = config) -> Scene:
            return Scene(actor, critic if config.baseline == "critic" else None, images, config)

        check_equal(build)
        runs = {"original": original, "recomputing": recomputing, "medrl": medrl}
        scenes = {arm: build() for arm in ARMS}
        for arm in ARMS:
            seconds(scenes[arm], runs[arm], 1)
        rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for repeat in range(options.repeats):
            # The load of the machine changes; the order alternates so that no arm is always last.
            for arm in ARMS if repeat % 2 == 0 else reversed(ARMS):
                spent = seconds(scenes[arm], runs[arm], options.batches)
                rates[arm].append(options.batch * options.batches / spent)
        row = [f"{statistics.median(rates[arm]):.1f}" for arm in ARMS]
        row += [spread(rates["medrl"], rates[arm]) for arm in ("original", "recomputing")]
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)
    print(f"\nload average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end")


def spread(found: list[float], base: list[float]) -> str:
    """Median and range of the ratio, repeat by repeat."""
    ratios = [one / other for one, other in zip(found, base, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
