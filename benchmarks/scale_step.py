"""What the machine around a training loop costs: time at one rank, bytes at two, and step times.

``overhead``: the same network, data and optimiser in a plain loop of torch and in the loop of `Runtime`, one
step of each in turn in one process; medians of CPU time (of time on a GPU). ``launched`` is the same loop as
the only rank of torchrun; one rank opens no process group, and that is looked at. ``bytes``: two gloo ranks
count what a step hands to torch.distributed, beside DDP on the same network. ``times``: seconds of a step of
the networks of `scale_table.py`.

    python benchmarks/scale_step.py [--out FILE] [--device cuda] [--repeats 40] [--small]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medrl.core.config import MethodConfig, Resolved, TrainConfig
from medrl.core.jobs import TrainJob
from medrl.core.manager import PluginManager
from medrl.core.runtime.traffic import counted_traffic

NETWORKS = {
    # name: registry key, parameters, input (B, C, ...), what it stands for
    "graft": ("graft.fullres", {"in_channels": 1, "out_channels": 2}, (2, 1, 20, 256, 256)),
    "rl4seg3d": ("rl4seg3d.unet3d", {"in_channels": 1, "out_channels": 3}, (1, 1, 256, 256, 4)),
}


class Silent:
    """Stands for the plugin manager."""

    def notify(self, hook: str, **facts: Any) -> None:
        """Tell nobody."""


def job(folder: Path, steps: int, device: str) -> TrainJob:
    """A job of so many steps that saves only at its end."""
    train = TrainConfig(max_steps=steps, checkpoint_every=10**6, device=device, threads=1)
    config = MethodConfig(method="bench", train=train)
    return TrainJob(method="bench", resolved=Resolved(config), run_dir=folder, manager=Silent())  # type: ignore[arg-type]


def network(width: int) -> nn.Module:
    """A small U-Net-like stack: enough work that a step is a step."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv3d(1, width, 3, padding=1)]
    for _ in range(4):
        layers += [
            nn.InstanceNorm3d(width, affine=True),
            nn.LeakyReLU(),
            nn.Conv3d(width, width, 3, padding=1),
        ]
    return nn.Sequential(*layers, nn.Conv3d(width, 2, 1))


def clock(device: str) -> float:
    """Seconds: of this process on a CPU, of the wall on a GPU when it has done everything."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def overhead(device: str, repeats: int, size: int) -> dict[str, float]:
    """Ratio of a step of `Runtime` to a plain step, their steps in turn."""
    x = torch.randn(2, 1, 8, size, size, device=device)
    plain = network(16).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)

    def plain_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = plain(x).square().mean()
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 12.0)
        optimizer.step()

    times: dict[str, list[float]] = {"plain": [], "medrl": []}
    with (
        tempfile.TemporaryDirectory() as scratch,
        job(Path(scratch) / "run", repeats + 3, device).runtime() as rt,
    ):
        net = rt.prepare(network(16))
        ours = torch.optim.AdamW(net.parameters(), lr=1e-4)
        rt.checkpoint.register(net=net, optimizer=ours)
        last = 0.0
        for step in rt.steps(rt.checkpoint.resume(), repeats + 3):
            if step > 3:
                times["medrl"].append(
                    clock(device) - last
                )  # the step before, and what `steps` does between two
            start = clock(device)
            plain_step()
            if step > 3:
                times["plain"].append(clock(device) - start)
            last = clock(device)
            rt.backward(net(x).square().mean(), cases=("a", "b"))
            rt.step(ours, clip_norm=12.0)
        world, grouped = rt.world_size, dist.is_initialized()
    ratios = [ours_s / plain_s for ours_s, plain_s in zip(times["medrl"], times["plain"], strict=True)]
    return {
        "ranks": float(world),
        "process_groups": float(grouped),
        "plain_s": statistics.median(times["plain"]),
        "medrl_s": statistics.median(times["medrl"]),
        "overhead_percent": 100.0
        * (statistics.median(times["medrl"]) / statistics.median(times["plain"]) - 1),
        "ratio_low": statistics.quantiles(ratios, n=20)[0],
        "ratio_high": statistics.quantiles(ratios, n=20)[-1],
    }


@contextmanager
def one_rank_of_a_launcher() -> Iterator[None]:
    """Let this process be the only rank that torchrun started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)


