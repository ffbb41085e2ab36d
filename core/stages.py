"""Named stages with hashed inputs and outputs: what was done is not done again, what changed is.

A pipeline writes one record, ``stages.json``, in its folder. A stage counts as done only if the record
says so *and* its inputs and outputs hash to what was recorded: a deleted or edited file, another
parameter or an interrupted stage makes it run again, and with it every stage that reads what it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from medrl.core.errors import ConfigError, DataError, Interrupted, RuntimeFault

RECORD = "stages.json"

_SCHEMA = 1
_NOT_DONE = {"running": "it was interrupted", "stopped": "it was stopped"}
_log = logging.getLogger("medrl.stages")

Input: TypeAlias = "Path | str | int | float | bool | Sequence[Input] | None"
State: TypeAlias = Literal["done", "running", "stopped", "failed", "changed"]


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """What is known about one stage.

    Attributes:
        state: ``done``; ``running``: it is at work, or was killed; ``stopped`` by a signal; ``failed``;
            ``changed``: an output is not what was written.
        reason: Why it was stopped or failed, or what changed.
        seconds: How long its last run took.
        finished: UTC time of its end, ISO 8601.
    """

    name: str
    state: State
    reason: str = ""
    seconds: float = 0.0
    finished: str = ""


class Pipeline:
    """Stages that leave their work in files.

    In a program of several ranks only one may run a pipeline.

    Args:
        root: Folder of the record; made if missing. Relative outputs lie in it.
        record: Its file in that folder. Programs that work side by side need one each.

    Example::

        pipeline = Pipeline(run_dir / "pipeline")
        pipeline.stage("teachers", inputs={"data": root, "epochs": 5}, outputs=[teachers], run=train_teachers)
        pipeline.stage("features", inputs={"teachers": teachers}, outputs=[features], run=extract)

    Raises:
        DataError: If the record is damaged or of another schema.
    """

    def __init__(self, root: Path, record: str = RECORD) -> None:
        self.root = Path(root)
        self.record = self.root / record
        self._stages = self._read()

    def stage(
        self,
        name: str,
        *,
        inputs: Mapping[str, Input],
        outputs: Sequence[Path],
        run: Callable[[], object],
    ) -> bool:
        """Do a stage unless it is done.

        Args:
            name: Names the stage in the record.
            inputs: Everything that decides the outputs: files and folders as `Path` (hashed by content), and
                texts and numbers, such as parameters and a code version.
            outputs: Files or folders that `run` writes; they must exist afterwards. What lies there from
                an interrupted run is left for `run` to continue or to overwrite.
            run: Does the work.

        Returns:
            True if it ran, False if it was done already.

        Raises:
            ConfigError: If an input is neither a path nor a plain value, or the name is empty.
            DataError: If an input file is missing.
            RuntimeFault: If an output is missing afterwards, or the record cannot be written.
        """
        if not name:
            raise ConfigError("pipeline", why="a stage has an empty name")
        places = [self.root / output for output in outputs]
        hashes = {key: input_hash(value, f"stage {name}: input {key!r}") for key, value in inputs.items()}
        reason = self._why(name, hashes, places)
        if not reason:
            _log.info("stage %s is done", name)
            return False
        _log.info("stage %s runs: %s", name, reason)
        started = time.monotonic()
        self._mark(name, {"state": "running", "reason": reason})
        try:
            run()
            missing = [str(place) for place in places if not place.exists()]
            if missing:
                raise RuntimeFault(f"stage {name}", why=f"it did not write {', '.join(missing)}")
        except BaseException as error:
            seconds = round(time.monotonic() - started, 3)
            why = f"{type(error).__name__}: {error}"
            by_signal = isinstance(error, Interrupted) or not isinstance(error, Exception)
            state = "stopped" if by_signal else "failed"
            # The first cause matters more than a record that cannot be written.
            with contextlib.suppress(RuntimeFault):
                self._mark(name, {"state": state, "reason": why, "seconds": seconds, "finished": _now()})
            raise
        self._mark(
            name,
            {
                "state": "done",
                "inputs": hashes,
                "outputs": {self._label(place): path_hash(place) for place in places},
                "seconds": round(time.monotonic() - started, 3),
                "finished": _now(),
            },
        )
        return True

    def is_done(self, name: str, *, inputs: Mapping[str, Input], outputs: Sequence[Path]) -> bool:
        """Whether `stage` would leave a stage as it is; nothing is written.

        Raises:
            ConfigError: An input is neither a path nor a plain value.
            DataError: An input file is missing.
        """
        hashes = {key: input_hash(value, f"stage {name}: input {key!r}") for key, value in inputs.items()}
        return not self._why(name, hashes, [self.root / output for output in outputs])

    def take_over(self, name: str, other: Pipeline) -> None:
        """Believe what the record of another pipeline of the same folder says of a stage unknown here."""
        if name not in self._stages and name in other._stages:
            self._stages[name] = other._stages[name]

    def begin(self) -> None:
        """Write the record if there is none, so that the folder is known as that of a pipeline.

        Raises:
            RuntimeFault: It cannot be written.
        """
        if not self.record.is_file():
            self._write()

    def status(self) -> dict[str, StageStatus]:
        """Every recorded stage, in the order of first running; outputs are hashed again."""
        found = {}
        for name, record in self._stages.items():
            state, reason = record["state"], record.get("reason", "")
            if state == "done":
                reason = _changed_output(self.root, record["outputs"])
                state = "changed" if reason else "done"
            found[name] = StageStatus(
                name=name,
                state=state,
                reason=reason,
                seconds=float(record.get("seconds", 0.0)),
                finished=str(record.get("finished", "")),
            )
        return found

    def _why(self, name: str, inputs: Mapping[str, str], places: Sequence[Path]) -> str:
        """Why a stage must run; empty if it is done."""
        record = self._stages.get(name)
        if record is None:
            return "it has never run"
        if record["state"] != "done":
            return _NOT_DONE.get(record["state"], "it failed")
        before = record["inputs"]
        changed = sorted(key for key in {*before, *inputs} if before.get(key) != inputs.get(key))
        if changed:
            return f"changed: {', '.join(changed)}"
        if sorted(record["outputs"]) != sorted(self._label(place) for place in places):
            return "its outputs were renamed"
        return _changed_output(self.root, record["outputs"])

    def _label(self, place: Path) -> str:
        """The path of an output in the record: relative where it lies in the folder, so that it may move."""
        full, root = place.resolve(), self.root.resolve()
        return full.relative_to(root).as_posix() if full.is_relative_to(root) else str(full)

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise DataError(
                str(self.record), why=f"cannot be read ({error})", do="remove it; every stage then runs again"
            ) from error
        stages: Any = content.get("stages") if isinstance(content, dict) else None
        if not isinstance(stages, dict) or content.get("schema") != _SCHEMA:
            raise DataError(
                str(self.record),
                why=f"has no schema {_SCHEMA}",
                do="remove it; every stage then runs again",
            )
        return dict(stages)

    def _mark(self, name: str, record: dict[str, Any]) -> None:
        self._stages[name] = record
        self._write()

    def _write(self) -> None:
        """Write the record whole or not at all."""
        text = json.dumps({"schema": _SCHEMA, "stages": self._stages}, indent=2) + "\n"
        temporary: Path | None = None
        try:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w",
                encoding="utf-8",
                dir=self.record.parent,
                prefix=f".{self.record.name}.",
                delete=False,
            ) as file:
                temporary = Path(file.name)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.record)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise RuntimeFault(
                str(self.record),
                why=f"cannot be written ({error.strerror or error})",
                do="free space on the disk",
            ) from error


def path_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, or of the names and contents of all files in a folder.

    Raises:
        DataError: If it does not exist or cannot be read.
    """
    try:
        if path.is_dir():
            tree = hashlib.sha256(b"tree")
            for item in sorted(path.rglob("*"), key=lambda item: item.relative_to(path).as_posix()):
                if item.is_file():
                    name = item.relative_to(path).as_posix().encode("utf-8", "surrogateescape")
                    tree.update(len(name).to_bytes(8, "little") + name + bytes.fromhex(_file_hash(item)))
            return tree.hexdigest()
        return _file_hash(path)
    except FileNotFoundError as error:
        raise DataError(str(path), why="it does not exist") from error
    except OSError as error:
        raise DataError(str(path), why=f"cannot be read ({error.strerror or error})") from error


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed_output(root: Path, outputs: Mapping[str, str]) -> str:
    """The first output that is not what was written, as a sentence; empty if all are."""
    for label, digest in outputs.items():
        place = root / label
        if not place.exists():
            return f"{label} is missing"
        if path_hash(place) != digest:
            return f"{label} is not what the stage wrote"
    return ""


def input_hash(value: Any, where: str) -> str:
    """Return the hash of an input: of the content of a path, of the text of a plain value.

    Args:
        value: As `Pipeline.stage` takes it.
        where: What messages call it.

    Raises:
        DataError: A path does not exist or cannot be read.
        ConfigError: It is neither a path nor a plain value.
    """
    if isinstance(value, Path):
        try:
            return "path:" + path_hash(value)
        except DataError as error:
            raise DataError(where, why=str(error)) from error
    if isinstance(value, list | tuple):
        parts = [input_hash(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return "list:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if value is None or isinstance(value, bool | int | float | str):
        text = json.dumps(value)
        return text if len(text) <= 80 else "text:" + hashlib.sha256(text.encode()).hexdigest()
    raise ConfigError(
        where, why=f"it is a {type(value).__name__}", do="give a Path, a text, a number, or a list of them"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
