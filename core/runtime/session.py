"""Opening and closing a run around the method's loop."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medrl.core import rng
from medrl.core.checkpoint import CheckpointStore, config_difference
from medrl.core.config import machine_keys, parse_yaml
from medrl.core.errors import CheckpointError, ConfigError, Interrupted, MedrlError, RuntimeFault
from medrl.core.runlog import RunFolder, TensorBoardSink
from medrl.core.runtime.checks import check_registered
from medrl.core.runtime.loader import worker_fault
from medrl.core.runtime.machine import Runtime
from medrl.core.runtime.ranks import Ranks, detect_ranks
from medrl.core.runtime.signals import StopFlag
from medrl.core.types import PLUGIN_API

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob

_log = logging.getLogger("medrl.runtime")
_PACKAGES = ("medrl", "torch", "monai", "torchio", "nibabel", "numpy", "scipy")


@contextmanager
def session(cls: type[Runtime], job: TrainJob) -> Iterator[Runtime]:
    """Open the machine of a job, hand it to the method, and write the outcome; see `Runtime.start`."""
    train = job.config.train
    place = detect_ranks()
    device = choose_device(str(train.device), local_rank=place.local_rank, world_size=place.world_size)
    if int(train.threads) > 0:
        torch.set_num_threads(int(train.threads))
    if "tensorboard" in train.log:
        TensorBoardSink.require()
    deterministic = torch.get_deterministic_debug_mode()
    if train.deterministic:
        rng.use_deterministic_algorithms()
    stop = StopFlag()
    stop.install()
    ranks: Ranks | None = None
    run: RunFolder | None = None
    rt: Runtime | None = None
    outcome = "failed"
    try:
        ranks = Ranks(place, timeout_s=float(train.timeout_s), cuda=device.type == "cuda")
        facts = plugin_facts(job)
        run = _open_everywhere(job, ranks, facts)
        ranks.watch(run.dir / ".ranks", _ender(run))
        ranks.meet("start")
        rng.seed_run(int(train.seed), ranks.rank)
        rt = cls(job, ranks=ranks, device=device, run=run, stop=stop)
        rt.checkpoint = _store(rt, facts)
        if ranks.is_main:
            run.note(
                **machine_facts(device, _PACKAGES),
                world_size=ranks.world_size,
                precision=str(train.precision),
                seed=int(train.seed),
                deterministic=bool(train.deterministic),
            )
            rt._observe = _observer(job)
        rt._observe("medrl_run_started", run=run)
        yield rt
        rt.finish()
        outcome = rt.outcome
    except Interrupted:
        outcome = "interrupted"
        raise
    except BaseException as error:
        if rt is not None:
            rt._close_loaders()
        fault = _translated(error, ranks)
        _record(fault or error, ranks)
        if fault is not None:
            raise fault from error
        raise
    finally:
        stop.restore()
        torch.set_deterministic_debug_mode(deterministic)
        if rt is not None:
            rt.run.manifest.update(rt._outcome())
            rt._observe("medrl_run_finished", run=run, outcome=outcome)
            rt._close()
        if ranks is not None:
            ranks.close(failed=outcome == "failed")
        if run is not None:
            run.close(outcome)  # writes the manifest, on the main rank


def choose_device(name: str, *, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """Return the device of this process: ``auto`` takes CUDA if there is one, else the CPU.

    Raises:
        ConfigError: The named device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or local_rank)
        if ":" in name and world_size > 1:
            raise ConfigError(
                f"device {name}", why=f"{world_size} ranks cannot share one GPU", do="--device cuda"
            )
        if index >= count:
            raise ConfigError(
                f"device cuda:{index}", why=f"torch sees {count} CUDA device(s)", do="--device cpu"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device mps", why="torch sees no Apple GPU", do="--device cpu")
        return torch.device("mps")
    if name == "cpu":
        return torch.device("cpu")
    raise ConfigError(f"device '{name}'", why="unknown", do="--device auto, cpu, cuda, cuda:1 or mps")


def plugin_facts(job: TrainJob) -> dict[str, Any]:
    """Return what a checkpoint says about its origin: method, plugin, interface version, config."""
    facts: dict[str, Any] = {
        "medrl": _version("medrl"),
        "torch": str(torch.__version__),
        "method": job.method,
        "distribution": "",
        "plugin_version": "",
        "api": PLUGIN_API,
        "config": job.resolved.values(),
        "config_hash": job.resolved.hash,
    }
    entries: Callable[[], Any] | None = getattr(job.manager, "entries", None)
    for entry in entries() if entries is not None else ():
        if entry.name == job.method:
            facts["distribution"] = str(entry.distribution or "")
            facts["plugin_version"] = str(entry.version or "")
            break
    return facts


# -- private ---------------------------------------------------------------------------------------


def _open_everywhere(job: TrainJob, ranks: Ranks, facts: dict[str, Any]) -> RunFolder:
    """Open the run folder on the main rank, then on the others; a failure of one is raised on all."""
    run: RunFolder | None = None
    failure: MedrlError | None = None
    if ranks.is_main:
        try:
            run = _open_run(job, facts)
            for leftover in (run.dir / ".ranks").glob("rank_*.json"):
                with suppress(OSError):
                    leftover.unlink()
        except MedrlError as error:
            failure = error
    ranks.raise_together("opening the run folder", failure)
    if run is None:
        run = RunFolder.attach(job.run_dir, rank=ranks.rank)
    return run


def _open_run(job: TrainJob, facts: dict[str, Any]) -> RunFolder:
    path = job.run_dir
    origin = {key: facts[key] for key in ("method", "distribution", "plugin_version", "api", "config_hash")}
    if not (path / "manifest.json").is_file():
        if job.resume == "must":
            raise CheckpointError(
                f"{path} holds no run to go on with",
                why="--resume must was given",
                do="train with --resume auto",
            )
        return RunFolder.create(
            path,
            config_yaml=job.resolved.to_yaml(),
            command=job.command,
            manifest={**origin, "git": git_commit(Path.cwd())},
        )
    if job.resume == "never":
        raise ConfigError(
            f"{path} already holds a run", why="--resume never was given", do="choose another folder with -o"
        )
    run = RunFolder.open(path)
    try:
        stored = parse_yaml(run.config_yaml, origin=str(path / "config.yaml"))
        changed = config_difference(stored, job.resolved.values(), machine_keys(type(job.config)))
        if changed:
            raise ConfigError(
                f"{path} holds a run with another config",
                why="stored → now",
                do=f"medrl resume {path} goes on with the stored one; another folder (-o) starts a new run",
                problems=changed,
            )
        run.replace_config(job.resolved.to_yaml(), shlex.join(job.command))
        run.note(**origin, status="running", resumed=int(run.manifest.get("resumed", 0)) + 1)
    except BaseException:
        run.close()
        raise
    return run


def _store(rt: Runtime, facts: dict[str, Any]) -> CheckpointStore:
    store = CheckpointStore(
        rt.run.checkpoints_dir,
        facts,
        keep=int(rt.train.keep_last),
        peers=rt.ranks,
        required=rt.job.resume == "must",
        machine=machine_keys(type(rt.job.config)),
    )
    store.capture_rank = rt._capture_rank
    store.restore_rank = rt._restore_rank
    store.capture_runtime = rt._capture_runtime
    store.restore_runtime = rt._restore_runtime
    store.on_resumed = rt._resumed

    def before_save() -> None:
        check_registered(rt._prepared, rt.checkpoint)
        rt.ranks.meet("saving")
        rt._stepper.share_buffers()

    def on_saved(path: Path, step: int) -> None:
        rt._observe("medrl_checkpoint_saved", run=rt.run, path=path, step=step)

    store.before_save = before_save
    store.on_saved = on_saved
    return store


def _observer(job: TrainJob) -> Callable[..., None]:
    load: Callable[[], None] | None = getattr(job.manager, "load_observers", None)
    if load is not None:
        load()
    return job.manager.notify


def _translated(error: BaseException, ranks: Ranks | None) -> MedrlError | None:
    """Return the handled error for a foreseeable cause, else None."""
    where = f"step {ranks.step}" if ranks is not None else "the start"
    cases = f", cases {', '.join(ranks.cases)}" if ranks is not None and ranks.cases else ""
    if isinstance(error, torch.OutOfMemoryError):
        return RuntimeFault(
            f"the GPU ran out of memory at {where}{cases}",
            why=str(error).splitlines()[0],
            do="--precision bf16, a smaller train.batch_size with train.accumulate, or a smaller patch",
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
        return RuntimeFault(
            f"batch normalisation sees one value in a channel at {where}{cases}",
            why=str(error).splitlines()[0],
            do="a larger train.batch_size, larger windows, or a model without batch normalisation",
        )
    if isinstance(error, RuntimeError) and not isinstance(error, MedrlError):
        return worker_fault(error)
    if isinstance(error, SystemExit) and ranks is not None and ranks.world_size > 1:
        return RuntimeFault(
            f"rank {ranks.rank} left at {where}{cases}",
            why=f"the method called sys.exit({error.code!r}) before the run was complete",
            do="end the loop on all ranks, by a value from rt.reduce",
        )
    return None


def _record(error: BaseException, ranks: Ranks | None) -> None:
    """Write a failure to the log, and to this rank's file for the others."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if ranks is None:
        _log.error("%s", text)
        return
    cases = f" (cases {', '.join(ranks.cases)})" if ranks.cases else ""
    _log.error("rank %d failed at step %d%s: %s", ranks.rank, ranks.step, cases, text)
    ranks.tell(error=text)


def _ender(run: RunFolder) -> Callable[[RuntimeFault], None]:
    def end(fault: RuntimeFault) -> None:
        _log.error("%s", fault)
        run.close("failed")

    return end


def machine_facts(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Return versions and hardware for the manifest."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_commit(start: Path) -> str:
    """Return the commit of the git repository around a folder, read from its files; empty without one."""
    for folder in (start, *start.parents):
        git = folder / ".git"
        if not git.is_dir():
            continue
        try:
            head = (git / "HEAD").read_text(encoding="utf-8").strip()
            if not head.startswith("ref: "):
                return head
            name = head.removeprefix("ref: ")
            if (git / name).is_file():
                return (git / name).read_text(encoding="utf-8").strip()
            for line in (git / "packed-refs").read_text(encoding="utf-8").splitlines():
                if line.endswith(f" {name}"):
                    return line.split()[0]
        except (OSError, UnicodeDecodeError):
            return ""
    return ""
