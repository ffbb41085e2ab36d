"""The checkpoints of one run: what is saved, how many are kept, and from which one a run goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from torch import nn

from medrl.core import rng
from medrl.core.checkpoint.compare import check_fits
from medrl.core.checkpoint.file import (
    Checkpoint,
    Written,
    load_checkpoint,
    peek_meta,
    sync_folder,
    write_checkpoint,
)
from medrl.core.checkpoint.foreign import load_into
from medrl.core.checkpoint.objects import has_state, load_state, same_on_all_ranks, state_of
from medrl.core.checkpoint.peers import Alone, Peers
from medrl.core.errors import CheckpointError, MedrlError, RuntimeFault

Kind = Literal["last", "best", "step"]
_log = logging.getLogger("medrl.checkpoint")
_STEP_FILE = re.compile(r"step_(\d{6,})\.pt")


class CheckpointStore:
    """Saves and restores the registered objects of a run.

    ``step_000500.pt`` is the state after 500 steps; ``last.pt`` is a hard link to the newest (a copy where
    the file system has no links), ``best.pt`` the state with the best metric. Each file carries its own
    digest. At least two states are kept, so that a damaged newest one has a predecessor.

    With several ranks every method is called by all of them; the main rank writes and reads, and an error of
    one rank is raised on all.

    Args:
        folder: ``checkpoints`` of the run folder.
        facts: Meta that every file carries (method, config, …).
        keep: How many states of kind ``last`` stay; less than two is raised to two.
        peers: The ranks.
        required: `resume` raises when there is no checkpoint.
        machine: Dotted config keys that a resumed run may change.

    Attributes:
        meta: Further meta, extended by `describe`.
        written: Size and digest of the last file that this process wrote.
        resumed: Whether `resume` was called.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        keep: int = 2,
        peers: Peers | None = None,
        required: bool = False,
        machine: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.facts = dict(facts)
        self.meta: dict[str, Any] = {"label_names": None, "channel_names": None, "spacing": None}
        self.keep = max(2, keep)
        self.written: Written | None = None
        self.resumed = False
        self.saved_step: int | None = None
        self.required = required
        self.machine = frozenset(machine)
        self._peers: Peers = peers or Alone()
        self._objects: dict[str, Any] = {}
        self._permanent: dict[str, bool] = {}
        self.capture_rank: Callable[[], dict[str, Any]] = lambda: {"rng": rng.capture()}
        self.restore_rank: Callable[[dict[str, Any], bool], None] = _restore_rng
        self.capture_runtime: Callable[[], dict[str, Any]] = dict
        self.restore_runtime: Callable[[dict[str, Any]], None] = lambda _state: None
        self.before_save: Callable[[], None] = lambda: None
        self.on_saved: Callable[[Path, int], None] = lambda _path, _step: None
        self.on_resumed: Callable[[int, Path | None], None] = lambda _step, _path: None
        if self._peers.rank == 0 and folder.is_dir():
            for leftover in folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    leftover.unlink()

    # -- what is saved -----------------------------------------------------------------------------

    def register(self, **objects: Any) -> None:
        """Name the objects whose state belongs to the run.

        Modules, optimisers, schedulers and gradient scalers are the same on all ranks and stored once.
        Everything else (baselines, samplers, `torch.Generator`, `numpy.random.Generator`, `random.Random`) is
        stored for each rank. Any object with ``state_dict`` and ``load_state_dict`` is accepted.

        Raises:
            RuntimeFault: A name is taken, an object has no state, or the run was already resumed.
        """
        for name, item in objects.items():
            if self.resumed:
                raise RuntimeFault(
                    f"'{name}' was registered after the run was resumed",
                    why="its state would not be restored",
                    do="call rt.checkpoint.register(...) before rt.checkpoint.resume()",
                )
            if name in self._objects and self._objects[name] is not item:
                raise RuntimeFault(
                    f"two objects are registered in the checkpoint as '{name}'", do="rename one"
                )
            if not has_state(item):
                raise RuntimeFault(
                    f"'{name}' cannot be registered in the checkpoint",
                    why=f"{type(item).__name__} has no state_dict and load_state_dict",
                    do="give it both, with tensors and plain types inside",
                )
            self._objects[name] = item

    def describe(self, **meta: Any) -> None:
        """Add what predictors need: ``label_names`` (name: number), ``channel_names``, ``spacing`` in mm."""
        self.meta.update(meta)

    def registered(self) -> Iterator[tuple[str, Any]]:
        """Yield the registered names and objects."""
        yield from self._objects.items()

    def covers(self, module: nn.Module) -> bool:
        """Whether a module is registered, alone or as a part of a registered module."""
        for item in self._objects.values():
            if isinstance(item, nn.Module) and any(part is module for part in item.modules()):
                return True
        return False

    def holds(self, item: object) -> bool:
        """Whether exactly this object is registered."""
        return any(item is known for known in self._objects.values())

    # -- saving ------------------------------------------------------------------------------------

    def save(self, step: int, *, kind: Kind = "last", metric: float | None = None) -> Path:
        """Save the state after `step` completed steps.

        Args:
            step: Completed steps.
            kind: ``last`` is kept until newer ones push it out, ``step`` for ever; ``best`` goes to
                ``best.pt``.
            metric: The value that made it the best.

        Raises:
            RuntimeFault: The disk is full; earlier checkpoints are untouched.
        """
        self.before_save()
        shared = {name: item.state_dict() for name, item in self._objects.items() if same_on_all_ranks(item)}
        own = self.capture_rank()
        own["objects"] = {
            name: state_of(item) for name, item in self._objects.items() if not same_on_all_ranks(item)
        }
        ranks = self._peers.exchange("checkpoint", own)
        path = self.folder / ("best.pt" if kind == "best" else f"step_{step:06d}.pt")
        failure: MedrlError | None = None
        if self._peers.rank == 0:
            meta = {
                **self.facts,
                **self.meta,
                "step": int(step),
                "metric": None if metric is None else float(metric),
                "kind": kind,
                "world_size": self._peers.world_size,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            try:
                states = {**shared, **ranks[0]["objects"]}
                self.written = write_checkpoint(
                    path, states, meta, ranks=ranks, runtime=self.capture_runtime()
                )
                if kind != "best":
                    self._permanent[path.name] = kind == "step"
                    self._point_last(path)
                    self._prune(step)
            except MedrlError as error:
                failure = error
        _raise_first(self._peers.exchange("checkpoint written", failure))
        if kind != "best":
            self.saved_step = step
        self.on_saved(path, step)
        return path

    @property
    def _last(self) -> Path:
        return self.folder / "last.pt"

    def _point_last(self, path: Path) -> None:
        """Make ``last.pt`` the same file as `path`, in one rename."""
        last = self._last
        temporary = self.folder / f".last.pt.{os.getpid()}.tmp"
        try:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(last)
            sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise RuntimeFault(
                f"checkpoint {last} cannot be written",
                why=f"{error.strerror or error}; {path.name} is complete ({path.stat().st_size} bytes)",
                do="free space on that disk, then medrl resume RUN",
            ) from error

    def _prune(self, newest: int) -> None:
        """Remove states beyond `keep`, and states after `newest`, which an abandoned continuation left."""
        ordinary: list[Path] = []
        for step, path in _step_files(self.folder):
            if path.name not in self._permanent:
                try:
                    self._permanent[path.name] = peek_meta(path).get("kind") == "step"
                except CheckpointError:
                    self._permanent[path.name] = False
            if step > newest or not self._permanent[path.name]:
                ordinary.append(path)
        current = [path for path in ordinary if _number(path) <= newest]
        for path in [*current[: -self.keep], *(path for path in ordinary if _number(path) > newest)]:
            with contextlib.suppress(OSError):
                path.unlink()
            self._permanent.pop(path.name, None)

    # -- resuming ----------------------------------------------------------------------------------

    def candidates(self) -> list[Path]:
        """Return the files that a run may go on from, the newest first; names of one file appear once."""
        found = [path for _, path in reversed(_step_files(self.folder))]
        for name in ("last.pt", "best.pt"):
            path = self.folder / name
            if path.is_file() and not any(path.samefile(other) for other in found):
                found.append(path)
        return found

    def resume(self) -> int:
        """Restore the newest intact state and return its number of completed steps; 0 if the run has none.

        A damaged file is reported in the log and its predecessor taken. Random number streams are restored
        last, so call this right before the loop.

        Raises:
            CheckpointError: Every file is damaged, or the state is of another method, config, label set or
                model.
        """
        self.resumed = True
        found: Checkpoint | None = None
        failure: MedrlError | None = None
        if self._peers.rank == 0:
            try:
                found = self._newest()
                if found is not None and _STEP_FILE.fullmatch(found.path.name) and not self._last.exists():
                    self._point_last(found.path)
            except MedrlError as error:
                failure = error
        _raise_first(self._peers.exchange("resume", failure))
        name, digest = self._peers.exchange("resume", (found.path.name, found.digest) if found else ("", ""))[
            0
        ]
        if not name:
            self.on_resumed(0, None)
            return 0
        try:
            if found is None:
                found = load_checkpoint(self.folder / name)
                if found.digest != digest:
                    raise CheckpointError(f"rank {self._peers.rank} read another {name} than the main rank")
            check_fits(
                found,
                facts=self.facts,
                described=self.meta,
                names=self._objects,
                machine=self.machine,
            )
            self._restore(found)
        except MedrlError as error:
            failure = error
        _raise_first(self._peers.exchange("resumed", failure))
        step = int(found.meta["step"]) if found else 0
        self.saved_step = step
        self.on_resumed(step, self.folder / name)
        if found is not None:
            self._restore_rank(found)
        return step

    def _newest(self) -> Checkpoint | None:
        candidates = self.candidates()
        broken: list[CheckpointError] = []
        for path in candidates:
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                broken.append(error)
                continue
            for damage in broken:
                _log.warning("%s; going on from %s (step %s)", damage, path.name, checkpoint.meta.get("step"))
            return checkpoint
        if broken:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is usable",
                why="; ".join(str(error) for error in broken),
                do=broken[0].do if len(broken) == 1 else "start a new run in another folder with -o",
            )
        if self.required:
            raise CheckpointError(
                f"no checkpoint in {self.folder}",
                why="--resume must was given",
                do="train with --resume auto",
            )
        return None

    def _restore(self, found: Checkpoint) -> None:
        version, now = found.meta.get("plugin_version"), self.facts.get("plugin_version")
        if version != now:
            _log.warning(
                "checkpoint %s was written by version %s of the plugin, this is %s", found.path, version, now
            )
        for name, item in self._objects.items():
            if not same_on_all_ranks(item):
                continue
            try:
                if isinstance(item, nn.Module):
                    load_into(item, found.states[name])
                else:
                    item.load_state_dict(found.states[name])
            except CheckpointError as error:
                raise CheckpointError(
                    f"checkpoint {found.path}, '{name}'", why=str(error), do=error.do
                ) from error
            except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
                raise CheckpointError(
                    f"checkpoint {found.path}, '{name}' does not fit",
                    why=str(error),
                    do="use the same settings again",
                ) from error
        self.restore_runtime(found.runtime)

    def _restore_rank(self, found: Checkpoint) -> None:
        same_world = len(found.ranks) == self._peers.world_size
        if not same_world:
            _log.warning(
                "checkpoint %s was written by %d processes and this run has %d: weights are exact, "
                "random numbers and the order of cases are not those of an uninterrupted run",
                found.path,
                len(found.ranks),
                self._peers.world_size,
            )
        failure: MedrlError | None = None
        try:
            own = found.ranks[self._peers.rank % len(found.ranks)]
            for name, item in self._objects.items():
                if not same_on_all_ranks(item):
                    load_state(item, own["objects"][name])
            self.restore_rank(own, same_world)
        except (
            ValueError,
            KeyError,
            RuntimeError,
            TypeError,
            AttributeError,
            IndexError,
            ZeroDivisionError,
        ) as error:
            failure = CheckpointError(
                f"checkpoint {found.path}: the state of rank {self._peers.rank} does not fit",
                why=f"{type(error).__name__}: {error}",
                do="use the version of medrl that wrote it",
            )
        _raise_first(self._peers.exchange("rank state", failure))


# -- private ---------------------------------------------------------------------------------------


def _restore_rng(state: dict[str, Any], exact: bool) -> None:
    if exact:
        rng.restore(state["rng"])


def _raise_first(failures: Sequence[MedrlError | None]) -> None:
    for failure in failures:
        if failure is not None:
            raise failure


def _number(path: Path) -> int:
    match = _STEP_FILE.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _step_files(folder: Path) -> list[tuple[int, Path]]:
    return sorted((_number(path), path) for path in folder.glob("step_*.pt") if _number(path) >= 0)
