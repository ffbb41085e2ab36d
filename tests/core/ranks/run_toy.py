"""One process of a toy run, alone or as one of two ranks: ``run_toy.py MODE FOLDER``, or `launch` in a fork.

It ends with the exit code of the command line. Forks have torch already, so many starts stay cheap.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import torch
import toy_run as toy
from torch import nn

from medrl.core.errors import DataError, MedrlError

fork = multiprocessing.get_context("fork")


def launch(mode, folder, *, ranks=1, timeout_s=60):
    """Start the processes of a run as forks of this one; messages go to ``FOLDER/stderr_<rank>``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            fork.Process(target=in_fork, args=(mode, folder, place if ranks > 1 else {}, timeout_s))
        )
        processes[-1].start()
    return processes


def launch_and_wait(mode, folder, ranks):
    """Start processes and wait for them, as a launcher does."""
    for process in launch(mode, folder, ranks=ranks):
        process.join()


def in_fork(mode, folder, place, timeout_s):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.stderr = (folder / f"stderr_{place.get('RANK', 0)}").open("w", buffering=1)
    main(mode, folder, timeout_s)


def parameters_equal_across_ranks(rt, net):
    sums = [tuple(tensor.double().sum().item() for tensor in net.state_dict().values())]
    every = rt.ranks.exchange("compare", (sums, toy.as_bytes(dict(net.state_dict()))))
    return all(item == every[0] for item in every)


def score_cases(rt, cases):
    """Score every case once over all ranks, as a validation does."""
    loader = rt.loader(toy.Cases(cases), batch_size=2, shuffle=False, name=f"score{cases}")
    found = {}
    for batch in loader.epoch():
        for name, x in zip(batch["case"], batch["x"], strict=True):
            found[name] = float(x.pow(2).mean())
    scores = rt.gather(found)
    return {"cases": list(scores), "mean": sum(scores.values()) / len(scores), "per_case": scores}


def resume(_mode, folder, _timeout_s):
    """Straight and resumed runs, agreement, metrics, an uneven vote: everything that ends well."""
    facts, rank = {}, int(os.environ["RANK"])
    for precision in ("fp32", "bf16"):
        toy.train(folder / f"straight_{precision}", 6, precision=precision, accumulate=2)
        toy.train(folder / f"parts_{precision}", 3, precision=precision, accumulate=2)
        toy.train(folder / f"parts_{precision}", 6, precision=precision, accumulate=2)
    spoil = lambda rt, step, loss: loss * float("nan") if (rt.rank, step) in {(1, 2), (1, 4)} else loss  # noqa: E731
    with toy.make_job(folder / "nan", 5).runtime() as rt:
        seen = []
        net, _ = toy.fit(
            rt,
            before=lambda rt, _step: seen.append(toy.as_bytes(rt._prepared[0][0].state_dict())),
            loss_of=spoil,
        )
        facts["unchanged"] = [seen[index] == seen[index + 1] for index in range(len(seen) - 1)]
        facts["parameters_equal"] = parameters_equal_across_ranks(rt, net)
        facts["scores"] = score_cases(rt, 5)
        facts["reduced"] = [rt.reduce(float(rt.rank + 1), op) for op in ("mean", "sum", "max", "min", "any")]
        facts["tensor"] = rt.reduce(torch.tensor([1.0, 3.0]) * (rt.rank + 1)).tolist()
        rt.log(5, both=float(rt.rank), same=0.1, vector=torch.tensor([float(rt.rank), 1.0]))
    with toy.make_job(folder / "mixed", 2).runtime() as rt:
        net = rt.prepare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rt.checkpoint.register(net=net, optimizer=optimizer)
        x = torch.ones(1, 2) * (rt.rank + 1)
        for _ in rt.steps(rt.checkpoint.resume(), 1):
            # rank 1 uses both layers, rank 0 only the first: the absent gradient counts as zero
            rt.backward((net(x) if rt.rank else net[0](x)).sum())
            before = net[1].bias.detach().clone()
            rt.step(optimizer)
            facts["half"] = (before - net[1].bias.detach()).tolist()
        facts["mixed_equal"] = parameters_equal_across_ranks(rt, net)
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


def fault(mode, folder, timeout_s):
    """Train until rank 1 misbehaves at step 3, as the mode says."""

    def misbehave(rt, step):
        if rt.rank != 1 or step != 3:
            return
        rt.backward(torch.zeros(1, requires_grad=True).sum(), cases=["case_bad"])
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "raise":
            raise DataError("case case_bad", why="half of it is missing", case="case_bad")
        if mode == "defect":
            raise ValueError("a defect of the method")
        if mode == "exit":
            sys.exit(0)
        if mode == "hard_exit":
            os._exit(0)
        if mode == "sleep":
            time.sleep(600)
        if mode == "early":
            raise StopIteration

    job = toy.make_job(folder / "run", 8, timeout_s=timeout_s, checkpoint_every=2)
    with job.runtime() as rt:
        try:
            toy.fit(rt, before=misbehave)
        except StopIteration:
            return


def full(mode, folder, timeout_s):
    """Train as ``straight_fp32`` of `resume`; mode ``full``: the folder of rank 0 is full before a save.

    A limit of the file size stands for the disk, since a root user can fill anything else.
    """

    def fill(rt, step):
        if mode == "full" and rt.is_main and step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    toy.train(folder / "run", 6, before=fill, accumulate=2, timeout_s=timeout_s)


def signals(_mode, folder, _timeout_s):
    """Train for long, so that a signal can arrive; tell when the run is under way."""

    def wait(rt, step):
        if step == 2:
            (folder / f"pid_{rt.rank}").write_text(str(os.getpid()))
            (folder / f"ready_{rt.rank}").write_text("")
        time.sleep(0.02)

    toy.train(folder / "run", 50_000, before=wait, checkpoint_every=100_000)


def stubborn(_mode, folder, _timeout_s):
    """Never finish a step; tell when the first signal was noticed."""

    def hang(rt, _step):
        def tell():
            while not rt.stop_requested:
                time.sleep(0.01)
            (folder / "flagged").write_text("")

        threading.Thread(target=tell, daemon=True).start()
        (folder / "ready_0").write_text("")
        while True:
            time.sleep(0.05)

    toy.train(folder / "run", 5, before=hang)


def main(mode, folder, timeout_s=60):
    torch.set_num_threads(1)
    actions = {"resume": resume, "full": full, "room": full, "signals": signals, "stubborn": stubborn}
    action = actions.get(mode, fault)
    try:
        action(mode, folder, timeout_s)
    except MedrlError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
