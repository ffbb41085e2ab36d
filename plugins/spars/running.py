"""A run: the classifier alone, or self-play with everything that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.checkpoint import find_checkpoint
from medrl.core.errors import ConfigError
from medrl.core.staged import is_staged, run_staged

from . import restoring, stages, thresholds, train
from .config import SparsConfig
from .data import Loaded, load
from .hunting import make_table
from .rewards import build_reward

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from medrl.core.jobs import TrainJob
    from medrl.core.runtime import Runtime

    from .scoring import ScorerModule


def run(job: TrainJob) -> None:
    """Do the stage of a config.

    Raises:
        ConfigError: No dataset is named.
        DataError: There is no such dataset, or it has no image labels.
        CheckpointError: A classifier that is named is not there.
        RuntimeFault: The classifier tells nothing; nothing is trained on its scores.
    """
    cfg: SparsConfig = job.config
    # Wrong paths and keys are found before a run folder is made.
    if cfg.data.root is None:
        raise ConfigError("data.root is missing", do="medrl train spars --data DATASET")
    if cfg.stage != "classifier" and cfg.inputs.classifier is not None:
        find_checkpoint(cfg.inputs.classifier, "last")
    if cfg.stage != "classifier":
        build_reward(cfg.env, job.manager, dense=True)
    data = load(cfg)
    if is_staged(job):
        run_parts(job, cfg, data)
        return
    with job.runtime() as rt:
        if cfg.stage == "classifier":
            stages.train_classifier(rt, cfg, data)
        else:
            play(rt, cfg, data)


def run_parts(job: TrainJob, cfg: SparsConfig, data: Loaded) -> None:
    """Do the classifier, unless `inputs` brings it, and self-play, each as a stage with a record."""
    given = cfg.inputs.classifier
    crops = cfg.classifier.label_source == "crop"
    masked = (data.train.ids if crops else ()) + (data.val.ids if crops or cfg.map.choose != "image" else ())
    masks = [data.dataset.case(name).label for name in masked]

    def work(rt: Runtime, kind: str, folders: Mapping[str, Path]) -> None:
        if kind == "classifier":
            stages.train_in(rt, cfg, data, folders[kind])
        else:
            inputs = cfg.inputs.model_copy(update=folders)
            play(rt, cfg.model_copy(update={"inputs": inputs}), data)

    run_staged(
        job,
        ["play"] if given is not None else ["classifier", "play"],
        work,
        upto="play" if cfg.stage == "all" else cfg.stage,
        decides={
            "volumes": data.digest(),
            "masks": [path if path is not None and path.is_file() else None for path in masks],
            "classifier": None if given is None else find_checkpoint(given, "last"),
        },
    )


def play(rt: Runtime, cfg: SparsConfig, data: Loaded) -> None:
    """Obtain the classifier, choose the threshold, and train the policy on the scores.

    The checkpoint holds the classifier too: it needs no other file.
    """
    path = stages.obtain(rt, cfg, data)
    opened = restoring.open_run(path, rt.job.manager, rt.device)
    scorer = opened.scorer
    rt.checkpoint.register(scorer=scorer)
    rt.checkpoint.describe(**opened.described(), **thresholds.chosen(rt, cfg, data, scorer))
    train.fit(rt, cfg, tables(cfg, data, scorer))


def tables(cfg: SparsConfig, data: Loaded, scorer: ScorerModule) -> train.PlayData:
    """Scores of the volumes to learn on, which hold what is looked for, and of validation volumes."""
    found = []
    for part, most in ((data.train, 0), (data.val, cfg.validation.volumes)):
        rows = [at for at in range(len(part)) if part.presence is None or bool(part.presence[at])]
        own = part.subset(rows[:most] if most else rows)
        found.append(make_table(cfg, scorer, own.volumes, own.ids, content=own.keys) if len(own) else None)
    if found[0] is None:
        raise ConfigError("training volumes", why="none of them holds what is looked for")
    return train.PlayData(train=found[0], val=found[1])
