"""Pictures that a method drew while it ran, shown in the report of its run folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from .page import escape

LISTING = "pictures.json"
"""File of a run folder that names pictures: ``[{"title": …, "path": …, "caption": …}, …]``, PNG files inside
the folder. A method replaces it whenever it has newer ones."""

MAX_PICTURES = 40
MAX_BYTES = 30_000_000
"""More than this is left in the folder, which the report then says."""


def pictures(run_dir: Path) -> str:
    """Return the pictures that the listing of a run folder names, inside the page; empty if there is none.

    Files that are missing, lie outside the folder or are no PNG are left out.
    """
    try:
        listing = json.loads((run_dir / LISTING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    shown: list[str] = []
    left = size = 0
    for entry in listing if isinstance(listing, list) else ():
        content = _content(run_dir, entry)
        if content is None:
            continue
        if len(shown) >= MAX_PICTURES or size + len(content) > MAX_BYTES:
            left += 1
            continue
        size += len(content)
        shown.append(_figure(content, str(entry.get("title", "")), str(entry.get("caption", ""))))
    more = f'<p class="soft">{left} more pictures are in the run folder.</p>' if left else ""
    return "".join(shown) + more


def _content(run_dir: Path, entry: Any) -> bytes | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return None
    path = run_dir / entry["path"]
    try:
        inside = path.resolve().is_relative_to(run_dir.resolve())
        content = path.read_bytes() if inside else b""
    except OSError:
        return None
    return content if content.startswith(b"\x89PNG\r\n") else None


def _figure(content: bytes, title: str, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img src="{source}" alt="{escape(title)}" style="max-width:100%;height:auto">'
    return f'<figure class="panel">{heading}<div class="scroll">{image}</div>{words}</figure>'
