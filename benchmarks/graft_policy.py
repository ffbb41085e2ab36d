"""The policy of graft at the published sizes: maps pooled before its first convolution, beside after it.

Five teachers, each with features (32, 20, 256, 256) and logits (2, 20, 256, 256) a sample. ``published`` is
the network of models/policy.py of the original, written down plainly: concatenate, convolve the full maps,
pool, in the precision of the features. ``medrl`` is `make_state`, which pools, and `TeacherPolicy`. Both have
the same weights. Times are CPU seconds on one thread, the smallest of several runs.

- ``act``: from the teachers' maps of one sample to the weights.
- ``update``: forward and backward pass through the policy from what an episode stores.

The two orders are different functions, so their weights differ; printed is by how much. What must be equal,
or the script stops: the plain network and `TeacherPolicy` on the same full maps, and both on the same pooled
maps.

Storage is what one step of an episode keeps: the published full maps, or the state of `make_state`. The
default agent keeps no state at all but sums of gradients (`TraceEpisode`).

    OMP_NUM_THREADS=1 python benchmarks/graft_policy.py [--teachers 5] [--batch 1] [--repeats 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.core.checkpoint import write_checkpoint
from medrl.plugins.graft.agent import (
    PolicyState,
    StoredEpisode,
    TeacherPolicy,
    TraceEpisode,
    make_state,
    state_channels,
    state_scalars,
)

WINDOW = (20, 256, 256)
CHANNELS = {"neg1": 32, "logits": 2}
POOLED = (5, 32, 32)
SAME = 1e-5
"""Largest difference of weights that counts as equal."""


class Published(nn.Module):
    """The policy of the original: convolution, ReLU, pooling, on maps of any size."""

    def __init__(self, policy: TeacherPolicy) -> None:
        super().__init__()
        self.encoders, self.trunk, self.head = policy.encoders, policy.trunk, policy.heads["neg1"]

    def forward(self, maps: Sequence[Sequence[Tensor]], scalars: Tensor) -> Tensor:
        """Weights ``(B, N)`` from the features and logits of each teacher and scalars ``(B, N, s)``."""
        described = []
        for i, (encoder, parts) in enumerate(zip(self.encoders, maps, strict=True)):
            x = torch.cat(list(parts), dim=1)
            for conv, size in (("conv1", POOLED), ("conv2", (2, 8, 8)), ("conv3", (1, 1, 1))):
                layer: nn.Conv3d = getattr(encoder, conv)
                weight, bias = layer.weight.to(x.dtype), layer.bias
                x = F.conv3d(x, weight, None if bias is None else bias.to(x.dtype), padding=1)
                x = F.adaptive_avg_pool3d(F.relu(x), size)
            described.append(torch.cat([x.flatten(1).float(), scalars[:, i]], dim=1))
        return torch.softmax(self.head(F.relu(self.trunk(torch.cat(described, dim=1)))), dim=1)


def seconds(arms: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Smallest CPU time of each action; they take turns, and a short one gets more of them."""
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats):
        for name, action in arms.items():
            for _ in range(1 if best[name] > 1 else 5):
                start = time.process_time()
                action()
                best[name] = min(best[name], time.process_time() - start)
    return best


def backward(weights: Callable[[], Tensor], policy: nn.Module) -> None:
    """A forward and a backward pass."""
    policy.zero_grad(set_to_none=True)
    weights().log().sum(dim=1).mean().backward()


