"""The handled errors of medrl: each says what, why and what to do, and fixes the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

EXIT_OK = 0
EXIT_RUNTIME = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_PLUGIN = 5
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class MedrlError(Exception):
    """A failure that medrl expects and explains.

    Args:
        what: The thing that failed, named (case, file, key).
        why: The reason: expected and found.
        do: One command or action that helps.
    """

    exit_code = EXIT_RUNTIME

    def __init__(self, what: str, *, why: str = "", do: str = "") -> None:
        self.what = what
        self.why = why
        self.do = do
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" if self.why else self.what

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(cls: type[MedrlError], state: dict[str, object], args: tuple[object, ...]) -> MedrlError:
    """Rebuild an error that crossed a process boundary (data-loader workers pickle exceptions)."""
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class RuntimeFault(MedrlError):
    """Training or prediction could not go on: a lock, a full disk, non-finite losses, a dead rank."""


class ConfigError(MedrlError):
    """Usage or configuration is wrong; `problems` lists everything that was found, not only the first."""

    exit_code = EXIT_CONFIG

    def __init__(self, what: str, *, why: str = "", do: str = "", problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(what, why=why, do=do)

    def __str__(self) -> str:
        head = super().__str__()
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


class DataError(MedrlError):
    """A case, an image or a data folder is missing, damaged or inconsistent."""

    exit_code = EXIT_DATA

    def __init__(self, what: str, *, why: str = "", do: str = "", case: str = "") -> None:
        self.case = case
        super().__init__(what, why=why, do=do)


class CheckpointError(MedrlError):
    """A checkpoint is damaged, foreign, or does not fit the model or the method."""

    exit_code = EXIT_CHECKPOINT


class PluginError(MedrlError):
    """A plugin is missing, broken, disabled or made for another version of the plugin API."""

    exit_code = EXIT_PLUGIN


class Interrupted(MedrlError):
    """The run was asked to stop by a signal and saved a checkpoint first."""

    def __init__(self, signal_number: int, *, checkpoint: str = "") -> None:
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
        super().__init__(
            "stopped by a signal",
            why=f"signal {signal_number}" + (f", checkpoint saved to {checkpoint}" if checkpoint else ""),
            do="medrl resume RUN",
        )


def near_matches(name: str, known: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the known names nearest to a misspelt one, best first."""
    import difflib

    pool = sorted(set(known))
    folded = {item.casefold(): item for item in pool}
    found = difflib.get_close_matches(name.casefold(), folded, n=limit, cutoff=0.5)
    return [folded[item] for item in found]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` or, without a near match, the list of known names."""
    pool = sorted(set(known))
    near = near_matches(name, pool)
    if near:
        return "did you mean " + " or ".join(f"'{item}'" for item in near) + "?"
    return "known: " + ", ".join(pool) if pool else "none is known"
