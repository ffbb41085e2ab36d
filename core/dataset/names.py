"""Case identifiers that are safe as file names, paths that stay inside their folder, patients."""

from __future__ import annotations

import re
from pathlib import Path

from medrl.core.errors import DataError

MAX_ID = 128
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}
# Tokens that tell views, phases, times and sides of one patient apart.
_VIEW = re.compile(
    r"ed|es|[234]ch|a[234]c|(frame|time|phase|visit|scan|slice|view|run|ses|session|t|v)-?\d+|ses-\w+"
    r"|pre|post|left|right|l|r|sag|cor|ax|tra",
    re.IGNORECASE,
)
_PATIENT_AND_STUDY = re.compile(r"(\d{5})_(\d{7})")


def safe_case_id(text: str) -> str:
    """Return a case identifier unchanged if it is safe as a file name.

    Allowed are up to 128 letters, digits and ``. _ + -``, starting with a letter or digit.

    Raises:
        DataError: It could leave its folder, hide, or is no portable file name.
    """
    wrong = (
        not _SAFE.fullmatch(text)
        or len(text) > MAX_ID
        or ".." in text
        or text.endswith(".")
        or text.split(".")[0].lower() in _RESERVED
    )
    if wrong:
        raise DataError(
            f"case identifier {text[:60]!r}",
            why=f"not safe as a file name (letters, digits, '._+-', at most {MAX_ID} of them)",
            do="rename the file",
        )
    return text


def safe_path(root: Path, name: str | Path) -> Path:
    """Return ``root / name`` if it lies inside `root`, also after following symbolic links.

    Raises:
        DataError: The name is absolute, climbs out, holds a NUL, or a link leads outside.
    """
    text = str(name)
    path = root / text
    try:
        inside = (
            "\x00" not in text
            and not Path(text).is_absolute()
            and path.resolve().is_relative_to(root.resolve())
        )
    except (OSError, RuntimeError):  # a name too long for the system, or a loop of links
        inside = False
    if not inside or any(len(part.encode()) > 255 for part in Path(text).parts) or ".." in Path(text).parts:
        raise DataError(
            f"path {text[:80]!r}",
            why=f"leads out of {root}, or is no valid path",
            do="keep the files of a dataset inside its folder",
        )
    return path


def patient_of(case_id: str) -> str:
    """Guess the patient of a case from its name, so that one patient never lies in train and validation.

    Trailing tokens that name a view, phase, time or side are dropped, and ``10795_1000811`` (patient and
    study) keeps its first number. Grouping too much is harmless, grouping too little is a leak.

    >>> patient_of("patient0001_4CH_ED"), patient_of("patient001_frame12"), patient_of("hippocampus_003")
    ('patient0001', 'patient001', 'hippocampus_003')
    """
    both = _PATIENT_AND_STUDY.fullmatch(case_id)
    if both:
        return both.group(1)
    tokens = case_id.split("_")
    while len(tokens) > 1 and _VIEW.fullmatch(tokens[-1]):
        tokens.pop()
    return "_".join(tokens)
