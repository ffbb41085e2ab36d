"""One checkpoint as one self-contained file.

Layout::

    zip archive as torch.save writes it | meta as UTF-8 JSON | footer of 64 bytes
    footer = b"medrl-ck" | zip length (8 bytes, little-endian) | meta length (8) | reserved (8) | SHA-256 (32)

The digest covers everything before it: archive, meta and the first half of the footer. It stands at the end,
so saving is one pass, and torch, which looks for its archive from the front and the back, can still open the
file. Meta is JSON beside the archive, so it is read without unpickling. Loading reads the bytes once,
compares the digest, and unpickles those same bytes with ``weights_only=True``.

A file appears under its name only when it is complete: temporary file in the same folder, fsync, rename,
fsync of the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from medrl.core.checkpoint.state import pack, size_of, unpack
from medrl.core.errors import CheckpointError, RuntimeFault
from medrl.core.types import PLUGIN_API

SCHEMA = 1
"""Version of the file layout and of the keys of meta."""

_MAGIC = b"medrl-ck"
_HEAD = struct.Struct("<8sQQ8x")
_FOOTER = _HEAD.size + 32
_META_LIMIT = 64 * 2**20
_MARGIN = 2**20


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: The file.
        meta: Plain facts: ``schema, medrl, torch, method, distribution, plugin_version, api, config,
            config_hash, label_names, channel_names, spacing, step, metric, kind, world_size, created``.
        states: State of each registered object by its name.
        ranks: For each rank: random number streams, loader positions, and the objects that differ between
            ranks.
        runtime: Counters of the runtime.
        digest: SHA-256 as hexadecimal text.
    """

    path: Path
    meta: dict[str, Any]
    states: dict[str, Any]
    ranks: list[dict[str, Any]] = field(default_factory=list)
    runtime: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A saved file: its path, size in bytes and SHA-256."""

    path: Path
    size: int
    digest: str


def write_checkpoint(
    path: Path,
    states: Mapping[str, Any],
    meta: Mapping[str, Any],
    *,
    ranks: list[dict[str, Any]] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Written:
    """Write a checkpoint so that `path` holds the old or the new file at every instant.

    Raises:
        RuntimeFault: The disk is full or not writable; the temporary file is gone and the old file untouched.
        CheckpointError: A state holds something other than tensors and plain types.
    """
    payload = pack(
        {"states": dict(states), "ranks": ranks or [], "runtime": dict(runtime or {})}, "checkpoint"
    )
    text = _meta_bytes({"schema": SCHEMA, **meta})
    needed = size_of(payload) + len(text) + _FOOTER
    check_space(path, needed)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            sink = _HashingFile(file)
            torch.save(payload, cast(BinaryIO, sink))
            length = sink.size
            sink.write(text)
            sink.write(_HEAD.pack(_MAGIC, length, len(text)))
            digest = sink.hash.digest()
            sink.write(digest)
            if sink.error is not None:
                raise sink.error
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RuntimeFault(
            f"checkpoint {path} cannot be written",
            why=f"{error.strerror or error}; it needs about {needed} bytes",
            do="free space on that disk, then medrl resume RUN; earlier checkpoints are kept",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return Written(path=path, size=sink.size, digest=digest.hex())


def check_space(path: Path, needed: int) -> None:
    """Raise before a byte is written if the disk of `path` has less than `needed` bytes left."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise RuntimeFault(
            f"checkpoint {path} cannot be written",
            why=error.strerror or str(error),
            do="make the run folder writable",
        ) from error
    if free < needed + _MARGIN:
        raise RuntimeFault(
            f"checkpoint {path} cannot be written",
            why=f"it needs about {needed} bytes and the disk has {free} left",
            do="free space on that disk, then medrl resume RUN; earlier checkpoints are kept",
        )


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_checkpoint(path: Path) -> bool:
    """Whether a file ends as a checkpoint of medrl does; one that is cut short does not.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _FOOTER, 0))
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read", why=error.strerror or str(error)
        ) from error


def read_meta(path: Path) -> dict[str, Any]:
    """Return the meta of a checkpoint after verifying the digest of the whole file; nothing is unpickled.

    Raises:
        CheckpointError: No checkpoint of medrl, or a damaged one.
    """
    return _read_verified(path, keep=False)[1]


def peek_meta(path: Path) -> dict[str, Any]:
    """Return the meta without verifying the digest: for choosing between files, never for using one."""
    try:
        with path.open("rb") as file:
            _, meta, _, _ = _read_tail(path, file)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read", why=error.strerror or str(error)
        ) from error
    return _parse_meta(path, meta)


def load_checkpoint(path: Path, *, method: str | None = None) -> Checkpoint:
    """Load a checkpoint onto the CPU.

    The digest comes first, then schema, method and plugin, then the tensors with ``weights_only=True``.

    Args:
        path: The file; see `find_checkpoint` for run folders.
        method: The method that the caller is; another method's checkpoint is refused.

    Raises:
        CheckpointError: Missing, damaged, foreign, of another schema or method, or its plugin is not
            installed.
    """
    try:
        payload, meta, digest = _read_verified(path)
    except CheckpointError as error:
        other = _fallback(path)
        if other is not None and path.is_file():
            raise CheckpointError(error.what, why=error.why, do=f"use {other}, which is intact") from error
        raise
    check_meta(path, meta, method=method)
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of errors for unusable archives
        raise CheckpointError(
            f"checkpoint {path} cannot be loaded",
            why=_first_line(error),
            do="medrl model info FILE shows its origin",
        ) from error
    del payload
    if not isinstance(content, dict) or not isinstance(content.get("states"), dict):
        raise CheckpointError(f"checkpoint {path} cannot be loaded", why="it holds no states")
    content = unpack(content)
    return Checkpoint(
        path=path,
        meta=meta,
        states=content["states"],
        ranks=list(content.get("ranks", [])),
        runtime=dict(content.get("runtime", {})),
        digest=digest,
    )


def check_meta(path: Path, meta: Mapping[str, Any], *, method: str | None) -> None:
    """Raise unless schema, method, plugin interface and installed plugin fit."""
    schema = meta.get("schema")
    if schema != SCHEMA:
        raise CheckpointError(
            f"checkpoint {path} has schema {schema}",
            why=f"this medrl reads schema {SCHEMA}",
            do=f"pip install 'medrl=={meta.get('medrl', 'VERSION')}', which wrote it",
        )
    found = meta.get("method")
    if method is not None and found != method:
        raise CheckpointError(
            f"checkpoint {path} belongs to method '{found}'",
            why=f"method '{method}' was asked for",
            do=f"use method '{found}', or a checkpoint of '{method}'",
        )
    api = meta.get("api", PLUGIN_API)
    distribution = str(meta.get("distribution") or "")
    release = f"{distribution}=={meta['plugin_version']}" if meta.get("plugin_version") else distribution
    if api != PLUGIN_API:
        raise CheckpointError(
            f"checkpoint {path} was written with plugin API {api}",
            why=f"this medrl has plugin API {PLUGIN_API}",
            do=f"pip install 'medrl=={meta.get('medrl', 'VERSION')}'" + (f" '{release}'" if release else ""),
        )
    if distribution:
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise CheckpointError(
                f"checkpoint {path} needs the plugin '{found}'",
                why=f"its package {distribution} is not installed",
                do=f"pip install '{release}'",
            ) from error


def find_checkpoint(path: Path, which: str = "best") -> Path:
    """Return the checkpoint of a run folder, or `path` itself if it is a file.

    Args:
        path: A run folder, its ``checkpoints`` folder, or a file.
        which: ``best``, ``last`` or a name such as ``step_000500``. Without a best one, the last is taken.

    Raises:
        CheckpointError: There is none.
    """
    if path.is_file():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    names = [which, "last"] if which == "best" else [which]
    for name in names:
        found = folder / f"{name}.pt"
        if found.is_file():
            return found
    steps = sorted(folder.glob("step_*.pt"))
    if steps and which in {"best", "last"}:
        return steps[-1]
    raise CheckpointError(
        f"no checkpoint in {path}",
        why=f"{folder / (names[0] + '.pt')} does not exist" if path.exists() else "it does not exist",
        do="name a run folder that saved one (medrl runs list), or the file itself",
    )


# -- private ---------------------------------------------------------------------------------------


class _HashingFile(io.RawIOBase):
    """Passes bytes on and hashes them; keeps the first failure, which torch's archive writer must not see."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.error is None:
            self.hash.update(view)
            try:
                self._file.write(view)
            except OSError as error:
                self.error = error
        self.size += len(view)
        return len(view)


