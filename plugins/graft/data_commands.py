"""Tools of graft for data and evaluation: ``import-features``, ``evaluate``; nothing heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medrl.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medrl.core.manager import PluginManager
    from medrl.plugins.graft.config import GraftConfig
    from medrl.plugins.graft.upstream import UpstreamTeacher

FOLDER = click.Path(path_type=Path, file_okay=False, resolve_path=True)
FILE = click.Path(path_type=Path, dir_okay=False, resolve_path=True)
ANY_PATH = click.Path(path_type=Path, resolve_path=True)
FAMILIES = ("nnunet", "provicnet", "prostatlasdiff")


@click.command("import-features")
@click.option("--data", type=ANY_PATH, default=None, help="Dataset folder, or multi-cohort YAML.")
@click.option("-c", "--config", "config_file", type=FILE, default=None, help="Config file of the student.")
@click.option("--preset", default=None, help="smoke, small, paper or legacy.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any config value.")
@click.option("--fold", type=click.IntRange(min=0), default=None, help="Fold of the student.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Folder of a teacher's files (repeat for several teachers or folders); else those of the YAML.",
)
@click.option(
    "--family",
    "families",
    multiple=True,
    metavar="NAME=FAMILY",
    help="nnunet, provicnet or prostatlasdiff; else told by the teacher's name.",
)
@click.option(
    "--features-format",
    type=click.Choice(["pt", "npz"]),
    default="pt",
    show_default=True,
    help="Looked for first (with --teacher).",
)
@click.option("-o", "--output", type=FOLDER, required=True, help="Folder of the feature folders.")
@click.option("--taps", default="neg1", show_default=True, help="Layers to import: neg1, or neg1,neg2.")
@click.option(
    "--align",
    type=click.Choice(["auto", "window", "image", "organ", "centre"]),
    default="auto",
    show_default=True,
    help="What part of a case a file shows; centre takes the middle slices, as the original does.",
)
@click.option(
    "--storage",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Precision.",
)
@click.option(
    "--min-feature-bytes",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Smaller files count as missing (the original: 1000000).",
)
@click.option("--skip-missing", is_flag=True, help="Leave out cases that a teacher lacks.")
@click.option("--every-case", is_flag=True, help="Also validation cases.")
@click.option(
    "--trust-features", is_flag=True, help="Accept .pt files with pickled objects; none is executed."
)
@click.pass_obj
def import_features(
    manager: PluginManager,
    /,
    data: Path | None,
    config_file: Path | None,
    preset: str | None,
    assignments: Sequence[str],
    fold: int | None,
    teachers: Sequence[str],
    families: Sequence[str],
    features_format: str,
    output: Path,
    taps: str,
    align: str,
    storage: str,
    min_feature_bytes: int,
    skip_missing: bool,
    every_case: bool,
    trust_features: bool,
) -> None:
    """Turn upstream feature files (.pt, .npz) into feature folders on the student's windows.

    Give the student's config, as for extract-features. Each file is opened and checked; one of another case,
    shape or window is an error that names it. Files that were imported and did not change are kept.
    """
    from typing import cast

    from medrl.plugins.graft.upstream import Align, importing

    names = tuple(word.strip() for word in taps.split(",") if word.strip())
    if not names or any(name not in ("neg1", "neg2") for name in names):
        raise ConfigError("--taps", why=f"'{taps}' is not neg1, neg2 or neg1,neg2")
    done = importing.import_features(
        manager,
        _config(manager, data, config_file, preset, assignments, fold),
        output,
        teachers=_teachers(teachers, families, features_format),
        taps=names,
        dtype=storage,
        align=cast(Align, align),
        min_bytes=min_feature_bytes,
        skip_missing=skip_missing,
        every_case=every_case,
        trust=trust_features,
        say=_say,
    )
    _say(f"done: {done.written} cases written, {done.kept} kept, {done.bytes / 1e6:.1f} MB in {output}")
    if done.skipped:
        shown = ", ".join(done.skipped[:5]) + (" …" if len(done.skipped) > 5 else "")
        (output / "skipped.json").write_text(json.dumps(list(done.skipped)) + "\n", encoding="utf-8")
        _say(f"{len(done.skipped)} cases lack features: {shown}; all in {output / 'skipped.json'}")
        _say("leave them out of training too: --set data.exclude=[…], or remove_cases in the YAML")
    _say(f"next: medrl train graft --teachers {output} --data DATA")


@click.command("evaluate")
@click.option(
    "-p",
    "--predictions",
    type=FOLDER,
    required=True,
    help="Output of `medrl predict graft --save-probabilities`.",
)
@click.option(
    "-r",
    "--reference",
    type=ANY_PATH,
    required=True,
    help="Dataset, multi-cohort YAML, or folder of label maps.",
)
@click.option(
    "--masks", type=FOLDER, default=None, help="Organ masks <case>.nii.gz; else those of the dataset."
)
@click.option(
    "--target",
    type=click.Choice(["auto", "binary", "3class", "binary_classes", "nested", "separate", "classes"]),
    default="auto",
    show_default=True,
    help="What the channels mean.",
)
@click.option("--lesion", default="", help="cancer, significant, or the name of a structure.")
@click.option(
    "--protocol",
    "protocols",
    type=click.Choice(["picai", "sextant"]),
    multiple=True,
    help="Lesion protocols; both by default where an organ is known.",
)
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of candidates."
)
@click.option(
    "--min-overlap", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="IoU of a match."
)
@click.option(
    "--resamples",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Bootstrap resamples of patients; 0 for no intervals.",
)
@click.option(
    "--level", type=click.FloatRange(0.5, 0.999), default=0.95, show_default=True, help="Of the intervals."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--allow-missing", is_flag=True, help="Evaluate although references have no prediction.")
@click.option(
    "-o", "--output", type=FOLDER, default=None, help="Folder of the results.  [default: evaluation in -p]"
)
@click.option("--json", "as_json", is_flag=True, help="Write the summary to stdout.")
def evaluate(
    predictions: Path,
    reference: Path,
    masks: Path | None,
    target: str,
    lesion: str,
    protocols: Sequence[str],
    threshold: float,
    min_overlap: float,
    resamples: int,
    level: float,
    seed: int,
    allow_missing: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Evaluate probability maps: overlap, detection of cases, lesions by picai and sextant protocols.

    Writes summary.json, structures.csv, cases.csv and lesions.csv.
    """
    from medrl.core.predicting.record import json_bytes
    from medrl.plugins.graft import lesions

    found = lesions.evaluate_folders(
        predictions,
        reference,
        masks=masks,
        target=target,
        lesion=lesion,
        protocols=protocols,
        rules=lesions.Rules(threshold=threshold, min_overlap=min_overlap),
        resamples=resamples,
        level=level,
        seed=seed,
        allow_missing=allow_missing,
    )
    folder = output or predictions / "evaluation"
    lesions.write_results(found, folder)
    for line in lesions.lines(found.summary):
        _say(line)
    _say(f"written to {folder}")
    if as_json:
        click.echo(json_bytes(found.summary).decode(), nl=False)


