"""One rank of a run over two nodes, as torchrun starts it: ``run_nodes.py MODE FOLDER``."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import toy_run as toy
from torch import nn

from medrl.core.errors import MedrlError
from medrl.core.runtime.traffic import counted_traffic


class Fixed(torch.utils.data.Dataset):
    """Cases without augmentation: what a step computes depends on nothing but which cases are in it."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(3, generator=generator), "case": f"case_{index:02d}"}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def train(folder, steps, *, batch_size, accumulate=1, before=None):
    """Train without anything random; return the weights and the scores of all cases."""
    with toy.make_job(folder, steps, accumulate=accumulate, checkpoint_every=2, timeout_s=60).runtime() as rt:
        net = rt.prepare(network())
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        rt.checkpoint.describe(label_names={"background": 0}, channel_names=["x"], spacing=[1.0, 1.0, 1.0])
        batches = rt.loader(Fixed(), batch_size=batch_size, shuffle=True)
        for step in rt.steps(rt.checkpoint.resume(), steps):
            if before is not None:
                before(rt, step)
            for _ in rt.micro_batches():
                batch = next(batches)
                rt.backward((net(batch["x"]) ** 2).mean(), cases=batch["case"])
            rt.step(optimizer, clip_norm=1.0)
        scores = {}
        for batch in rt.loader(Fixed(), batch_size=5, shuffle=False, name="scores").epoch():
            with torch.no_grad():
                for name, x in zip(batch["case"], batch["x"], strict=True):
                    scores[name] = float(net(x[None]).sum())
        return net.state_dict(), rt.gather(scores)


def good(folder):
    """Everything that ends well, from one start of both agents."""
    found = {}
    for name, options in {
        "plain": {"batch_size": 2},
        "again": {"batch_size": 2},
        "accumulated": {"batch_size": 1, "accumulate": 2},
    }.items():
        weights, scores = train(folder / name, 6, **options)
        exact = {key: value.numpy().tobytes().hex() for key, value in weights.items()}
        found[name] = {"weights": json.dumps(exact), "scores": scores}
        torch.save(dict(weights), folder / f"{name}_{os.environ['RANK']}.pt")
    found["traffic"] = traffic(folder / "traffic")
    train(folder / "stop", 3, batch_size=2)
    _, scores = train(folder / "stop", 6, batch_size=2)
    found["resumed"] = scores
    found["place"] = {key: os.environ[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK")}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def traffic(folder):
    """Bytes that a step sends, with one micro-batch and with four, beside the bytes of the parameters."""
    found = {}
    for accumulate in (1, 4):
        with toy.make_job(folder / str(accumulate), 3, accumulate=accumulate).runtime() as rt:
            net = rt.prepare(nn.Sequential(nn.Linear(3, 512), nn.Linear(512, 512), nn.Linear(512, 1)))
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
            rt.checkpoint.register(net=net, optimizer=optimizer)
            parameters = sum(item.numel() * item.element_size() for item in net.parameters())
            for step in rt.steps(rt.checkpoint.resume(), 3):
                with counted_traffic() as counted:
                    for _ in rt.micro_batches():
                        rt.backward(net(torch.ones(2, 3)).mean())
                    rt.step(optimizer)
                    rt.log(step, loss=1.0)
        found[str(accumulate)] = {
            "total": counted.total,
            "reduced": counted.bytes["all_reduce"],
            "reductions": counted.calls["all_reduce"],
            "parameters": parameters,
        }
    return found


def srun(folder):
    """Two ranks of srun; a job that was queued again goes on. The first time it is told to stop at step 3."""

    def wait(rt, step):
        if step == 3 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            (folder / f"ready_{rt.rank}").write_text("")
            while not rt.stop_requested:
                time.sleep(0.02)

    weights, scores = train(folder / "run", 6, batch_size=2, before=wait)
    rank = os.environ["SLURM_PROCID"]
    torch.save(dict(weights), folder / f"weights_{rank}.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps(scores))


def long(folder):
    """Train for long, so that somebody can be killed; tell when the run is under way."""

    def wait(rt, step):
        if step == 3:
            (folder / f"pid_{rt.rank}").write_text(str(os.getpid()))
        time.sleep(0.02)

    train(folder / "run", 20_000, batch_size=2, before=wait)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        {"good": good, "srun": srun, "long": long}[sys.argv[1]](Path(sys.argv[2]))
    except MedrlError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
