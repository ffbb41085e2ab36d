"""Speed and memory of self-play in spars, in CPU-seconds of one thread.

Measures, on volumes with bright balls: the whole loop (rollout with a frozen opponent, scores from tables,
PPO with 2 epochs in minibatches of 512) for each network, in environment steps a CPU-second (original: 12 to
16 at 64 x 64 x 48); the environment alone (original: 39); the warm start; painting of a path by differences;
the time to prepare a volume; and the largest memory of training at 256 x 256 x 180 (original: 24 GB for
weights and optimiser alone)::

    python benchmarks/spars_loop.py
    python benchmarks/spars_loop.py --only loop,memory --json loop.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from medrl.core.rl.ppo import PPOConfig, plain_step, ppo_update
from medrl.core.rl.rollout import RolloutBuffer
from medrl.plugins.spars.agent import CompactAgent, ConvAgent, FaithfulAgent, HuntAgent, Sighted
from medrl.plugins.spars.env import HuntEnv
from medrl.plugins.spars.observer import Observer
from medrl.plugins.spars.opponents import Opponents
from medrl.plugins.spars.painting import paint
from medrl.plugins.spars.playing import BrightScorer
from medrl.plugins.spars.rewards import Reward, ShapedReward, SignReward
from medrl.plugins.spars.table import ScoreTable
from medrl.plugins.spars.train import play
from medrl.plugins.spars.warmstart import Teacher, imitation_loss, walk_with

SMALL, FULL = (64, 64, 48), (256, 256, 180)
WINDOWS = {SMALL: (16, 16, 8), FULL: (48, 48, 24), (24, 24, 16): (8, 8, 8)}
AGENTS: dict[str, Callable[[], HuntAgent]] = {
    "compact": CompactAgent,
    "cnn": ConvAgent,
    "mlp": lambda: FaithfulAgent((16, 16, 8)),
}


def balls(count: int, size: Sequence[int]) -> list[Tensor]:
    """Dim volumes, each with a bright ball."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    found = []
    for _ in range(count):
        place = torch.rand(3, generator=generator) * (torch.tensor(size) - 12) + 6
        far = sum((axis - float(c)) ** 2 for axis, c in zip(axes, place, strict=True))
        noise = 0.1 * torch.rand(tuple(size), generator=generator)
        found.append(torch.where(torch.as_tensor(far) < (min(size) / 10) ** 2, 0.8, 0.1) + noise)
    return found


def table_of(count: int, size: tuple[int, int, int]) -> ScoreTable:
    """Filled tables of such volumes."""
    table = ScoreTable(balls(count, size), BrightScorer(), window=WINDOWS[size], stride=4)
    table.fill()
    return table


def loop(
    size: tuple[int, int, int],
    network: str,
    *,
    volumes: int = 16,
    envs: int = 64,
    steps: int = 32,
    rounds: int = 5,
    reward: Reward | None = None,
    kind: str = "frozen",
) -> dict[str, float]:
    """Environment steps a CPU-second of rollout and update together; the first round warms up."""
    table = table_of(volumes, size)
    torch.manual_seed(0)
    agent, observer = AGENTS[network](), Observer.of(table)
    agent.fit_scales(observer)
    env = HuntEnv(table, reward or SignReward(), num_envs=envs, tau=None, horizon=32)
    env.reset()
    policy = Sighted(agent, observer)
    opponents = Opponents(agent, observer, kind=kind, every=32)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-4, eps=1e-5)
    config = PPOConfig(minibatch=512, epochs=2, entropy_coef=0.01)
    buffer, generator = RolloutBuffer(steps), torch.Generator().manual_seed(0)
    rollouts, updates = [], []
    for _ in range(rounds + 1):
        began = time.process_time()
        last, _ = play(env, policy, opponents, buffer)
        batch = buffer.compute(last, gamma=0.99, lam=0.95)
        middle = time.process_time()
        ppo_update(policy, optimizer, batch, config, generator=generator, step=plain_step(optimizer, 0.5))
        opponents.tick(steps)
        rollouts.append(middle - began)
        updates.append(time.process_time() - middle)
    whole = median(a + b for a, b in zip(rollouts[1:], updates[1:], strict=True))
    return {
        "steps_per_cpu_s": round(envs * steps / whole, 1),
        "rollout_share": round(sum(rollouts[1:]) / (sum(rollouts[1:]) + sum(updates[1:])), 3),
    }


def environment(size: tuple[int, int, int], *, envs: int, steps: int = 64) -> dict[str, float]:
    """Steps a CPU-second with random moves of both windows, observations included."""
    env = HuntEnv(table_of(4, size), SignReward(), num_envs=envs, tau=None, horizon=steps + 1)
    env.reset()
    began = time.process_time()
    for _ in range(steps):
        pair = [env.noise(agent).masked_fill(~env.action_masks(agent), -torch.inf) for agent in (0, 1)]
        env.step_both(torch.stack([item.argmax(dim=1) for item in pair], dim=1))
    return {"steps_per_cpu_s": round(envs * steps / (time.process_time() - began), 1)}


