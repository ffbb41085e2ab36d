"""Content-addressed store of arrays: atomic, verified, memory-mapped, shared by workers and ranks.

One entry is one file, ``<root>/<first two of key>/<key>.mrc`` (`medrl.core.cache_entry`). The key is a hash
of the content, the parameters and the code version, so that an entry never becomes stale: other parameters
are another entry. Nothing is pickled. A write goes to a temporary file and is renamed; it is not forced to
the disk, because the digest finds what a power cut damaged, and the entry is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from medrl.core.cache_entry import (
    Arrays,
    CachedArrays,
    DamagedEntry,
    entry_in_memory,
    entry_size,
    open_entry,
    plain,
    plain_arrays,
    write_entry,
)
from medrl.core.errors import ConfigError, RuntimeFault

__all__ = ["Cache", "CacheInfo", "CachedArrays", "cache_root", "file_hash", "make_key"]

Made: TypeAlias = "Arrays | tuple[Arrays, Mapping[str, Any]]"

_KEY = re.compile(r"[0-9a-f]{16,128}")
_ENTRY = re.compile(r"([0-9a-f]{16,128})\.mrc")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.[^/]*\.tmp|[0-9a-f]{16,128}\.lock")
_STALE_S = 3600.0

_log = logging.getLogger("medrl.cache")


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """How much a cache holds, or how much was removed from it.

    Attributes:
        temporary: Unfinished files: of writers at work, or forgotten by killed ones.
    """

    root: Path
    entries: int
    bytes: int
    temporary: int


class Cache:
    """A folder of entries that any number of processes may read and write at the same time.

    Args:
        root: Folder; made when the first entry is written.
        max_bytes: Entries used least recently are removed when the sum grows beyond it; None is no limit.

    Raises:
        ConfigError: If `max_bytes` is not positive.
    """

    def __init__(self, root: Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ConfigError("cache", why=f"max_bytes is {max_bytes}", do="give a positive size or none")
        self.root = Path(root)
        self.max_bytes = max_bytes
        self._warned = False

    def path(self, key: str) -> Path:
        """File of an entry, whether it exists or not.

        Raises:
            ConfigError: If the key is not lower-case hexadecimal, as `make_key` gives it.
        """
        if not _KEY.fullmatch(key):
            raise ConfigError(
                "cache", why=f"{key!r} is no key", do="make keys with medrl.core.cache.make_key"
            )
        return self.root / key[:2] / f"{key}.mrc"

    def get(self, key: str) -> CachedArrays | None:
        """Open an entry, or return None if there is none or it was damaged.

        The digest is checked when this process opens the entry for the first time. A damaged entry is
        removed, with a warning.
        """
        path = self.path(key)
        try:
            return open_entry(path)
        except FileNotFoundError:
            return None
        except DamagedEntry:
            pass
        except OSError as error:
            _log.warning("cache entry %s cannot be read (%s)", path, error.strerror or error)
            return None
        try:
            return open_entry(path)  # another process may just have replaced it with a whole one
        except FileNotFoundError:
            return None
        except (DamagedEntry, OSError) as error:
            _log.warning("cache entry %s is damaged: %s; it is removed and made again", path, error)
            _remove(path)
            return None

    def put(self, key: str, arrays: Arrays, meta: Mapping[str, Any] | None = None) -> CachedArrays:
        """Store arrays under a key and return the stored entry; an entry that is there is replaced.

        Args:
            key: From `make_key`.
            arrays: numpy arrays or CPU tensors (bfloat16 too) by name.
            meta: Plain values: text, numbers, booleans, None, lists and dicts of them.

        Raises:
            ConfigError: If an array type or a value of `meta` cannot be stored.
            RuntimeFault: If the file cannot be written; nothing is left behind.
        """
        path = self.path(key)
        ready, types = plain_arrays(arrays)
        values = plain(dict(meta or {}), "meta")
        try:
            self._write(path, ready, types, values)
        except OSError as error:
            raise RuntimeFault(
                f"cache entry {path}",
                why=f"{entry_size(ready)} bytes could not be written ({error.strerror or error})",
                do="free space with `medrl cache clean`, or choose another folder with MEDRL_CACHE",
            ) from error
        try:
            entry = open_entry(path)
        except FileNotFoundError:
            # Another process cleaned the cache in this instant; the caller still gets its arrays.
            return entry_in_memory(ready, types, values)
        except (DamagedEntry, OSError) as error:
            raise RuntimeFault(
                f"cache entry {path}", why=f"reads back damaged ({error})", do="check the disk"
            ) from error
        self._evict(keep=path)
        return entry

    def get_or_create(self, key: str, make: Callable[[], Made]) -> CachedArrays:
        """Open an entry, or make it with ``make() -> arrays`` or ``make() -> (arrays, meta)`` and store it.

        Processes that ask for the same missing entry wait for one of them to make it. If the cache cannot
        be written, the arrays are returned from memory and the first such failure is logged: a full disk
        slows a run down and does not end it.
        """
        found = self.get(key)
        if found is not None:
            return found
        with self._making(key):
            found = self.get(key)
            if found is not None:
                return found
            made = make()
            arrays, meta = made if isinstance(made, tuple) else (made, {})
            try:
                return self.put(key, arrays, meta)
            except RuntimeFault as error:
                if not self._warned:
                    self._warned = True
                    _log.warning("the cache is not used: %s", error)
                return entry_in_memory(*plain_arrays(arrays), plain(dict(meta), "meta"))

    def info(self) -> CacheInfo:
        """Count entries and bytes, those of sub-folders (one a dataset) included."""
        sizes = [status.st_size for _, status in _files(self.root, _ENTRY)]
        temporary = sum(1 for _ in _files(self.root, _TEMPORARY))
        return CacheInfo(root=self.root, entries=len(sizes), bytes=sum(sizes), temporary=temporary)

    def clean(self, *, unused_s: float = 0.0) -> CacheInfo:
        """Remove entries not used for `unused_s` seconds (all by default) and forgotten temporary files.

        Files that are no cache entries are left alone. Arrays that a process has open stay readable.

        Returns:
            What was removed.
        """
        now, removed, freed, temporary = time.time(), 0, 0, 0
        for path, status in list(_files(self.root, _ENTRY)):
            if now - status.st_atime >= unused_s and _remove(path):
                removed, freed = removed + 1, freed + status.st_size
        for path, status in list(_files(self.root, _TEMPORARY)):
            if now - status.st_mtime > _STALE_S and _remove(path):
                temporary += 1
        return CacheInfo(root=self.root, entries=removed, bytes=freed, temporary=temporary)

    def _write(
        self,
        path: Path,
        arrays: Mapping[str, NDArray[Any]],
        types: Mapping[str, str],
        meta: Mapping[str, Any],
    ) -> None:
        """Write a temporary file in the same folder and rename it; remove it on any failure."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:16]}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                write_entry(file, arrays, types, meta)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _evict(self, *, keep: Path) -> None:
        """Remove the entries used least recently until the sum fits; never the one just written."""
        if self.max_bytes is None:
            return
        found = sorted(_files(self.root, _ENTRY), key=lambda item: (item[1].st_atime_ns, item[0].name))
        total = sum(status.st_size for _, status in found)
        for path, status in found:
            if total <= self.max_bytes:
                return
            if path != keep and _remove(path):
                total -= status.st_size

    @contextlib.contextmanager
    def _making(self, key: str) -> Iterator[None]:
        """Hold the lock of a missing entry; where locks do not work, go on without one."""
        path = self.path(key).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield
            return
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            # Removed while held: who waited on it finds the entry, who comes later makes a new lock.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)


