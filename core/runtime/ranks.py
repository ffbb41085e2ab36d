"""The processes of one run: who they are, how they agree, and who is to blame when one falls silent.

Before every exchange all ranks compare what they are about to do (a small integer vector over gloo). So ranks
that took different branches get an error that names them, and never a hang or mixed-up numbers. Each rank
also keeps a small file with its step, cases and number of exchanges; from it the others tell which rank died,
failed or hangs.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from medrl.core.errors import EXIT_RUNTIME, ConfigError, MedrlError, RuntimeFault
from medrl.core.runlog.lock import process_alive

T = TypeVar("T")
_log = logging.getLogger("medrl.ranks")
_HEADER = 6
_BUCKET_BYTES = 64 * 2**20
_START_S = 300.0
_store: Any = None
_sessions = 0


@dataclass(frozen=True)
class Place:
    """Where a process stands among the processes of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = ""


def detect_ranks(environ: Mapping[str, str] | None = None) -> Place:
    """Tell from the environment whether torchrun or srun started this process, and as which rank.

    A batch script of Slurm without ``srun`` counts as one process.

    Raises:
        ConfigError: The variables contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        place = _place(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", "torchrun")
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        place = _place(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "srun")
    else:
        return Place()
    if not 0 <= place.rank < place.world_size:
        raise ConfigError(
            f"rank {place.rank} of {place.world_size} processes",
            why="the variables that the launcher sets contradict each other",
            do="unset RANK and WORLD_SIZE, or start through torchrun or medrl train --devices N",
        )
    return place


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list.

    Example:
        >>> first_host("node[03-05,09],login1"), first_host("a1,a2")
        ('node03', 'a1')
    """
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return (match.group(1) + (match.group(2) or "")) if match else "127.0.0.1"