def _config(
    manager: PluginManager,
    data: Path | None,
    config_file: Path | None,
    preset: str | None,
    assignments: Sequence[str],
    fold: int | None,
) -> GraftConfig:
    from medrl.core.config import Layer, nest, parse_set, resolve_method

    flags = {"data.root": None if data is None else str(data), "data.fold": fold}
    given = {key: value for key, value in flags.items() if value is not None}
    layers = [Layer("command line", nest(given), base_dir=Path.cwd())]
    layers += [Layer("--set", nest(dict([parse_set(text)])), base_dir=Path.cwd()) for text in assignments]
    config: GraftConfig = resolve_method(
        manager, "graft", preset=preset, config_file=config_file, layers=layers
    ).config
    return config


def _teachers(places: Sequence[str], families: Sequence[str], first: str) -> list[UpstreamTeacher]:
    """Teachers of the command line; one named several times has several folders."""
    from medrl.plugins.graft.upstream import UpstreamTeacher, family_of

    folders: dict[str, list[Path]] = {}
    for name, value in (_pair("--teacher", text) for text in places):
        folders.setdefault(name, []).append(Path(value).expanduser().absolute())
    chosen = dict(_pair("--family", text) for text in families)
    for name, family in chosen.items():
        if name not in folders or family not in FAMILIES:
            raise ConfigError(
                f"--family {name}={family}",
                why=f"expected a name given with --teacher and one of {', '.join(FAMILIES)}",
            )
    return [
        UpstreamTeacher(name, tuple(paths), chosen.get(name, family_of(name)), first)
        for name, paths in folders.items()
    ]


def _pair(option: str, text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise ConfigError(f"{option} {text}", why="expected NAME=VALUE", do=f"{option} fold0=features/fold0")
    return name.strip(), value.strip()


def _say(line: str) -> None:
    click.echo(line, err=True)
