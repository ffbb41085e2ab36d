"""``medrl doctor``: what this machine and installation can do; one fix for each problem."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, counted, size, write_json
from medrl.cli.options import json_option
from medrl.cli.session import manager_of
from medrl.core.errors import EXIT_OK, EXIT_RUNTIME, MedrlError

GOOD, NOTE, BAD = "ok", "note", "problem"
COLOURS = {GOOD: "green", NOTE: "yellow", BAD: "red"}
SHARED_MEMORY = 512 * 2**20
"""Bytes of /dev/shm below which data-loader workers run into trouble with 3D images."""
OPEN_FILES = 4096
FREE_DISK = 5 * 2**30
FREE_MEMORY = 2 * 2**30
TOOL_S = 15.0
PING = "scontrol ping"
EXTRAS = {
    "io": ("h5py", "pydicom", "ismrmrd"),
    "log": ("tensorboard",),
    "slurm": ("submitit",),
    "export": ("safetensors", "onnx", "onnxscript", "onnxruntime"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        state: ``ok``, ``note`` (something is limited) or ``problem``.
        do: One command that mends it.
    """

    area: str
    what: str
    state: str = GOOD
    do: str = ""


@click.command("doctor", short_help="Check this installation; one fix for each problem.")
@click.option("--strict", is_flag=True, help="Notes count as problems too.")
@json_option()
@click.pass_context
def doctor(ctx: click.Context, strict: bool, as_json: bool) -> int:
    """Check Python, packages, accelerators, ranks, Slurm, memory, limits, folders and plugins.

    The exit code is 1 if there is a problem; with --strict also if something is limited.
    """
    screen = console()
    screen.loading()
    findings: list[Finding] = []
    for area, examine in examinations(ctx):
        try:
            found = list(examine())
        except Exception as error:  # noqa: BLE001 - one examination that fails must not hide the others
            found = [
                Finding(
                    area,
                    f"could not be examined: {type(error).__name__}: {error}",
                    BAD,
                    "medrl --debug doctor",
                )
            ]
        findings += found
        if not as_json:
            for finding in found:
                show(finding)
    bad = [item for item in findings if item.state == BAD or (strict and item.state == NOTE)]
    if as_json:
        write_json({"ok": not bad, "strict": strict, "findings": [asdict(item) for item in findings]})
    else:
        text = counted(len(bad), "problem") if bad else "no problems"
        write = screen.line if bad else screen.say
        write(screen.style(text, fg="red" if bad else "green", bold=True))
    return EXIT_RUNTIME if bad else EXIT_OK


def show(finding: Finding) -> None:
    """Write one finding, with its fix if it is no good news."""
    screen = console()
    write = screen.say if finding.state == GOOD else screen.line
    write(
        f"{screen.style(finding.state.ljust(7), fg=COLOURS[finding.state])}  {finding.area}: {finding.what}"
    )
    if finding.do and finding.state != GOOD:
        write(f"         do: {finding.do}")


def examinations(ctx: click.Context) -> list[tuple[str, Callable[[], Iterator[Finding]]]]:
    """Return what is examined, in order."""
    return [
        ("python", python),
        ("packages", packages),
        ("accelerators", accelerators),
        ("ranks", ranks),
        ("launcher", launcher),
        ("slurm", slurm),
        ("memory", memory),
        ("shared memory", shared_memory),
        ("open files", open_files),
        ("folders", folders),
        ("plugins", lambda: plugins(ctx)),
    ]


def python() -> Iterator[Finding]:
    """Examine the interpreter and medrl itself."""
    text = f"{platform.python_version()} in {sys.prefix}, {platform.platform()}"
    yield Finding("python", text)
    yield Finding(
        "medrl", f"{importlib.metadata.version('medrl')} in {Path(__file__).resolve().parent.parent}"
    )


