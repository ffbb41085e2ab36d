"""What a check of a plugin finds."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from medrl.core.errors import MedrlError
from medrl.core.isolation import describe


@dataclass(frozen=True)
class Finding:
    """One rule that a plugin breaks.

    Attributes:
        rule: Short name of the rule.
        what: What was found.
        do: How to mend it.
    """

    rule: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.what} -> {self.do}"


class NotChecked(Exception):
    """A rule cannot be checked on a plugin, or has no meaning for it; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What came of checking one rule.

    Attributes:
        findings: What breaks it.
        skipped: Why it was not checked; empty if it was.
    """

    findings: list[Finding]
    skipped: str = ""


def failed(rule: str, what: str, error: BaseException) -> Finding:
    """Return the finding of something that raised: the error, and where."""
    if isinstance(error, MedrlError):
        return Finding(rule, f"{what}: {error}", error.do or "mend what the message names")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/medrl/core/" not in Path(frame.filename).as_posix()]
    last = (own or frames)[-1] if frames else None
    where = f"look at {last.filename}:{last.lineno}, {last.name}" if last else "mend it"
    return Finding(rule, f"{what}: {describe(error)}", where)
