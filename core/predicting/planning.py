"""What is settled before the first case: labels of the folds, output files, identity of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medrl.core.dataset import plan_outputs
from medrl.core.errors import CheckpointError, ConfigError, DataError
from medrl.core.types import Case, Predictor
from medrl.core.volume import image_suffix

from .record import inputs_digest


def common_names(predictors: Sequence[Predictor], paths: Sequence[Path]) -> Mapping[str, int]:
    """Return the label names that all folds share.

    Raises:
        CheckpointError: Folds differ in labels or channels.
    """
    first = predictors[0]
    for predictor, path in zip(predictors[1:], paths[1:], strict=True):
        for what, ours, theirs in (
            ("labels", dict(first.label_names), dict(predictor.label_names)),
            ("channels", list(first.channel_names), list(predictor.channel_names)),
        ):
            if ours != theirs:
                raise CheckpointError(
                    f"{path} does not fit {paths[0]}",
                    why=f"its {what} are {theirs}, expected {ours}",
                    do="average folds of one training only",
                )
    return dict(first.label_names)


def plan_files(output: Path, cases: Sequence[Case]) -> tuple[Path, dict[str, Path]]:
    """Return the output folder and the file of each case; one case may be given a file of its own.

    Raises:
        ConfigError: One file is named for several cases.
        DataError: Two cases have one file, or a result would overwrite an input.
    """
    if image_suffix(output) in (".nii", ".nii.gz") and not output.is_dir():
        if len(cases) != 1:
            raise ConfigError(
                f"--output {output}", why=f"one file for {len(cases)} cases", do="name a folder instead"
            )
        case = cases[0]
        if output.resolve() in {image.resolve() for image in case.images}:
            raise DataError(f"case {case.id}", why="the result would overwrite its input", case=case.id)
        return output.parent, {case.id: output}
    return output, plan_outputs(cases, output)


def case_digest(case: Case) -> str:
    """Return the digest of the images of a case.

    Raises:
        DataError: One cannot be read.
    """
    try:
        return inputs_digest(case.images)
    except OSError as error:
        raise DataError(
            f"case {case.id}", why=f"an image cannot be read: {error.strerror or error}", case=case.id
        ) from error