def packages() -> Iterator[Finding]:
    """Examine the packages that medrl requires, and the optional ones."""
    good = []
    for requirement in importlib.metadata.requires("medrl") or []:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[<>=!~;\[ (]", requirement, maxsplit=1)[0]
        wanted = requirement[len(name) :].partition(";")[0].strip(" ()")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("packages", f"{name} is not installed", BAD, f"pip install '{name}{wanted}'")
            continue
        if satisfies(version, wanted):
            good.append(f"{name} {version}")
        else:
            yield Finding(
                "packages", f"{name} {version}, medrl needs {wanted}", BAD, f"pip install '{name}{wanted}'"
            )
    yield Finding("packages", ", ".join(good))
    for extra, names in EXTRAS.items():
        missing = [name for name in names if not _installed(name)]
        if missing:
            yield Finding(
                "packages",
                f"optional, not installed: {', '.join(missing)}",
                NOTE,
                f"pip install 'medrl[{extra}]'",
            )


def satisfies(version: str, wanted: str) -> bool:
    """Say whether a version fits ``>=1.2,<2``; only the leading numbers are compared."""
    have = _numbers(version)
    for part in filter(None, (item.strip() for item in wanted.split(","))):
        match = re.match(r"(>=|<=|==|<|>|!=|~=)\s*(.+)", part)
        if match is None:
            continue
        sign, limit = match[1], _numbers(match[2])
        length = max(len(have), len(limit))
        left = have + (0,) * (length - len(have))
        right = limit + (0,) * (length - len(limit))
        fits = {
            ">=": left >= right,
            "<=": left <= right,
            "==": left == right,
            "<": left < right,
            ">": left > right,
            "!=": left != right,
            "~=": left >= right and left[: len(limit) - 1] == limit[:-1],
        }
        if not fits[sign]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def accelerators() -> Iterator[Finding]:
    """Examine torch and what it can compute on, with a small sum on each device."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cpu", f"{cores} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    found = False
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = True
            facts = torch.cuda.get_device_properties(index)
            name = f"cuda:{index} {facts.name}, {size(facts.total_memory)}"
            try:
                total = float(torch.ones(8, device=f"cuda:{index}").sum())
            except RuntimeError as error:
                yield Finding("gpu", f"{name} does not compute: {_first(error)}", BAD, "nvidia-smi")
                continue
            bf16 = "bf16 " if torch.cuda.is_bf16_supported() else "no bf16 "
            yield Finding("gpu", f"{name}, {bf16}" + ("computes" if total == 8.0 else "computes wrongly"))
    elif shutil.which("nvidia-smi") and Path("/dev/nvidia0").exists():
        build = torch.version.cuda
        why = f"this torch is for CUDA {build}" if build else "this torch is built without CUDA"
        do = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        yield Finding("gpu", f"there is an NVIDIA GPU that torch cannot use: {why}", BAD, do)
        found = True
    if torch.backends.mps.is_available():
        found = True
        yield Finding("gpu", "mps, the GPU of this Mac")
    if not found:
        yield Finding("gpu", "none; medrl computes on the CPU: use --preset smoke or small")


def ranks() -> Iterator[Finding]:
    """Examine whether ranks can talk to each other: a group of one over gloo, and NCCL where it is needed."""
    import tempfile

    import torch
    from torch import distributed

    if not distributed.is_available():
        yield Finding(
            "ranks", "this torch has no torch.distributed", BAD, "pip install --force-reinstall torch"
        )
        return
    if distributed.is_initialized():
        yield Finding("ranks", "a process group is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            backend: Any = distributed
            store = backend.FileStore(str(Path(folder) / "store"), 1)
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            try:
                total = torch.ones(1)
                distributed.all_reduce(total)
            finally:
                distributed.destroy_process_group()
        except (RuntimeError, OSError) as error:
            do = (
                "check that the host name resolves: getent hosts $(hostname), or export GLOO_SOCKET_IFNAME=lo"
            )
            yield Finding("ranks", f"gloo does not start: {_first(error)}", BAD, do)
            return
    nccl = ", nccl" if distributed.is_nccl_available() else ""
    yield Finding("ranks", f"gloo{nccl}: --devices N works")
    if torch.cuda.device_count() > 1 and not distributed.is_nccl_available():
        yield Finding("ranks", "several GPUs and no NCCL", BAD, "pip install --force-reinstall torch")


def launcher() -> Iterator[Finding]:
    """Tell which rank of how many this process is, and who says so."""
    from medrl.core.runtime.ranks import detect_ranks

    try:
        place = detect_ranks()
    except MedrlError as error:
        yield Finding("launcher", f"{error.what}: {error.why}", BAD, error.do)
        return
    if place.launcher:
        text = f"rank {place.rank} of {place.world_size}, local rank {place.local_rank}, started by"
        yield Finding("launcher", f"{text} {place.launcher}")
    else:
        yield Finding("launcher", "one process; torchrun, srun or --devices N start more")


def slurm() -> Iterator[Finding]:
    """Examine whether Slurm is there and answers."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if job:
        again = os.environ.get("SLURM_RESTART_COUNT", "")
        text = f"inside job {job}" + (f", started again {again} times" if again else "")
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        yield Finding("slurm", f"{text}, on {nodes}" if nodes else text)
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if len(missing) == 3:
        yield Finding("slurm", "not here: --executor local")
        return
    if missing:
        yield Finding("slurm", f"{', '.join(missing)} missing", NOTE, "ask the administrator of this cluster")
        return
    try:
        version = _squeue("--version").stdout.strip() or "of unknown version"
        state = _squeue("--noheader", f"--user={os.getuid()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("slurm", f"its commands do not answer: {_first(error)}", NOTE, "scontrol ping")
        return
    if state.returncode:
        why = (state.stderr.strip().splitlines() or ["no reason given"])[0]
        yield Finding("slurm", f"{version} is installed, its controller does not answer: {why}", NOTE, PING)
        return
    jobs = len(state.stdout.splitlines())
    yield Finding("slurm", f"{version} answers; {counted(jobs, 'job')} of yours in the queue")
    if not _installed("submitit"):
        yield Finding("slurm", "--executor slurm needs submitit", NOTE, "pip install 'medrl[slurm]'")


def _squeue(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - Slurm's own tool
        [shutil.which("squeue") or "squeue", *words],
        capture_output=True,
        text=True,
        timeout=TOOL_S,
        check=False,
    )


def memory() -> Iterator[Finding]:
    """Tell how much memory is free, for --jobs and --max-memory."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        total, free = (
            int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
            for name in ("MemTotal", "MemAvailable")
        )
    except (OSError, TypeError):
        yield Finding("memory", "this system does not tell")
        return
    state = NOTE if free < FREE_MEMORY else GOOD
    do = "fewer --jobs and --workers, or predict with --max-memory" if state == NOTE else ""
    yield Finding("memory", f"{size(free)} of {size(total)} free", state, do)


def shared_memory() -> Iterator[Finding]:
    """Examine /dev/shm, through which data-loader workers hand over tensors."""
    path = Path("/dev/shm")  # noqa: S108 - the shared memory of Linux, only looked at
    if not path.is_dir():
        yield Finding("shared memory", "this system has no /dev/shm")
        return
    total = shutil.disk_usage(path).total
    if total < SHARED_MEMORY:
        yield Finding(
            "shared memory",
            f"{size(total)} in /dev/shm, little for data-loading workers",
            NOTE,
            "docker run --shm-size=8g …, or train with --workers 0",
        )
    else:
        yield Finding("shared memory", f"{size(total)} in /dev/shm")


def open_files() -> Iterator[Finding]:
    """Examine the limit of open files; memory-mapped caches and workers need many."""
    try:
        import resource
    except ImportError:
        yield Finding("open files", "this system has no such limit")
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        yield Finding("open files", f"up to {soft}" if soft != resource.RLIM_INFINITY else "no limit")
        return
    target = 65536 if hard in (resource.RLIM_INFINITY,) or hard >= 65536 else hard
    do = f"ulimit -n {target}" if target > soft else "ask the administrator to raise nofile in limits.conf"
    yield Finding("open files", f"at most {soft}, few for workers and memory-mapped files", NOTE, do)


def folders() -> Iterator[Finding]:
    """Examine the folders that medrl writes to: here and the cache."""
    from medrl.core.cache import cache_root

    for name, path in (("this folder", Path.cwd()), ("cache", cache_root())):
        there = path
        while not there.exists() and there != there.parent:
            there = there.parent
        if not os.access(there, os.W_OK):
            do = "export MEDRL_CACHE=FOLDER" if name == "cache" else "cd to a folder that can be written"
            yield Finding(name, f"{path} cannot be written", BAD, do)
            continue
        free = shutil.disk_usage(there).free
        if free < FREE_DISK:
            do = "medrl cache clean" if name == "cache" else "free space on this disk"
            yield Finding(name, f"{path}: only {size(free)} free", NOTE, do)
        else:
            yield Finding(name, f"{path}: {size(free)} free")


def plugins(ctx: click.Context) -> Iterator[Finding]:
    """Examine every plugin with its package and file, and whether its commands can be imported."""
    manager = manager_of(ctx)
    manager.load_all()
    if manager.policy.path is not None:
        yield Finding("plugins", f"policy {manager.policy.path}")
    for entry in manager.entries():
        text = f"{entry.name} of {entry.owner} ({entry.origin}), {entry.file or entry.module}"
        if entry.status == "loaded":
            problem = _commands_problem(manager, entry.name)
            if problem is not None:
                do = problem.do or f"pip install --force-reinstall {entry.distribution}"
                yield Finding("plugin", f"{text}: {problem.why or problem.what}", BAD, do)
            elif entry.reason:
                yield Finding("plugin", f"{text}: {entry.reason}", NOTE)
            else:
                yield Finding("plugin", text)
        elif entry.status == "broken":
            do = (
                _advice(manager, entry.name)
                or f"pip install --upgrade --force-reinstall {entry.distribution}"
            )
            yield Finding("plugin", f"{text}: {entry.reason}", BAD, do)
        elif entry.status == "duplicate":
            yield Finding("plugin", f"{text}: {entry.reason}", NOTE, f"pip uninstall {entry.distribution}")
        else:
            yield Finding("plugin", f"{text}: {entry.status}, {entry.reason}")


def _commands_problem(manager: Any, name: str) -> MedrlError | None:
    try:
        commands = manager.commands(name)
        for kind in commands.provided():
            getattr(commands, kind)
        _ = commands.tools
    except MedrlError as error:
        return error
    return None


def _advice(manager: Any, name: str) -> str:
    try:
        manager.load(name)
    except MedrlError as error:
        return error.do
    return ""


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