def in_rank(rank: int, port: int, folder: str, width: int) -> None:
    """Count the bytes of a step as one of two ranks, with medrl and with DDP."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    x = torch.randn(1, 1, 4, 8, 8)
    found: dict[str, Any] = {}
    with job(Path(folder) / "run", 4, "cpu").runtime() as rt:
        net = rt.prepare(network(width))
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        found["parameters"] = sum(item.numel() * item.element_size() for item in net.parameters())
        for step in rt.steps(rt.checkpoint.resume(), 4):
            with counted_traffic() as counted:
                loss = net(x).square().mean()
                rt.backward(loss)
                rt.step(optimizer)
                rt.log(step, loss=loss)
        found["medrl"] = counted.total
        found["kinds"] = counted.bytes
        sent = []

        def hook(_state: Any, bucket: Any) -> Any:
            sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return (
                dist.all_reduce(bucket.buffer(), async_op=True)
                .get_future()
                .then(lambda done: done.value()[0])
            )

        hook.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}
        ddp = nn.parallel.DistributedDataParallel(network(width))
        ddp.register_comm_hook(None, hook)
        for _ in range(3):
            sent.clear()
            ddp(x).square().mean().backward()
        found["ddp"] = sum(sent)
    if rank == 0:
        (Path(folder) / "bytes.json").write_text(json.dumps(found))


def bytes_of_a_step(width: int) -> dict[str, Any]:
    """Bytes of a step of two gloo ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(in_rank, args=(port, folder, width), nprocs=2)
        found: dict[str, Any] = json.loads((Path(folder) / "bytes.json").read_text())
    found["beside_ddp_percent"] = 100.0 * (found["medrl"] / found["ddp"] - 1)
    return found


def step_time(name: str, device: str, repeats: int, shrink: int) -> dict[str, Any]:
    """Seconds of one training step of a network of the table, and the bytes of its gradients."""
    key, parameters, shape = NETWORKS[name]
    manager = PluginManager.create(third_party=False)
    manager.load_all()
    net: nn.Module = manager.registry("models").build(key, **parameters).to(device)
    small = tuple(size // shrink if size >= 128 else size for size in shape)
    x = torch.randn(small, device=device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    kind = device.partition(":")[0]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            loss = total(net(x))
        loss.backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    times = []
    for _ in range(repeats):
        start = clock(device)
        step()
        times.append(clock(device) - start)
    return {
        "step_s": statistics.median(times),
        "operations": counter.get_total_flops(),
        "input": list(small),
        "gradient_bytes": sum(item.numel() * 4 for item in net.parameters() if item.requires_grad),
        "device": torch.cuda.get_device_name() if kind == "cuda" else "one CPU thread",
        "precision": "bf16" if kind == "cuda" else "fp32",
    }


def total(output: Any) -> Tensor:
    """Mean square of whatever a network returns."""
    if isinstance(output, Tensor):
        return output.float().square().mean()
    values = output.values() if isinstance(output, dict) else output
    return torch.stack([total(value) for value in values]).sum()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="a few small steps, to see that it works")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("medrl").setLevel(logging.ERROR)
    repeats, size, width = (6, 16, 16) if options.small else (options.repeats, 48, 64)
    found: dict[str, Any] = {"overhead": overhead(options.device, repeats, size)}
    with one_rank_of_a_launcher():
        found["launched"] = overhead(options.device, repeats, size)
    found["bytes"] = bytes_of_a_step(width)
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        name: (
            lambda name=name: step_time(
                name, options.device, 1 if options.small else 3, 4 if options.small else 1
            )
        )
        for name in NETWORKS
    }
    found["times"] = {name: measure() for name, measure in measures.items()}
    for name in ("overhead", "launched"):
        row = found[name]
        both = f"plain {row['plain_s']:.4f} s, medrl {row['medrl_s']:.4f} s"
        groups = f"{row['ranks']:.0f} rank, {row['process_groups']:.0f} process groups"
        print(f"{name}: {both}, {row['overhead_percent']:+.2f} % ({groups})")
    row = found["bytes"]
    print(f"bytes of a step: parameters {row['parameters']}, DDP {row['ddp']}, medrl {row['medrl']}")
    for name, row in found["times"].items():
        print(f"{name}: {row['step_s']:.4f} s a step of {row['input']} on {row['device']}")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
