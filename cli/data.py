"""``medrl data check|fingerprint|split|convert|synth|preview``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from medrl.cli.console import console, counted, number, write_json
from medrl.cli.groups import FriendlyGroup
from medrl.cli.options import ANY_PATH, FILE, FOLDER, NATURAL, POSITIVE, F, ListType, json_option
from medrl.cli.progress import case_progress
from medrl.core.errors import EXIT_DATA, EXIT_OK, ConfigError, did_you_mean

LAYOUTS = ("auto", "nnunet", "msd", "folder", "manifest")


def layout_options(command: F) -> F:
    """Add ``--layout`` and ``--exclude``."""
    command = click.option("--exclude", multiple=True, metavar="CASE", help="Leave a case out. Repeatable.")(
        command
    )
    return click.option(
        "--layout",
        type=click.Choice(LAYOUTS),
        default="auto",
        show_default=True,
        help="Layout of the folder.",
    )(command)


@click.group("data", cls=FriendlyGroup, short_help="Check, split, convert and look at datasets.")
def data() -> None:
    """Check, split, convert and look at datasets.

    A dataset is a folder in nnU-Net raw layout (imagesTr, labelsTr, dataset.json), an MSD dataset, or a plain
    folder with images/ and labels/.
    """


@data.command(short_help="Read every file and report all problems.")
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@layout_options
@json_option()
def check(folder: Path, layout: str, exclude: tuple[str, ...], as_json: bool) -> int:
    """Read every file of a dataset and report all problems; the exit code is 3 if there are any."""
    _exists(folder)
    from medrl.core.dataset import check_dataset

    with case_progress() as show:
        report = check_dataset(folder, layout=layout, exclude=exclude, progress=show)
    if as_json:
        write_json(report.to_dict())
        return EXIT_OK if report.ok else EXIT_DATA
    screen = console()
    screen.facts(
        {
            "dataset": f"{report.root} ({report.layout})",
            "cases": f"{report.cases}, {report.test_cases} for testing",
            "channels": ", ".join(report.channel_names) or "–",
            "labels": ", ".join(f"{name} {value}" for name, value in report.labels.items()) or "–",
        }
    )
    for note in report.notes:
        screen.say(f"note: {note}")
    if report.empty:
        screen.say(
            f"note: {counted(len(report.empty), 'case')} without foreground: {', '.join(report.empty)}"
        )
    for problem in report.problems:
        screen.line(f"{screen.style('problem', fg='red')}: {problem}")
    if report.ok:
        screen.say(screen.style("no problem was found", fg="green"))
        return EXIT_OK
    number_of = counted(len(report.problems), "problem")
    screen.line(f"{number_of}; mend the files, or leave cases out with --exclude CASE")
    return EXIT_DATA


@data.command(short_help="Describe shapes, spacings, intensities and labels.")
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@layout_options
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Also write the whole description as JSON.")
@json_option()
def fingerprint(
    folder: Path, layout: str, exclude: tuple[str, ...], output: Path | None, as_json: bool
) -> None:
    """Describe a dataset: shapes, spacings, intensities, label volumes, and a hash of its content."""
    _exists(folder)
    from medrl.core.dataset import fingerprint as describe
    from medrl.core.dataset import open_dataset

    dataset = open_dataset(folder, layout=layout, exclude=exclude)
    with case_progress() as show:
        facts = describe(dataset, progress=show)
    if output is not None:
        _write(output, json.dumps(facts, indent=2) + "\n")
        console().say(f"written: {output}")
    if as_json:
        write_json(facts)
        return
    screen = console()
    cases = facts.pop("cases")
    intensities = facts.pop("intensities", {})
    screen.facts(
        {key.replace("_", " "): _short(value) for key, value in facts.items() if value not in ([], {})}
    )
    if intensities:
        names = sorted({name for values in intensities.values() for name in values})
        screen.say()
        screen.table(
            ["intensity of", *names],
            [
                [channel, *(_short(values.get(name)) for name in names)]
                for channel, values in intensities.items()
            ],
            right=range(1, len(names) + 1),
        )
    rows = [
        [
            case,
            "×".join(map(str, item["shape"])),
            "×".join(f"{size:g}" for size in item["spacing_mm"]),
            ", ".join(f"{name} {ml:g}" for name, ml in item["label_ml"].items()) or "–",
        ]
        for case, item in cases.items()
    ]
    screen.say()
    screen.table(["case", "shape", "spacing mm", "labels ml"], rows)


@data.command(short_help="Write splits_final.json, grouped by patient.")
@click.argument("folder", type=ANY_PATH, metavar="DIR")
@layout_options
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True, metavar="N", help="Folds.")
@click.option(
    "--seed", type=NATURAL, default=0, show_default=True, metavar="N", help="Seed of the shuffling."
)
@click.option(
    "--group-by",
    default="patient",
    show_default=True,
    metavar="RULE",
    help="patient, case, or a regular expression whose first group names the patient in a case's name.",
)
@click.option("--force", is_flag=True, help="Replace a splits_final.json that is there.")
@json_option()
def split(
    folder: Path,
    layout: str,
    exclude: tuple[str, ...],
    folds: int,
    seed: int,
    group_by: str,
    force: bool,
    as_json: bool,
) -> None:
    """Divide the cases into folds and write splits_final.json into the dataset, as nnU-Net reads it."""
    _exists(folder)
    from medrl.core.dataset import make_splits, open_dataset, write_splits

    dataset = open_dataset(folder, layout=layout, exclude=exclude)
    target = dataset.root / "splits_final.json"
    if target.exists() and not force:
        raise ConfigError(
            f"{target} exists", do="--force replaces it; runs made with the old folds stay as they are"
        )
    splits = make_splits(dataset, folds, seed, group_by)
    write_splits(dataset.root, splits)
    if as_json:
        parts = [{"train": [c.id for c in part.train], "val": [c.id for c in part.val]} for part in splits]
        write_json({"path": target, "folds": parts})
        return
    rows = [
        [str(index), str(len(part.train)), str(len(part.val)), str(len({case.patient for case in part.val}))]
        for index, part in enumerate(splits)
    ]
    console().table(["fold", "training", "validation", "patients in validation"], rows, right=(0, 1, 2, 3))
    console().say(f"written: {target}")


@data.command(short_help="Convert DICOM, MSD or plain folders to nnU-Net raw.")
@click.argument("src", type=ANY_PATH)
@click.argument("dst", type=FOLDER)
@click.option(
    "--from", "source", type=click.Choice(["dicom", "msd", "folder"]), required=True, help="What SRC is."
)
@click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", help="Name a label value. Repeatable."
)
@click.option("--channels", type=ListType(), metavar="A,B", default=None, help="Names of the channels.")
def convert(
    src: Path, dst: Path, source: str, labels: tuple[str, ...], channels: tuple[str, ...] | None
) -> None:
    """Convert a dataset to nnU-Net raw: every image is read, checked and written again."""
    _exists(src)
    named: dict[str, int] = {}
    for text in labels:
        name, sign, value = text.partition("=")
        if not sign or not name or not value.isdigit():
            raise ConfigError(f"--label {text}", why="expected NAME=VALUE", do="for example --label liver=1")
        named[name] = int(value)
    from medrl.core.dataset import convert as do_convert

    with case_progress() as show:
        dataset = do_convert(
            src, dst, source, labels=named or None, channel_names=channels or (), progress=show
        )
    screen = console()
    screen.say(f"{dst}: {len(dataset.cases)} cases, {len(dataset.test_cases)} for testing")
    screen.say(f"next: medrl data check {dst}")


def kinds() -> dict[str, Any]:
    """Return the synthetic datasets: name to the module that writes it; imports nothing."""
    import pkgutil

    from medrl.core import phantoms

    names = (item.name for item in pkgutil.iter_modules(phantoms.__path__))
    return {name: f"medrl.core.phantoms.{name}" for name in names if not name.startswith("_")}


def _complete_kinds(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in kinds() if name.startswith(incomplete)]


@data.command(short_help="Write a synthetic dataset.")
@click.argument("kind", shell_complete=_complete_kinds)
@click.argument("folder", type=FOLDER, metavar="DIR")
@click.option("--cases", type=POSITIVE, default=None, metavar="N", help="Number of cases.")
@click.option(
    "--seed", type=NATURAL, default=0, show_default=True, metavar="N", help="Seed of everything in it."
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any further setting of that kind, such as shift=0.5. Repeatable.",
)
def synth(kind: str, folder: Path, cases: int | None, seed: int, assignments: tuple[str, ...]) -> None:
    """Write a synthetic dataset of a KIND (prostate, echo, …) to DIR; the same seed gives the same bytes."""
    known = kinds()
    if kind not in known:
        raise ConfigError(f"kind '{kind}'", why=did_you_mean(kind, known), do="medrl data synth --help")
    import importlib

    write = getattr(importlib.import_module(known[kind]), f"write_{kind}")
    settings = _settings(kind, write, assignments)
    console().waiting(f"writing {folder}")
    made = write(folder, seed=seed, **({} if cases is None else {"cases": cases}), **settings)
    console().say(f"written: {made}")
    console().say(f"next: medrl data check {made}")


def _settings(kind: str, write: Callable[..., Path], assignments: tuple[str, ...]) -> dict[str, Any]:
    """Return the keyword arguments of a writer that ``--set`` gives; each has the type of its default."""
    import inspect

    from medrl.core.config import parse_set

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(write).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("cases", "seed")
    }
    found: dict[str, Any] = {}
    for text in assignments:
        key, value = parse_set(text)
        if key in ("cases", "seed"):
            raise ConfigError(f"--set {text}", why="it has an option of its own", do=f"--{key} {value}")
        if key not in defaults:
            raise ConfigError(
                f"--set {text}",
                why=f"no setting of {kind}; {did_you_mean(key, defaults)}",
                do=f"known are {', '.join(sorted(defaults))}",
            )
        found[key] = _like(defaults[key], value, text)
    return found


def _like(default: Any, value: Any, text: str) -> Any:
    """Return a value as the type of its default."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple):
        if isinstance(value, list) and len(value) == len(default):
            return tuple(_like(one, item, text) for one, item in zip(default, value, strict=True))
    elif type(value) is type(default):
        return value
    shown = list(default) if isinstance(default, tuple) else default
    raise ConfigError(f"--set {text}", why=f"expected a value like {shown!r}")


@data.command(short_help="Draw one case as a PNG.")
@click.argument("path", type=ANY_PATH)
@click.option("--case", metavar="CASE", help="Which case of a dataset.  [default: the first]")
@click.option("--label", type=ANY_PATH, metavar="FILE", help="Segmentation to draw instead of the reference.")
@click.option("--channel", type=NATURAL, default=0, show_default=True, metavar="N", help="Channel to draw.")
@click.option("-o", "--output", type=FILE, metavar="FILE", help="PNG to write.  [default: preview.png]")
def preview(path: Path, case: str | None, label: Path | None, channel: int, output: Path | None) -> None:
    """Draw one case, of a dataset or of an image file, with the contours of its labels."""
    _exists(path)
    if label is not None:
        _exists(label)
    target = output or Path("preview.png")
    from medrl.core.preview import preview_case

    picture = preview_case(path, case, label=label, channel=channel)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(picture)
    console().say(f"written: {target}")


def _exists(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"{path}", why="no such file or folder")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return (
            " × ".join(_short(item) for item in value)
            if value and not isinstance(value[0], str)
            else ", ".join(value)
        )
    return f"{value:.5g}" if isinstance(value, float) else number(value)
