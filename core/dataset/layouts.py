"""Finding the cases of a dataset: nnU-Net raw, MSD, plain folders, a manifest. No image is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medrl.core.errors import ConfigError, DataError, did_you_mean
from medrl.core.types import Case
from medrl.core.volume import IMAGE_SUFFIXES, image_stem, image_suffix

from .listing import channel_groups, folder_entries, strip_label_suffix
from .model import Dataset, some
from .parts import (
    Problems,
    channel_names_of,
    doubled_ids,
    is_inside,
    labels_of,
    listed_case,
    make_case,
    patients_of,
    read_json,
)

LAYOUTS = ("auto", "nnunet", "msd", "folder", "manifest")
MANIFEST = "cases.json"
IMAGE_FOLDERS = ("images", "imagesTr", "image", "imgs")
LABEL_FOLDERS = ("labels", "labelsTr", "label", "masks", "segmentations")


@dataclass
class Scan:
    """A dataset as far as it could be listed, and everything that was wrong: ``(case, path, why)``."""

    dataset: Dataset
    problems: Problems = field(default_factory=list)


def open_dataset(root: Path | str, *, layout: str = "auto", exclude: Sequence[str] = ()) -> Dataset:
    """List the cases of a dataset without reading an image.

    Args:
        root: Folder of the dataset, or a manifest file.
        layout: ``nnunet`` (``imagesTr/<case>_0000.nii.gz``, ``labelsTr``, ``dataset.json``), ``msd``
            (``dataset.json`` with a list ``training``), ``folder`` (``images/`` and ``labels/``),
            ``manifest`` (``cases.json``), or ``auto``.
        exclude: Identifiers of cases to leave out.

    Raises:
        ConfigError: Unknown layout or excluded case.
        DataError: Files are missing, misplaced or ambiguous; ``medrl data check`` lists all of them.
    """
    scan = scan_dataset(Path(root), layout=layout, exclude=exclude)
    if scan.problems:
        first = scan.problems[0]
        more = f" (and {len(scan.problems) - 1} more problems)" if len(scan.problems) > 1 else ""
        raise DataError(
            f"case {first[0]}: {first[1]}" if first[0] else first[1],
            why=first[2] + more,
            do=f"medrl data check {root}"
            + (f", or leave it out with --exclude {first[0]}" if first[0] else ""),
            case=first[0],
        )
    return scan.dataset


def scan_dataset(root: Path, *, layout: str = "auto", exclude: Sequence[str] = ()) -> Scan:
    """List the cases and collect the problems of single cases; only an unusable dataset raises."""
    if layout not in LAYOUTS:
        raise ConfigError("data.layout", why=f"unknown layout '{layout}'", do=did_you_mean(layout, LAYOUTS))
    if not root.exists():
        raise DataError(str(root), why="no such dataset folder")
    found = _detect(root) if layout == "auto" else layout
    scan = _SCANNERS[found](root)
    return _without(scan, exclude)


def _detect(root: Path) -> str:
    if root.is_file() or (root / MANIFEST).is_file():
        return "manifest"
    if (root / "dataset.json").is_file():
        meta = read_json(root / "dataset.json")
        if isinstance(meta.get("training"), list):
            return "msd"
        if (root / "imagesTr").is_dir() or "dataset" in meta:
            return "nnunet"
    if any((root / name).is_dir() for name in IMAGE_FOLDERS):
        return "folder"
    raise DataError(
        str(root),
        why="no dataset is recognised here: neither dataset.json, nor cases.json, nor a folder images/",
        do="name the folder that holds one of them, or convert with `medrl data convert`",
    )


def _without(scan: Scan, exclude: Sequence[str]) -> Scan:
    """Drop excluded cases and their problems."""
    if not exclude:
        return scan
    data, left_out = scan.dataset, set(exclude)
    known = {case.id for case in (*data.cases, *data.test_cases)} | {
        case for case, _, _ in scan.problems if case
    }
    unknown = sorted(left_out - known)
    if unknown:
        raise ConfigError(
            "data.exclude", why=f"no such case: {some(unknown)}", do=did_you_mean(unknown[0], known)
        )
    dataset = Dataset(
        root=data.root,
        name=data.name,
        layout=data.layout,
        channel_names=data.channel_names,
        labels=data.declared_labels,
        cases=[case for case in data.cases if case.id not in left_out],
        test_cases=[case for case in data.test_cases if case.id not in left_out],
        info={**data.info, "excluded": sorted(left_out)},
    )
    return Scan(dataset, [problem for problem in scan.problems if problem[0] not in left_out])


# --- nnU-Net raw ---------------------------------------------------------------------------------------


def _scan_nnunet(root: Path) -> Scan:
    meta = read_json(root / "dataset.json")
    channels = channel_names_of(meta.get("channel_names", meta.get("modality")), root / "dataset.json")
    labels, info = labels_of(meta.get("labels"), root / "dataset.json")
    ending = str(meta.get("file_ending", ".nii.gz"))
    if ending not in IMAGE_SUFFIXES:
        raise DataError(
            str(root / "dataset.json"), why=f"file_ending '{ending}' is not among {', '.join(IMAGE_SUFFIXES)}"
        )
    patients = patients_of(meta)
    problems: Problems = []
    if isinstance(meta.get("dataset"), Mapping):
        cases = _nnunet_listed(root, meta["dataset"], patients, problems)
    else:
        cases = _nnunet_folder(root, "Tr", ending, len(channels), patients, problems)
    tests = _nnunet_folder(root, "Ts", ending, len(channels), patients, problems)
    expected = meta.get("numTraining")
    if isinstance(expected, int) and expected != len(cases) and not problems:
        info["numTraining"] = expected
    dataset = Dataset(
        root=root, name=str(meta.get("name", "")), layout="nnunet", channel_names=channels, labels=labels,
        cases=[case for case in cases if case.label], test_cases=tests, info=info,
    )  # fmt: skip
    return Scan(dataset, problems + doubled_ids(root, dataset))


def _nnunet_folder(
    root: Path,
    part: str,
    ending: str,
    channels: int,
    patients: Mapping[str, str],
    problems: Problems,
) -> list[Case]:
    folder, label_folder = root / f"images{part}", root / f"labels{part}"
    if not folder.is_dir():
        if part == "Tr":
            raise DataError(str(folder), why="no such folder")
        return []
    groups, wrong = channel_groups(
        root, [e for e in folder_entries(folder) if image_suffix(e.path) == ending]
    )
    problems += wrong
    cases = []
    for case_id, files in groups.items():
        if sorted(files) != list(range(channels)):
            missing = sorted(set(range(channels)) - set(files))
            extra = sorted(set(files) - set(range(channels)))
            why = f"channels {missing} missing" if missing else f"channels {extra} not in channel_names"
            problems.append((case_id, f"images{part}/{case_id}_*{ending}", why))
            continue
        label = label_folder / f"{case_id}{ending}"
        if part == "Tr" and not label.exists():
            problems.append((case_id, f"labels{part}/{label.name}", "the reference segmentation is missing"))
            continue
        cases.append(
            make_case(
                root,
                case_id,
                [files[k] for k in sorted(files)],
                label if label.exists() else None,
                patients,
                part,
            )
        )
    if label_folder.is_dir() and part == "Tr":
        for entry in folder_entries(label_folder):
            if entry.stem not in groups:
                problems.append(
                    (entry.stem, f"labels{part}/{entry.path.name}", "a segmentation without image")
                )
    return [case for case in cases if is_inside(root, case, problems)]


def _nnunet_listed(
    root: Path, listed: Mapping[str, Any], patients: Mapping[str, str], problems: Problems
) -> list[Case]:
    """Read the ``dataset`` entry of nnU-Net v2: ``{case: {"images": [...], "label": ...}}``."""
    cases = []
    for name, entry in listed.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("images"), list):
            problems.append((str(name), "dataset.json", "expected images and label"))
            continue
        case = listed_case(root, str(name), entry, patients, problems)
        if case is not None and case.label is None:
            problems.append((case.id, "dataset.json", "the reference segmentation is missing"))
        elif case is not None:
            cases.append(case)
    return cases


# --- Medical Segmentation Decathlon --------------------------------------------------------------------


def _scan_msd(root: Path) -> Scan:
    path = root / "dataset.json"
    meta = read_json(path)
    channels = channel_names_of(meta.get("modality", meta.get("channel_names")), path)
    labels, info = labels_of(meta.get("labels"), path)
    patients = patients_of(meta)
    problems: Problems = []
    training = [entry for entry in meta.get("training", []) if isinstance(entry, Mapping)]
    cases, tests = [], []
    for entry in training:
        images = _msd_images(root, str(entry.get("image", "")))
        name = image_stem(Path(str(entry.get("image", ""))))
        case = listed_case(root, name, {"images": images, "label": entry.get("label")}, patients, problems)
        if case is not None:
            cases.append(case)
    for item in meta.get("test", []):
        text = str(item.get("image", "")) if isinstance(item, Mapping) else str(item)
        case = listed_case(
            root, image_stem(Path(text)), {"images": _msd_images(root, text)}, patients, problems
        )
        if case is not None:
            tests.append(case)
    dataset = Dataset(
        root=root, name=str(meta.get("name", "")), layout="msd", channel_names=channels, labels=labels,
        cases=[case for case in cases if case.label], test_cases=tests, info=info,
    )  # fmt: skip
    return Scan(dataset, problems + doubled_ids(root, dataset))


def _msd_images(root: Path, text: str) -> list[str]:
    """Return the file of an entry, or its channel files: older nnU-Net lists ``x`` for ``x_0000``."""
    path = Path(text)
    if (root / path).exists():
        return [text]
    stem, suffix = image_stem(path), image_suffix(path)
    split: list[str] = []
    while (root / path.parent / f"{stem}_{len(split):04d}{suffix}").exists():
        split.append(str(path.parent / f"{stem}_{len(split):04d}{suffix}"))
    return split or [text]


# --- plain folders -------------------------------------------------------------------------------------


def _scan_folder(root: Path) -> Scan:
    images = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), None)
    if images is None:
        raise DataError(str(root), why=f"no folder of images ({', '.join(IMAGE_FOLDERS)})")
    label_folder = next((root / name for name in LABEL_FOLDERS if (root / name).is_dir()), None)
    meta = read_json(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    labels, info = labels_of(meta["labels"], root / "dataset.json") if "labels" in meta else (None, {})
    problems: Problems = []
    entries = folder_entries(images, dicom=True)
    groups, wrong = channel_groups(root, entries, single=True)
    problems += wrong
    count = max((len(files) for files in groups.values()), default=1)
    named = "channel_names" in meta or "modality" in meta
    channels = (
        channel_names_of(meta.get("channel_names", meta.get("modality")), root / "dataset.json")
        if named
        else ()
    )
    channels = channels or (("image",) if count == 1 else tuple(f"channel_{k}" for k in range(count)))
    label_files: dict[str, list[Path]] = {}
    for entry in folder_entries(label_folder) if label_folder else []:
        label_files.setdefault(strip_label_suffix(entry.stem, groups), []).append(entry.path)
    cases = []
    for case_id, files in groups.items():
        found = label_files.get(case_id, [])
        if sorted(files) != list(range(count)):
            problems.append((case_id, f"{images.name}/{case_id}", f"{len(files)} of {count} channels"))
        elif len(found) > 1:
            names = ", ".join(path.name for path in found)
            problems.append(
                (case_id, f"{found[0].parent.name}/{found[0].name}", f"several segmentations: {names}")
            )
        else:
            case = make_case(
                root,
                case_id,
                [files[k] for k in sorted(files)],
                found[0] if found else None,
                patients_of(meta),
            )
            if is_inside(root, case, problems):
                cases.append(case)
    for case_id in sorted(set(label_files) - set(groups)):
        path = label_files[case_id][0]
        problems.append((case_id, f"{path.parent.name}/{path.name}", "a segmentation without image"))
    dataset = Dataset(
        root=root, name=str(meta.get("name", "")), layout="folder", channel_names=channels, labels=labels,
        cases=[case for case in cases if case.label], test_cases=[case for case in cases if not case.label],
        info={**info, "channels_named": named},
    )  # fmt: skip
    return Scan(dataset, problems + doubled_ids(root, dataset))


# --- manifest ------------------------------------------------------------------------------------------


def _scan_manifest(root: Path) -> Scan:
    """Read ``cases.json``: name, root, channel_names, labels, cases and test with paths below root."""
    path = root if root.is_file() else root / MANIFEST
    meta = read_json(path)
    base = (path.parent / str(meta.get("root", "."))).resolve()
    channels = channel_names_of(meta.get("channel_names"), path)
    labels, info = labels_of(meta.get("labels"), path)
    problems: Problems = []
    parts: dict[str, list[Case]] = {"cases": [], "test": []}
    for part, cases in parts.items():
        for entry in meta.get(part, []):
            if (
                not isinstance(entry, Mapping)
                or not isinstance(entry.get("images"), list)
                or "id" not in entry
            ):
                problems.append(("", path.name, f"each of {part} needs id and images"))
                continue
            patients = {str(entry["id"]): str(entry["patient"])} if entry.get("patient") else {}
            case = listed_case(base, str(entry["id"]), entry, patients, problems)
            if case is not None and part == "cases" and case.label is None:
                problems.append((case.id, path.name, "the reference segmentation is missing"))
            elif case is not None:
                cases.append(case)
    dataset = Dataset(
        root=path.parent, name=str(meta.get("name", "")), layout="manifest", channel_names=channels,
        labels=labels,        cases=parts["cases"], test_cases=parts["test"], info=info,
    )  # fmt: skip
    return Scan(dataset, problems + doubled_ids(base, dataset))


_SCANNERS = {"nnunet": _scan_nnunet, "msd": _scan_msd, "folder": _scan_folder, "manifest": _scan_manifest}