def check(name: str, one: Tensor, other: Tensor) -> float:
    """The largest difference of two weightings that must be equal."""
    away = float((one - other).abs().max())
    if not away < SAME:
        raise SystemExit(f"{name}: the weights differ by {away}")
    return away


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Everything that is printed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, batch = options.teachers, options.batch
    policy = TeacherPolicy(
        [state_channels(CHANNELS, ["neg1"])] * count,
        state_scalars(["neg1"], disagreement=True),
        residual=False,
    )
    published = Published(policy)
    narrow = [
        [torch.randn(batch, channels, *WINDOW).bfloat16() for channels in CHANNELS.values()]
        for _ in range(count)
    ]
    wide = [[part.float() for part in maps] for maps in narrow]
    scalars = torch.rand(batch, count, 3)

    def observe(*, pooled_first: bool = True, normalise: bool = True) -> PolicyState:
        return make_state(
            [{"neg1": features} for features, _ in narrow],
            [logits for _, logits in narrow],
            taps=["neg1"],
            similarity={"neg1": scalars[..., 0]},
            quality=scalars[..., 1],
            disagreement=scalars[..., 2],
            pooled_first=pooled_first,
            normalise=normalise,
        )

    def weights(state: PolicyState) -> Tensor:
        return torch.softmax(policy(state)["neg1"], dim=1)

    found: dict[str, float] = {}
    with torch.no_grad():
        acting = {
            "act_medrl_s": lambda: weights(observe()),
            "act_published_bf16_s": lambda: published(narrow, scalars),
            "act_published_fp32_s": lambda: published(wide, scalars),
        }
        found |= seconds(acting, options.repeats)
        original = published(wide, scalars)
        pooled = observe(normalise=False)
        apart = [list(maps.split(list(CHANNELS.values()), dim=1)) for maps in pooled.spatial]
        found["equal_on_pooled"] = check("on pooled maps", published(apart, scalars), weights(pooled))
        found["between_orders"] = float((original - weights(pooled)).abs().max())
        for encoder in policy.encoders:
            encoder.pooled_first = False
        in_order = weights(observe(pooled_first=False, normalise=False))
        found["equal_on_full"] = check("on full maps", original, in_order)
        for encoder in policy.encoders:
            encoder.pooled_first = True
    state = observe()
    updating = {
        "update_medrl_s": lambda: backward(lambda: weights(state), policy),
        "update_published_bf16_s": lambda: backward(lambda: published(narrow, scalars), policy),
        "update_published_fp32_s": lambda: backward(lambda: published(wide, scalars), policy),
    }
    found |= seconds(updating, max(1, options.repeats - 2))
    found["full_bf16_mb"] = sum(part.nbytes for maps in narrow for part in maps) / 1e6
    found["full_fp32_mb"] = sum(part.nbytes for maps in wide for part in maps) / 1e6
    found["state_mb"] = state.nbytes / 1e6
    found["state_each_mb"] = state.spatial[0].nbytes / batch / 1e6
    found |= stored(state, policy)
    return found


def stored(state: PolicyState, policy: nn.Module) -> dict[str, float]:
    """Bytes in a checkpoint of one more step of a `StoredEpisode`, and of a `TraceEpisode` of 1 and 50."""
    sizes = []
    with TemporaryDirectory() as scratch:
        for steps in (1, 3):
            episode = StoredEpisode()
            for _ in range(steps):
                copies = tuple(maps.clone() for maps in state.spatial)
                episode.add(PolicyState(copies, state.scalars.clone()), 0.0)
            written = write_checkpoint(
                Path(scratch) / "episode.pt", {"agent": episode.state_dict()}, {"step": 1}
            )
            sizes.append(written.size)
        traces = []
        for steps in (1, 50):
            trace = TraceEpisode([p for p in policy.parameters() if p.requires_grad], gamma=0.95)
            for _ in range(steps):
                trace.take([torch.zeros_like(p) for p in trace.parameters], None, 0.0)
            written = write_checkpoint(Path(scratch) / "trace.pt", {"agent": trace.state_dict()}, {"step": 1})
            traces.append(written.size)
    return {
        "checkpoint_step_mb": (sizes[1] - sizes[0]) / 2e6,
        "trace_1_mb": traces[0] / 1e6,
        "trace_50_mb": traces[1] / 1e6,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    row = measure(options)
    if options.json:
        print(json.dumps({"teachers": options.teachers, "batch": options.batch, **row}))
        return
    print(f"{options.teachers} teachers, batch {options.batch}, CPU seconds on one thread\n")
    print("| | published, fp32 | published, bf16 | medrl | ratio to fp32 | ratio to bf16 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for what in ("act", "update"):
        wide, narrow = row[f"{what}_published_fp32_s"], row[f"{what}_published_bf16_s"]
        ours = row[f"{what}_medrl_s"]
        print(
            f"| {what}, CPU s | {wide:.2f} | {narrow:.2f} | {ours:.3f} "
            f"| {wide / ours:.1f} | {narrow / ours:.1f} |"
        )
    step = row["full_fp32_mb"], row["full_bf16_mb"], row["state_mb"]
    print(
        f"| MB of a step | {step[0]:.0f} | {step[1]:.0f} | {step[2]:.2f} "
        f"| {step[0] / step[2]:.0f} | {step[1] / step[2]:.0f} |"
    )
    print(
        f"\nstate of one teacher and sample {row['state_each_mb']:.2f} MB, of a step in a checkpoint "
        f"{row['checkpoint_step_mb']:.2f} MB; the default agent's sums {row['trace_1_mb']:.2f} MB after one "
        f"step, {row['trace_50_mb']:.2f} MB after 50\n"
        f"weights on the same maps differ by {row['equal_on_full']:.1e} (full) and "
        f"{row['equal_on_pooled']:.1e} (pooled); between the two orders by {row['between_orders']:.4f}"
    )


if __name__ == "__main__":
    main()
