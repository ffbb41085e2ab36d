"""The page around the sections: one file, no external resource, light and dark, printable."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from medrl.core.volume.write import write_bytes

from .assets import SCRIPT, STYLE

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Heading, also in the list of contents.
        html: Content; made by the functions of this package, or by hand with `escape`.
        intro: A few words for a stranger: what is shown and how to read it. Plain text.
    """

    title: str
    html: str
    intro: str = ""


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Return the report as one HTML document that needs nothing else.

    Args:
        title: Main heading.
        sections: Parts in order.
        subtitle: One sentence below the heading.
        facts: Short facts at the top, by name.
    """
    anchors = [f"s{number}" for number in range(1, len(sections) + 1)]
    contents = "".join(
        f'<a href="#{anchor}">{escape(section.title)}</a>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    parts = "".join(
        f'<section id="{anchor}"><h2>{escape(section.title)}</h2>'
        + (f'<p class="soft">{escape(section.intro)}</p>' if section.intro else "")
        + f"{section.html}</section>"
        for anchor, section in zip(anchors, sections, strict=True)
    )
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>"
        + (f'<p class="soft">{escape(subtitle)}</p>' if subtitle else "")
        + (fact_list(facts) if facts else "")
        + (f'<nav aria-label="contents">{contents}</nav>' if len(sections) > 1 else "")
        + parts
        + f"<footer>Written by medrl {escape(_version())} on {made}. Research software: its results are no "
        "basis for the treatment of patients.</footer>" + f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write a report of any sections, without a run folder; return its path.

    Raises:
        RuntimeFault: The disk is full or the folder cannot be written.
    """
    write_bytes(path, render_page(title, sections, subtitle=subtitle, facts=facts).encode())
    return path


def fact_list(facts: Mapping[str, Any]) -> str:
    """Return names and values in columns."""
    items = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f'<dl class="facts">{items}</dl>'


def paragraphs(lines: Iterable[str]) -> str:
    """Return each line as a paragraph."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def folded(summary: str, content: str) -> str:
    """Return content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def escape(text: str) -> str:
    """Return text that is safe inside HTML and its attributes."""
    return html.escape(_CONTROL.sub("", str(text)), quote=True)


def script_json(content: Any) -> str:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


def _version() -> str:
    try:
        return importlib.metadata.version("medrl")
    except importlib.metadata.PackageNotFoundError:
        return ""