class Ranks:
    """The ranks of a run; with one process every method returns at once.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        is_main: Whether this is rank 0.
        step: Step that this rank works on, for messages.
        cases: Cases that this rank works on, for messages.
    """

    def __init__(self, place: Place, *, timeout_s: float, cuda: bool) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self.local_rank = place.local_rank
        self.is_main = place.rank == 0
        self.timeout_s = timeout_s
        self.step = 0
        self.cases: tuple[str, ...] = ()
        self._calls = 0
        self._owns_group = False
        self._cuda = cuda
        self._file: int | None = None
        self._folder: Path | None = None
        self._error = ""
        self._doing = "start"
        self._launcher = os.getppid() if place.launcher else 0
        self._watch: threading.Event | None = None
        self._watcher: threading.Thread | None = None
        if self.world_size > 1:
            self._connect(place)

    # -- agreement ---------------------------------------------------------------------------------

    def meet(self, doing: str, *flags: int) -> list[list[int]]:
        """Wait for all ranks and return the flags (up to three integers) of each, in rank order.

        Args:
            doing: What this rank is about to do; every rank must say the same, at the same step.
            flags: Integers to share.

        Raises:
            RuntimeFault: The ranks do different things, or one of them died, failed or did not answer in
                time.
        """
        padded = [*flags, 0, 0, 0][:3]
        if self.world_size == 1:
            return [padded]
        self._calls += 1
        code = zlib.crc32(doing.encode())
        mine = torch.tensor([code, self.step, self._calls, *padded], dtype=torch.int64)
        every = [torch.empty(_HEADER, dtype=torch.int64) for _ in range(self.world_size)]
        with self.speaking(doing):
            dist.all_gather(every, mine)
        heads = [[int(number) for number in head] for head in every]
        odd = [rank for rank, head in enumerate(heads) if head[0] != code or head[1] != self.step]
        if odd:
            raise self._diverged(doing, odd, heads)
        return [head[3:] for head in heads]

    def exchange(self, doing: str, value: T) -> list[T]:
        """Return the values of all ranks in rank order; any picklable object of this program is a value."""
        if self.world_size == 1:
            return [value]
        self.meet(doing)
        every: list[Any] = [None] * self.world_size
        with self.speaking(doing):
            dist.all_gather_object(every, value)
        return every

    def raise_together(self, doing: str, failure: MedrlError | None) -> None:
        """Raise the first failure of any rank on all ranks."""
        for error in self.exchange(doing, failure):
            if error is not None:
                raise error

    # -- tensors -----------------------------------------------------------------------------------

    def gather_tensor(self, doing: str, value: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks in rank order; shapes must agree."""
        if self.world_size == 1:
            return [value]
        shapes = self.meet(doing, zlib.crc32(repr((tuple(value.shape), value.dtype)).encode()))
        if any(shape != shapes[0] for shape in shapes):
            raise RuntimeFault(
                f"{doing}: the ranks have tensors of different shapes", why=f"here {tuple(value.shape)}"
            )
        every = [torch.empty_like(value) for _ in range(self.world_size)]
        with self.speaking(doing):
            dist.all_gather(every, value.contiguous())
        return every

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by its mean over the ranks, in place.

        Tensors are packed by data type into buckets, in the given order, and the ring of a fixed number of
        ranks adds
        in a fixed order: the same numbers on every rank and in every repetition. All ranks must have met
        before.
        """
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            with self.speaking("averaging gradients"):
                dist.all_reduce(flat)
            flat /= self.world_size
            _unpack(flat, bucket)

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace every tensor by that of rank 0, in place. All ranks must have met before."""
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            with self.speaking("broadcast"):
                dist.broadcast(flat, src=0)
            _unpack(flat, bucket)

    # -- blame -------------------------------------------------------------------------------------

    def watch(self, folder: Path, on_lost: Callable[[RuntimeFault], None]) -> None:
        """Start keeping this rank's file in `folder`, and end this process when another rank is lost.

        A rank that hangs in its own code would never notice that the others are gone, so a thread looks once
        a second and, if this process does not end by itself soon after, calls `on_lost` and exits with code
        1. The same when the launcher that started this rank is gone, such as torchrun's agent of a node.
        """
        if self.world_size == 1:
            return
        self._folder = folder
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.open(folder / f"rank_{self.rank}.json", flags, 0o644)
        self.tell()
        self._watch = threading.Event()
        self._watcher = threading.Thread(
            target=self._look, args=(self._watch, on_lost), name="medrl-ranks", daemon=True
        )
        self._watcher.start()

    def tell(self, *, error: str = "", left: bool = False) -> None:
        """Write this rank's step, cases and failure to its file, for the others to read after a fault."""
        if error and not self._error:
            self._error = error
        if self._file is None:
            return
        facts = {
            "rank": self.rank,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "step": self.step,
            "cases": list(self.cases)[:8],
            "calls": self._calls,
            "doing": self._doing,
            "error": self._error,
            "left": left,
        }
        text = json.dumps(facts).encode()
        with suppress(OSError):
            os.pwrite(self._file, text.ljust(4096) if len(text) < 4096 else text, 0)

    def lost(self) -> str:
        """Return what happened to another rank that failed or died, or an empty text."""
        for facts in self._others():
            where = _where(facts)
            if facts.get("error"):
                return f"rank {facts['rank']} failed at {where}: {facts['error']}"
            here = facts.get("host") == socket.gethostname()
            if here and not facts.get("left") and not process_alive(int(facts["pid"])):
                return f"rank {facts['rank']} died at {where}"
        return ""

    def close(self, *, failed: bool) -> None:
        """Leave the group. After a failure the others notice at once, since the connections close."""
        if self._watch is not None:
            self._watch.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            # A thread that still runs when the interpreter ends can abort the process.
            self._watcher.join(timeout=5.0)
        if self.world_size > 1:
            self.tell(left=not failed)
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if not failed and self.is_main and self._folder is not None:
            for path in self._folder.glob("rank_*.json"):
                with suppress(OSError):
                    path.unlink()
            with suppress(OSError):
                self._folder.rmdir()
        if self._owns_group and dist.is_initialized() and not (failed and self._cuda):
            with suppress(RuntimeError):
                dist.destroy_process_group()

    @contextmanager
    def speaking(self, doing: str) -> Iterator[None]:
        """Turn the failure of an exchange into an error that names the rank at fault."""
        self._doing = doing
        self.tell()
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise self._blame(doing, error, time.monotonic() - started) from error

    # -- private -----------------------------------------------------------------------------------

    def _connect(self, place: Place) -> None:
        global _store, _sessions  # one store serves all sessions of a process
        if dist.is_initialized():
            return
        if place.launcher == "srun":
            os.environ.setdefault(
                "MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
            )
            job = int(os.environ.get("SLURM_JOB_ID", "0")) * 7 + int(os.environ.get("SLURM_STEP_ID", "0"))
            os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))
        try:
            patience = timedelta(seconds=max(self.timeout_s, _START_S))
            if _store is None:
                meeting = rendezvous("env://", self.rank, self.world_size, timeout=patience)
                _store = next(iter(meeting))[0]
            _sessions += 1
            here = [f"medrl{_sessions}/here/{rank}" for rank in range(self.world_size)]
            _store.set(here[self.rank], "")
            _store.wait(here, patience)  # importing torch takes some ranks longer than others
            dist.init_process_group(
                backend="cpu:gloo,cuda:nccl" if self._cuda else "gloo",
                store=PrefixStore(f"medrl{_sessions}", _store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            raise RuntimeFault(
                f"rank {self.rank} of {self.world_size} cannot reach the others",
                why=str(error).strip().splitlines()[0],
                do="start all ranks together with torchrun, srun or medrl train --devices N",
            ) from error
        self._owns_group = True

    def _diverged(self, doing: str, odd: list[int], heads: list[list[int]]) -> RuntimeFault:
        told = {facts["rank"]: facts for facts in self._others()}
        parts = [f"rank {self.rank}: {doing} at step {self.step}"]
        for rank in odd:
            parts.append(
                f"rank {rank}: {told.get(rank, {}).get('doing', 'something else')} at step {heads[rank][1]}"
            )
        return RuntimeFault(
            f"the ranks do different things{_case_text(self.cases)}",
            why="; ".join(parts),
            do="decide by a value from rt.reduce every branch around rt.step, rt.log, rt.gather and break",
        )

    def _blame(self, doing: str, error: RuntimeError, waited_s: float) -> RuntimeFault:
        cause = self.lost()
        deadline = time.monotonic() + 2.0
        while not cause and waited_s < self.timeout_s * 0.9 and time.monotonic() < deadline:
            time.sleep(0.1)
            cause = self.lost()
        if not cause:
            late = [facts for facts in self._others() if int(facts.get("calls", 0)) < self._calls]
            if late and waited_s >= self.timeout_s * 0.9:
                cause = "; ".join(
                    f"rank {facts['rank']} gave no answer for {self.timeout_s:g} s, last at {_where(facts)}"
                    for facts in late
                )
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        return RuntimeFault(
            f"rank {self.rank} cannot go on at step {self.step}{_case_text(self.cases)}, {doing}",
            why=cause or f"another rank is gone: {first}",
            do="medrl resume RUN goes on from the last checkpoint; train.timeout_s sets how long ranks wait",
        )

    def _others(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for rank in range(self.world_size):
            if rank == self.rank or self._folder is None:
                continue
            with suppress(OSError, ValueError):
                facts = json.loads((self._folder / f"rank_{rank}.json").read_text())
                if isinstance(facts, dict):
                    found.append(facts)
        return found

    def _look(self, stop: threading.Event, on_lost: Callable[[RuntimeFault], None]) -> None:
        while not stop.wait(1.0):
            orphan = self._launcher > 1 and os.getppid() != self._launcher
            if not orphan and not self.lost():
                continue
            if orphan:  # nobody would end this rank, and nobody would learn how it ended
                self.tell(error=f"its launcher, process {self._launcher}, is gone")
            if stop.wait(0.0 if orphan else 5.0):
                return
            cause = self._error if orphan else self.lost() or "another rank is gone"
            on_lost(
                RuntimeFault(
                    f"rank {self.rank} ends at step {self.step}{_case_text(self.cases)}, {self._doing}",
                    why=cause,
                    do="medrl resume RUN goes on from the last checkpoint",
                )
            )
            os._exit(EXIT_RUNTIME)


def _place(env: Mapping[str, str], rank: str, world: str, local: str, launcher: str) -> Place:
    try:
        return Place(int(env[rank]), int(env[world]), int(env.get(local, "0")), launcher)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{rank} and {world} must be numbers", why=str(error), do=f"unset {rank}"
        ) from error


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        bucket: list[torch.Tensor] = []
        size = 0
        for tensor in group:
            nbytes = tensor.numel() * tensor.element_size()
            if bucket and size + nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += nbytes
        if bucket:
            yield bucket


@torch.no_grad()
def _unpack(flat: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    start = 0
    for tensor in bucket:
        tensor.detach().copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def _case_text(cases: Sequence[str]) -> str:
    return f" (cases {', '.join(cases)})" if cases else ""


def _where(facts: Mapping[str, Any]) -> str:
    return f"step {facts.get('step')}{_case_text(facts.get('cases') or ())}"
