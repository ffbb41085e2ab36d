"""The folder of one training run."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.runlog.lock import RunLock

STATUSES = ("running", "finished", "interrupted", "failed")
_log = logging.getLogger("medrl.runlog")


class RunFolder:
    """The files of one run; only the main rank writes config, manifest and metrics.

    ::

        config.yaml  command.txt  manifest.json  metrics.jsonl  log.txt  run.lock  checkpoints/

    Attributes:
        dir: The folder.
        checkpoints_dir: ``dir/checkpoints``.
        manifest: Facts of the run as plain values; written by `note`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any] | None = None) -> None:
        self.dir = path
        self.manifest: dict[str, Any] = manifest or {}
        self._lock = RunLock(path / "run.lock")
        self._metrics_fd: int | None = None
        self._handler: logging.Handler | None = None

    # -- opening and closing -----------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        config_yaml: str,
        command: Sequence[str] = (),
        manifest: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Make a new run folder, take its lock and write config, command and manifest.

        Raises:
            RuntimeFault: The folder cannot be written, or another run holds it.
            ConfigError: The folder already holds a run.
        """
        run = cls(path, dict(manifest or {}))
        try:
            run.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        run._lock.acquire()
        try:
            if run.manifest_path.exists():
                raise ConfigError(
                    f"{path} already holds a run", do=f"medrl resume {path}, or choose another folder with -o"
                )
            run._write(path / "config.yaml", config_yaml)
            run._write(path / "command.txt", shlex.join(command) + "\n")
            run.note(created=_now(), status="running")
            run.log_to_file()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path, *, lock: bool = True) -> RunFolder:
        """Open an existing run folder, to go on with it (`lock`) or only to read it.

        Raises:
            ConfigError: There is no run at `path`.
            RuntimeFault: Another run holds it, or its manifest is damaged.
        """
        run = cls(path)
        if not run.manifest_path.is_file():
            raise ConfigError(f"{path} holds no run", why="manifest.json is missing", do="medrl runs list")
        if lock:
            run._lock.acquire()
        try:
            run.manifest = run._read_manifest()
            if lock:
                run.log_to_file()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def attach(cls, path: Path, *, rank: int) -> RunFolder:
        """Open, from another rank, the folder that the main rank holds; warnings go to its ``log.txt``."""
        run = cls(path)
        run.manifest = run._read_manifest()
        run.log_to_file(rank=rank)
        return run

    def close(self, status: str | None = None) -> None:
        """Write the final status (main rank), close the files and release the lock.

        A full disk is logged and does not hide the error that ended the run.
        """
        try:
            if status is not None and self._lock.held:
                self.note(status=status, ended=_now())
        except RuntimeFault as error:
            _log.warning("the status '%s' could not be written: %s", status, error)
        finally:
            if self._metrics_fd is not None:
                os.close(self._metrics_fd)
                self._metrics_fd = None
            if self._handler is not None:
                logging.getLogger("medrl").removeHandler(self._handler)
                with contextlib.suppress(OSError, ValueError):
                    self._handler.close()
                self._handler = None
            self._lock.release()

    # -- paths and facts ---------------------------------------------------------------------------

    @property
    def checkpoints_dir(self) -> Path:
        """The folder of the checkpoints."""
        return self.dir / "checkpoints"

    @property
    def manifest_path(self) -> Path:
        """The file with the facts of the run."""
        return self.dir / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        """The file with one JSON object a record."""
        return self.dir / "metrics.jsonl"

    @property
    def config_yaml(self) -> str:
        """The text of ``config.yaml``."""
        try:
            return (self.dir / "config.yaml").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RuntimeFault(f"{self.dir / 'config.yaml'} cannot be read", why=str(error)) from error

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``interrupted`` or ``failed``."""
        return str(self.manifest.get("status", ""))

    @property
    def owner(self) -> dict[str, Any]:
        """Process, host and start of the run that holds the lock; empty if none does."""
        return self._lock.owner()

    def note(self, **facts: Any) -> None:
        """Merge facts into the manifest and write it; values must be plain JSON types."""
        self.manifest.update(facts)
        self._write(
            self.manifest_path, json.dumps(_plain(self.manifest), indent=2, ensure_ascii=False) + "\n"
        )

    def replace_config(self, config_yaml: str, command: str) -> None:
        """Write the config of a continued run, and add its command to ``command.txt``."""
        self._write(self.dir / "config.yaml", config_yaml)
        path = self.dir / "command.txt"
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._write(path, f"{before}{command}\n")

    # -- metrics -----------------------------------------------------------------------------------

    def metrics(self, step: int, **values: object) -> None:
        """Append one record ``{"step": …, name: value, …}``; a number that is not finite is written as null.

        Raises:
            RuntimeFault: The disk is full or the file cannot be written.
        """
        self._append({"step": int(step), **{key: _plain(value) for key, value in values.items()}})

    def event(self, step: int, event: str, **values: object) -> None:
        """Append a record of something that happened, such as a skipped step, under an ``event`` name."""
        self._append(
            {"step": int(step), "event": event, **{key: _plain(value) for key, value in values.items()}}
        )

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records in order; a last line cut short by a kill is left out."""
        if not self.metrics_path.is_file():
            return
        with self.metrics_path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record

    def truncate_metrics(self, step: int) -> int:
        """Drop the records after `step`, because they will be written again; return how many were dropped."""
        if not self.metrics_path.is_file():
            return 0
        kept: list[str] = []
        dropped = 0
        for record in self.records():
            at = record.get("step")
            if isinstance(at, int) and at > step:
                dropped += 1
            else:
                kept.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
        if self._metrics_fd is not None:
            os.close(self._metrics_fd)
            self._metrics_fd = None
        self._write(self.metrics_path, "".join(line + "\n" for line in kept))
        return dropped

    # -- text log ----------------------------------------------------------------------------------

    def log_to_file(self, *, rank: int = 0) -> None:
        """Send the messages of the ``medrl`` loggers to ``log.txt``: from other ranks, only warnings."""
        try:
            handler = logging.FileHandler(self.dir / "log.txt", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.dir, error) from error
        who = f" rank {rank}" if rank else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(levelname)s %(name)s: %(message)s"))
        handler.setLevel(logging.WARNING if rank else logging.INFO)
        logger = logging.getLogger("medrl")
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        self._handler = handler

    # -- private -----------------------------------------------------------------------------------

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            if self._metrics_fd is None:
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._metrics_fd = os.open(self.metrics_path, flags, 0o644)
                if _ends_mid_line(self._metrics_fd):
                    line = b"\n" + line
            written = os.write(self._metrics_fd, line)
            while written < len(line):
                written += os.write(self._metrics_fd, line[written:])
        except OSError as error:
            raise RuntimeFault(
                f"{self.metrics_path} cannot be written",
                why=f"{error.strerror} ({len(line)} bytes)",
                do=f"free space on that disk, then medrl resume {self.dir}",
            ) from error

    def _write(self, path: Path, text: str) -> None:
        """Write a small file so that a kill leaves the old or the new text, never a mixture."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise RuntimeFault(
                f"{path} cannot be written",
                why=f"{error.strerror} ({len(text.encode())} bytes)",
                do="free space on that disk, correct the permissions, or choose another folder with -o",
            ) from error

    def _read_manifest(self) -> dict[str, Any]:
        try:
            value = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RuntimeFault(f"{self.manifest_path} cannot be read", why=str(error)) from error
        if not isinstance(value, dict):
            raise RuntimeFault(f"{self.manifest_path} cannot be read", why="it holds no JSON object")
        return value


def new_run_name(method: str, fold: int | str | None, config_hash: str) -> str:
    """Return the name of a new run folder, such as ``2026-11-21_graft_fold0_a1b2``."""
    parts = [datetime.now().astimezone().date().isoformat(), method]
    if fold is not None:
        parts.append(f"fold{fold}")
    parts.append(config_hash[:4])
    return "_".join(parts)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _unwritable(path: Path, error: OSError) -> RuntimeFault:
    return RuntimeFault(
        f"run folder {path} cannot be written",
        why=error.strerror or str(error),
        do="choose another folder with -o, or correct its permissions",
    )


def _ends_mid_line(fd: int) -> bool:
    """Whether the last byte of a regular file is no line end, as after a kill during a write."""
    try:
        size = os.fstat(fd).st_size
        return size > 0 and os.pread(fd, 1, size - 1) != b"\n"
    except OSError:
        return False


def _plain(value: object) -> object:
    """Return a value as JSON types: paths become text, and numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    to_list = getattr(value, "tolist", None)
    if callable(to_list):
        return _plain(to_list())
    return str(value)
