"""``medrl rl4seg check-masks``: anatomical validity of label maps; nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medrl.core.errors import EXIT_DATA, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from medrl.plugins.rl4seg.checking import FileResult, FolderResult

FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)
UNLISTED_SHOWN = 5
LIKE_AN_IMAGE = 32
"""A label map with more unnamed values than this is probably none."""


@click.command("check-masks")
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@click.option(
    "--rules",
    "rules_name",
    default="echo",
    show_default=True,
    metavar="NAME|FILE",
    help="echo, echo_atrium, or a YAML file of rules.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME=VALUE",
    help="Value of a label where it differs from the rules. Repeatable.",
)
@click.option(
    "--rows",
    type=click.Choice(["x", "y"]),
    default=None,
    help="Array axis that runs down the picture.  [default: that of the rules]",
)
@click.option("--json", "as_json", is_flag=True, help="Write every value to stdout.")
@click.option(
    "-o", "--output", type=FILE, default=None, metavar="FILE", help="Write every value to a .json or .csv."
)
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that check."
)
@click.pass_context
def check_masks(
    ctx: click.Context,
    folder: Path,
    rules_name: str,
    labels: Sequence[str],
    rows: str | None,
    as_json: bool,
    output: Path | None,
    workers: int,
) -> None:
    """Check the anatomy of every label map below DIR: holes, fragments, gaps, thickness, proportions.

    A stack of frames is valid if every frame is. The exit code is 3 if a file could not be read; label maps
    that are not valid are a result, not a failure.
    """
    if output is not None and output.suffix.lower() not in (".json", ".csv"):
        raise ConfigError(f"-o {output.name}", why="expected a name that ends in .json or .csv")
    values = dict(map(_label, labels))

    from medrl.core.validity import load_rules
    from medrl.plugins.rl4seg.checking import check_folder

    rules = load_rules(rules_name, labels=values, rows=rows)
    found = check_folder(folder, rules, workers=workers)
    for line in _lines(found):
        click.echo(line, err=True)
    if output is not None:
        from medrl.core.volume.write import write_bytes

        content = found.to_json() if output.suffix.lower() == ".json" else found.to_csv().encode()
        write_bytes(output, content)
        click.echo(f"written: {output}", err=True)
    if as_json:
        click.echo(found.to_json().decode(), nl=False)
    if found.counts["unreadable"]:
        ctx.exit(EXIT_DATA)


def _label(text: str) -> tuple[str, int]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip().lstrip("-").isdigit():
        raise ConfigError(f"--label {text}", why="expected NAME=VALUE", do="for example --label lv=3")
    return name.strip(), int(value)


def _lines(found: FolderResult) -> Iterator[str]:
    """Give the table of files, the rules that fail, and the counts."""
    rows = [(result.file, *_verdict(result)) for result in found.files]
    widths = [max(len(row[column]) for row in [("file", "verdict"), *rows]) for column in (0, 1)]
    for row in [("file", "verdict", "rules not passed"), tuple("-" * n for n in (*widths, 16)), *rows]:
        yield f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip()
    counts = found.counts
    failed = {name: count for name, count in found.failed.items() if count}
    if failed:
        yield ""
        width = max(map(len, failed))
        of = f"of {counts['frames']} label maps"
        yield from (f"{name:{width}}  not passed by {count} {of}" for name, count in failed.items())
    yield ""
    others = sorted({value for result in found.files for value in result.unlisted})
    if others:
        shown = ", ".join(map(str, others[:UNLISTED_SHOWN])) + (" …" if len(others) > UNLISTED_SHOWN else "")
        yield f"note: values that the rules do not name were taken for background: {shown}"
    images = sum(len(result.unlisted) > LIKE_AN_IMAGE for result in found.files)
    if images:
        yield f"note: {images} of the files hold so many values that they look like images, not label maps"
    files = f"{counts['files']} file" + ("s" if counts["files"] != 1 else "")
    valid = f"{counts['valid']} valid, {counts['invalid']} not valid, {counts['unreadable']} unreadable"
    frames = counts["frames"]
    part = f"; {counts['valid_frames']} of {frames} label maps valid ({counts['valid_frames'] / frames:.1%})"
    yield f"{files} by the rules {found.rules.name}: {valid}" + (part if frames else "")


def _verdict(result: FileResult) -> tuple[str, str]:
    """Return the verdict and the reasons of one file."""
    if result.error:
        return "unreadable", result.error
    if len(result.frames) == 1:
        report = result.frames[0]
        reasons = (f"{name} {report.values[name]:.5g}" for name in report.failed)
        return "valid" if report.valid else "not valid", ", ".join(reasons)
    good = sum(report.valid for report in result.frames)
    reasons = (f"{name} in {count} frames" for name, count in result.failed.items())
    return f"{good}/{len(result.frames)} frames valid", ", ".join(reasons)