def cache_root(dataset: Path | None = None) -> Path:
    """The default folder: ``$MEDRL_CACHE``, else ``$XDG_CACHE_HOME/medrl``, else ``~/.cache/medrl``.

    Args:
        dataset: Root of a dataset; gives a sub-folder of its own, named after it.
    """
    chosen = os.environ.get("MEDRL_CACHE", "")
    if chosen:
        base = Path(chosen).expanduser()
    else:
        home = os.environ.get("XDG_CACHE_HOME", "")
        base = (Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache") / "medrl"
    if dataset is None:
        return base
    full = dataset.resolve()
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", full.name)[:40] or "dataset"
    return base / f"{name}-{hashlib.sha256(os.fsencode(full)).hexdigest()[:8]}"


def make_key(content_hash: str, params: Mapping[str, Any], code_version: str) -> str:
    """The key of what `code_version` makes of the content under the parameters; 64 hexadecimal digits.

    Args:
        content_hash: Hash of everything read, such as `file_hash` of each image.
        params: Plain values; 1, 1.0 and True are three different values.
        code_version: Changed by whoever changes the code that makes the entry.

    Raises:
        ConfigError: If a parameter is no plain value.
    """
    text = json.dumps([content_hash, plain(params, "params"), code_version], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(root: Path, pattern: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of the cache by name, in the folders that entries lie in; links are not followed."""
    for folder, _, names in os.walk(root):
        place = Path(folder)
        if not re.fullmatch(r"[0-9a-f]{2}", place.name):
            continue
        for name in names:
            if pattern.fullmatch(name):
                with contextlib.suppress(OSError):
                    yield place / name, (place / name).lstat()


def _remove(path: Path) -> bool:
    """Remove a file; False if another process was first or it may not be removed."""
    try:
        path.unlink()
    except OSError:
        return False
    return True