def warm(size: tuple[int, int, int], *, rounds: int = 5) -> dict[str, float]:
    """States a CPU-second of collecting and imitating a planned path."""
    table = table_of(8, size)
    agent, observer = CompactAgent(), Observer.of(table)
    agent.fit_scales(observer)
    teacher, policy = Teacher(table), Sighted(agent, observer)
    env = HuntEnv(table, SignReward(), num_envs=64, tau=None)
    env.reset()
    step = plain_step(torch.optim.Adam(agent.parameters(), lr=1e-3), 0.5)
    generator = torch.Generator().manual_seed(0)
    spent, states = [], 0
    for _ in range(rounds + 1):
        began = time.process_time()
        seen, legal = walk_with(env, teacher, generator, 512)
        targets, knows = teacher.targets(seen["case"].flatten(), seen["node"][:, 0])
        step(imitation_loss(policy.logits_and_values(seen)[0], legal, targets, knows, 0.02))
        spent.append(time.process_time() - began)
        states = len(legal)
    return {"states_per_cpu_s": round(states / median(spent[1:]), 1)}


def preparation(size: tuple[int, int, int]) -> dict[str, float]:
    """CPU-seconds a volume until it can be played: table of scores, glimpses, plan of the teacher."""
    volumes = balls(1, size)
    began = time.process_time()
    table = ScoreTable(volumes, BrightScorer(), window=WINDOWS[size], stride=4)
    table.fill()
    scored = time.process_time()
    Observer.of(table).glimpses(0)
    seen = time.process_time()
    where = torch.zeros(1, dtype=torch.int64)
    Teacher(table).targets(where, torch.zeros(1, 3, dtype=torch.int64))
    return {
        "windows": float(table.lattices[0].size),
        "table_cpu_s": round(scored - began, 3),
        "glimpses_cpu_s": round(seen - scored, 3),
        "plan_cpu_s": round(time.process_time() - seen, 3),
    }


def painting(size: tuple[int, int, int], *, visits: int = 512) -> dict[str, float]:
    """CPU-seconds to paint a path by differences, and window by window."""
    window = WINDOWS[size]
    generator = torch.Generator().manual_seed(0)
    room = torch.tensor(size) - torch.tensor(window) + 1
    corners = (torch.rand(visits, 3, generator=generator) * room).long()
    values = torch.rand(visits, generator=generator)
    began = time.process_time()
    paint(size, window, corners, values)
    middle = time.process_time()
    total, count, most = torch.zeros(size), torch.zeros(size), torch.zeros(size)
    for (x, y, z), value in zip(corners.tolist(), values.tolist(), strict=True):
        part = (slice(x, x + window[0]), slice(y, y + window[1]), slice(z, z + window[2]))
        total[part] += value
        count[part] += 1
        most[part].clamp_(min=value)
    return {
        "by_differences_cpu_s": round(middle - began, 4),
        "window_by_window_cpu_s": round(time.process_time() - middle, 4),
    }


def memory(size: tuple[int, int, int], volumes: int) -> dict[str, float]:
    """Largest resident memory in GB of a process that trains at a size, libraries included (Linux)."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import spars_loop as s; "
    code += f"s.child({size!r}, {volumes})"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    before, after = map(float, said.stdout.split())
    return {"peak_gb": round(after, 3), "libraries_gb": round(before, 3), "volumes": float(volumes)}


def child(size: tuple[int, int, int], volumes: int) -> None:
    """Train a little, and write the largest memory before and after, in GB."""

    def peak() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))

    torch.set_num_threads(1)
    before = peak()
    loop(size, "compact", volumes=volumes, rounds=1)
    sys.stdout.write(f"{before} {peak()}\n")


def measure(only: Sequence[str], *, small: bool) -> dict[str, Any]:
    """Run the measurements."""
    tiny = (24, 24, 16)
    middle, large = (tiny, tiny) if small else (SMALL, FULL)
    quick: dict[str, int] = {"envs": 8, "steps": 4, "rounds": 1} if small else {}
    shaped = ShapedReward()
    tasks: dict[str, dict[str, Callable[[], dict[str, float]]]] = {
        "loop": {
            "compact": lambda: loop(middle, "compact", **quick),
            "compact_256_envs": lambda: loop(middle, "compact", **{**quick, "envs": 8 if small else 256}),
            "compact_live": lambda: loop(middle, "compact", kind="live", **quick),
            "compact_pool": lambda: loop(middle, "compact", kind="pool", **quick),
            "compact_shaped": lambda: loop(middle, "compact", reward=shaped, **quick),
            "cnn": lambda: loop(middle, "cnn", **{"rounds": 2, **quick}),
        },
        "environment": {
            str(envs): lambda envs=envs: environment(middle, envs=envs, steps=4 if small else 64)
            for envs in ((4,) if small else (64, 256, 1024))
        },
        "warm": {"planned": lambda: warm(middle, rounds=1 if small else 5)},
        "preparation": {"small": lambda: preparation(middle), "full": lambda: preparation(large)},
        "painting": {"small": lambda: painting(middle), "full": lambda: painting(large)},
        "memory": {"full": lambda: memory(large, 1 if small else 4)},
    }
    return {
        name: {case: run() for case, run in cases.items()}
        for name, cases in tasks.items()
        if not only or name in only
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", help="loop, environment, warm, preparation, painting, memory.")
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
