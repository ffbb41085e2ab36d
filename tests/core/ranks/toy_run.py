"""A tiny method for the tests of the runtime: jobs, data, a loop, and states as bytes.

The loop draws from every kind of random stream and has dropout, batch statistics, a scheduler and a baseline:
whatever a resume forgets changes the result.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medrl.core.config import MethodConfig, Resolved, TrainConfig
from medrl.core.jobs import TrainJob


class Manager:
    """Stands for the plugin manager; keeps what observers are told."""

    def __init__(self):
        self.told = []

    def notify(self, hook, **facts):
        self.told.append((hook, facts))


class Cases(torch.utils.data.Dataset):
    """Eight cases with random augmentation from three libraries."""

    def __init__(self, size=8):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = torch.randn(3) + float(np.random.rand()) + random.random()
        return {"x": noise + index, "case": f"case_{index}"}


class Baseline:
    """A moving average that differs between ranks."""

    def __init__(self):
        self.value = 0.0

    def update(self, value):
        self.value = 0.9 * self.value + 0.1 * value

    def state_dict(self):
        return {"value": self.value, "recent": np.array([self.value, 1.0])}

    def load_state_dict(self, state):
        assert state["recent"].dtype == np.float64
        self.value = state["value"]


def make_job(folder, steps, *, method="toy", resume="auto", extra=None, manager=None, **train):
    """Return a job of `steps` steps in a run folder."""
    train = {"checkpoint_every": 2, "lr": 1e-2, **train}
    config = MethodConfig(method=method, train=TrainConfig(max_steps=steps, **train))
    return TrainJob(
        method=method,
        resolved=Resolved(config),
        run_dir=Path(folder),
        manager=manager or Manager(),
        resume=resume,
        command=("medrl", "train", method),
        extra=extra or {},
    )


def network():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def fit(rt, *, before=None, loss_of=None):
    """Train; `before(rt, step)` runs before each step, `loss_of(rt, step, loss)` may change the loss."""
    net, critic = rt.prepare(network(), nn.Linear(3, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=rt.job.config.train.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.9)
    critic_optimizer = torch.optim.SGD(critic.parameters(), lr=1e-2, momentum=0.9)
    baseline, actions = Baseline(), torch.Generator().manual_seed(5 + rt.rank)
    rt.checkpoint.register(
        net=net,
        critic=critic,
        optimizer=optimizer,
        scheduler=scheduler,
        critic_optimizer=critic_optimizer,
        baseline=baseline,
        actions=actions,
    )
    labels = {"background": 0, "lesion": 1}
    rt.checkpoint.describe(label_names=labels, channel_names=["T2"], spacing=[3.0, 1.0, 1.0])
    batches = rt.loader(Cases(), batch_size=2, shuffle=True)
    for step in rt.steps(rt.checkpoint.resume(), rt.job.config.train.max_steps):
        if before is not None:
            before(rt, step)
        cases, total = [], 0.0
        for _ in rt.micro_batches():
            batch = next(batches)
            with rt.autocast():
                loss = (net(batch["x"]) ** 2).mean() + 0.1 * torch.rand(1, generator=actions).sum()
                loss = loss * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))
            if loss_of is not None:
                loss = loss_of(rt, step, loss)
            rt.backward(loss, cases=batch["case"])
            cases += batch["case"]
            total += float(loss.detach())
        info = rt.step(optimizer, clip_norm=1.0)
        if info.applied:
            scheduler.step()
            baseline.update(total)
            rt.backward((critic(batch["x"]) - baseline.value).pow(2).mean(), cases=cases)
            rt.step(critic_optimizer)
        rt.log(step, loss=total, grad_norm=info.grad_norm, applied=info.applied, rank=float(rt.rank))
    return net, optimizer


def train(folder, steps, **options):
    """Run a job from beginning to end."""
    hooks = {key: options.pop(key) for key in ("before", "loss_of") if key in options}
    with make_job(folder, steps, **options).runtime() as rt:
        return fit(rt, **hooks)


def as_bytes(value):
    """Return nested values with every tensor as its bytes, for exact comparison."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(item) for item in value]
    return value


def state_of(folder):
    """Return everything that the last checkpoint of a run holds, as bytes."""
    from medrl.core.checkpoint import load_checkpoint

    found = load_checkpoint(Path(folder) / "checkpoints" / "last.pt")
    return {
        "states": as_bytes(found.states),
        "ranks": as_bytes(found.ranks),
        "runtime": as_bytes(found.runtime),
        "step": found.meta["step"],
    }
