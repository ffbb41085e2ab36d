"""Speed and memory of kspace, in CPU-seconds of one thread.

Measures, on synthetic hearts: the whole PPO loop (rollout and update) with the UNeXt reward at 128² and with
the compact networks at 64², in environment steps a CPU-second (original network and reward: 5.3 at 128², 1.4
at 256²), the reward network in float32 and in bfloat16; incremental reconstruction beside a full inverse
transform in each step; memory of a rollout of 128 environments × 72 steps at 256² (original: 4.8 GB); the
greedy oracle batched over candidates beside a loop::

    python benchmarks/kspace_speed.py
    python benchmarks/kspace_speed.py --only loop,memory --json speed.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from medrl.core.phantoms.cardiac import draw, draw_anatomy
from medrl.core.rl.ppo import PPOConfig, plain_step, ppo_update
from medrl.core.rl.rollout import RolloutBuffer
from medrl.plugins.kspace.agent import ColumnAgent, FaithfulAgent, LineAgent, Sighted
from medrl.plugins.kspace.candidates import quality_of, quality_with_each
from medrl.plugins.kspace.cases import Cases, initial_lines, possible_lines
from medrl.plugins.kspace.env import KSpaceEnv
from medrl.plugins.kspace.features import GROUPS, ColumnFeatures
from medrl.plugins.kspace.fourier import ColumnReconstruction, zero_filled
from medrl.plugins.kspace.imaging import Imaging
from medrl.plugins.kspace.models import CompactNet, SmallUNeXt, UNeXt
from medrl.plugins.kspace.observer import CaseObserver
from medrl.plugins.kspace.rewards import Quality, delta_reward
from medrl.plugins.kspace.simulate import Simulation, simulate
from medrl.plugins.kspace.train import play

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "compact": CompactNet,
    "unext": lambda: UNeXt(in_channels=1),
    "unext_s": lambda: SmallUNeXt(in_channels=1),
}


def hearts(count: int, size: int, *, initial: int = 4) -> Cases:
    """Synthetic slices with a smooth phase."""
    import numpy as np

    drawn = [draw(draw_anatomy(np.random.default_rng(number)), (size, size)) for number in range(count)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn]))
    kspace = simulate(images, Simulation(), torch.Generator().manual_seed(0))
    return Cases(
        ids=tuple(f"case{number}" for number in range(count)),
        kspace=kspace,
        target=images,
        labels=torch.from_numpy(np.stack([label for _, label in drawn])),
        possible=possible_lines(count, size),
        initial=initial_lines(count, size, initial),
    )


def observer_of(
    cases: Cases,
    network: str,
    groups: Sequence[str] | None = GROUPS,
    autocast: torch.dtype | None = None,
) -> CaseObserver:
    """What an agent sees, with an untrained reward model."""
    torch.manual_seed(0)
    made = NETWORKS[network]().eval()
    seen = Imaging(made, channels_last=True, autocast=autocast)
    seen.settle(made)
    features = None
    if groups is not None:
        features = ColumnFeatures(
            cases, groups=groups, classes=seen.classes, predicts=seen.predicts, deep=seen.deep
        )
    return CaseObserver(cases, seen, features)


def loop(
    size: int,
    network: str,
    *,
    groups: Sequence[str] = GROUPS,
    envs: int = 64,
    steps: int = 8,
    rounds: int = 3,
    autocast: torch.dtype | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """Environment steps a CPU-second of rollout and update together; the first round warms up."""
    cases = hearts(envs, size)
    observer = observer_of(cases, network, groups, autocast)
    features = observer.features
    agent: LineAgent = ColumnAgent(
        actions=cases.actions,
        features=len(features.names),
        pooled=len(features.pooled_names),
        shared=shared,
    )
    policy = Sighted(agent, observer)
    env = KSpaceEnv(
        observer, delta_reward(), num_envs=envs, budgets=range(4, steps + 1), observe=("columns",)
    )
    env.reset(seed=0)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-4)
    numbers = PPOConfig(epochs=3, minibatch=256, entropy_coef=0.003, value_clip=0.2)
    buffer, times = RolloutBuffer(steps), []
    for number in range(rounds + 1):
        start = time.process_time()
        last, _ = play(env, policy, buffer, torch.Generator().manual_seed(number))
        batch = buffer.compute(last, gamma=1.0, lam=0.95)
        order = torch.Generator().manual_seed(number)
        ppo_update(policy, optimizer, batch, numbers, generator=order, step=plain_step(optimizer, 0.5))
        times.append(time.process_time() - start)
    rates = [envs * steps / seconds for seconds in times[1:]]
    return {"steps_per_cpu_s": median(rates), "least": min(rates), "most": max(rates)}


def incremental(size: int, *, batch: int = 32, steps: int = 8, rounds: int = 5) -> dict[str, Any]:
    """Reconstructions a CPU-second: one more line added, and the whole inverse transform."""
    kspace = hearts(batch, size).kspace
    mask = torch.zeros(batch, size, dtype=torch.bool)
    lines = ColumnReconstruction(kspace)
    images = lines.images(mask)
    added, whole = [], []
    for _ in range(rounds):
        start = time.process_time()
        for step in range(steps):
            lines.add(images, torch.full((batch,), step))
        added.append(time.process_time() - start)
        start = time.process_time()
        for _ in range(steps):
            zero_filled(kspace, mask)
        whole.append(time.process_time() - start)
    count = batch * steps
    found = {"incremental_per_cpu_s": count / median(added), "full_per_cpu_s": count / median(whole)}
    return {**found, "times": median(whole) / median(added)}


def memory(size: int, *, envs: int = 128, steps: int = 72) -> dict[str, Any]:
    """Bytes of a rollout of the agent that looks at images: masks, counters and cases alone."""
    cases = hearts(2, size)
    observer = CaseObserver(cases, Imaging(None))
    agent = FaithfulAgent(actions=size, image_shape=(size, size), steps_dim=steps + 1)
    env = KSpaceEnv(
        observer,
        delta_reward(image_weight=1.0, label_weight=0.0),
        num_envs=envs,
        budgets=(min(steps, cases.fewest),),
    )
    observation = env.reset(seed=0)
    buffer = RolloutBuffer(steps)
    zeros = torch.zeros(envs)
    never = zeros > 0
    buffer.add(observation, zeros.long(), zeros, zeros, zeros, never, never, masks=env.action_masks())
    rows = [buffer[name] for name in ("actions", "log_probs", "values", "rewards", "terminated", "masks")]
    rows += [*buffer["observations"].values(), buffer["truncated"], buffer["final_values"]]
    one = sum(row.numel() * row.element_size() for row in rows)
    original = envs * steps * size * size * 8
    del agent
    return {"megabytes": one * steps / 1e6, "original_megabytes": original / 1e6}


def oracle(size: int, network: str, *, batch: int = 4, rounds: int = 2) -> dict[str, Any]:
    """States a CPU-second whose gains of all lines are found: batched, and one line after the other."""
    cases = hearts(batch, size)
    observer = observer_of(cases, network, None)
    quality, case = Quality(), torch.arange(batch)
    mask = cases.initial.clone()
    free = torch.nonzero(~mask[0]).flatten().tolist()
    batched, looped = [], []
    for _ in range(rounds):
        start = time.process_time()
        quality_with_each(observer, quality, case, mask)
        batched.append(time.process_time() - start)
        start = time.process_time()
        for number in range(batch):
            for line in free:
                one = mask[number : number + 1].clone()
                one[0, line] = True
                quality_of(observer, quality, case[number : number + 1], one)
        looped.append(time.process_time() - start)
    found = {"batched_per_cpu_s": batch / median(batched), "looped_per_cpu_s": batch / median(looped)}
    return {**found, "times": median(looped) / median(batched)}


def measure(only: Sequence[str], *, small: bool = False) -> dict[str, Any]:
    """All measurements, or some; `small` takes sizes at which they end at once."""
    quick: dict[str, Any] = {"envs": 4, "steps": 4, "rounds": 1} if small else {}
    half: dict[str, Any] = {"autocast": torch.bfloat16}
    lean = ("lines", "energy", "spectra", "pooled")
    tasks: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
        "loop": {
            "unext_128": lambda: loop(16 if small else 128, "unext", groups=lean, **quick),
            "unext_s_128": lambda: loop(16 if small else 128, "unext_s", groups=lean, **quick),
            "compact_64": lambda: loop(16 if small else 64, "compact", **quick),
            "compact_64_without_gradient": lambda: loop(16 if small else 64, "compact", groups=lean, **quick),
            "unext_128_bfloat16": lambda: loop(16 if small else 128, "unext", groups=lean, **half, **quick),
            "compact_64_bfloat16": lambda: loop(16 if small else 64, "compact", **half, **quick),
            "compact_64_without_gradient_bfloat16": lambda: loop(
                16 if small else 64, "compact", groups=lean, **half, **quick
            ),
            "compact_64_without_gradient_bfloat16_shared_trunk": lambda: loop(
                16 if small else 64, "compact", groups=lean, shared=True, **half, **quick
            ),
        },
        "incremental": {
            str(size): lambda size=size: incremental(size, batch=2 if small else 32)
            for size in ((16,) if small else (64, 128, 256))
        },
        "memory": {"128_envs_72_steps_256": lambda: memory(256, envs=8 if small else 128)},
        "oracle": {"compact_64": lambda: oracle(16 if small else 64, "compact", rounds=1 if small else 2)},
    }
    return {
        name: {case: run() for case, run in cases.items()}
        for name, cases in tasks.items()
        if not only or name in only
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", help="loop, incremental, memory, oracle.")
    parser.add_argument("--small", action="store_true", help="Tiny sizes, to see that it works.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure([name for name in given.only.split(",") if name], small=given.small)
    text = json.dumps(found, indent=1)
    if given.json is not None:
        given.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return found


if __name__ == "__main__":
    main()