def _meta_bytes(meta: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(meta, ensure_ascii=False, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "the facts of a checkpoint cannot be stored",
            why=str(error),
            do="use text, numbers, lists and dicts",
        ) from error


def _read_tail(path: Path, file: BinaryIO) -> tuple[int, bytes, bytes, bytes]:
    """Return the archive's length, the meta bytes, the footer's first half and the recorded digest."""
    size = file.seek(0, os.SEEK_END)
    if size < _FOOTER:
        raise _damaged(path, f"it has {size} bytes and ends before its footer")
    file.seek(size - _FOOTER)
    footer = file.read(_FOOTER)
    head, digest = footer[: _HEAD.size], footer[_HEAD.size :]
    magic, length, meta_length = _HEAD.unpack(head)
    if magic != _MAGIC:
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise _damaged(
                path,
                "it does not end with the footer of a medrl checkpoint: cut short, or of another program",
            )
        raise CheckpointError(
            f"{path} is no checkpoint of medrl",
            why="its footer is missing",
            do="weights of other programs: --init-from FILE; a damaged file: use an earlier checkpoint",
        )
    if meta_length > _META_LIMIT or length + meta_length + _FOOTER != size:
        raise _damaged(path, f"its lengths do not add up to its {size} bytes")
    file.seek(length)
    return length, file.read(meta_length), head, digest


def _read_verified(path: Path, *, keep: bool = True) -> tuple[bytes, dict[str, Any], str]:
    """Read the file once, compare the digest; return archive bytes (empty unless `keep`), meta and digest."""
    try:
        with path.open("rb") as file:
            length, meta, head, recorded = _read_tail(path, file)
            file.seek(0)
            hasher = hashlib.sha256()
            if keep:
                payload = file.read(length)
                hasher.update(payload)
            else:
                payload = b""
                remaining = length
                while remaining > 0 and (block := file.read(min(remaining, 2**20))):
                    hasher.update(block)
                    remaining -= len(block)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {path} does not exist",
            do="medrl runs list shows the runs, medrl runs show RUN the files",
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read", why=error.strerror or str(error)
        ) from error
    hasher.update(meta)
    hasher.update(head)
    if hasher.digest() != recorded:
        raise _damaged(
            path, f"its SHA-256 is {hasher.hexdigest()[:12]}… and {recorded.hex()[:12]}… was recorded"
        )
    return payload, _parse_meta(path, meta), recorded.hex()


def _parse_meta(path: Path, text: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise _damaged(path, "its meta is no JSON") from error
    if not isinstance(meta, dict):
        raise _damaged(path, "its meta is no JSON object")
    return meta


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is damaged", why=why, do="copy it again, or use another checkpoint of the run"
    )


def _fallback(path: Path) -> Path | None:
    """Return another checkpoint beside a damaged one that verifies, the newest first."""
    others = [
        path.with_name("last.pt"),
        *sorted(path.parent.glob("step_*.pt"), reverse=True),
        path.with_name("best.pt"),
    ]
    for other in others:
        if other == path or not other.is_file() or (path.is_file() and other.samefile(path)):
            continue
        with contextlib.suppress(CheckpointError):
            read_meta(other)
            return other
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
