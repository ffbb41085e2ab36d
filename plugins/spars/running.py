"""A run: the classifier alone, or self-play with everything that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medrl.core.checkpoint import find_checkpoint
from medrl.core.errors import ConfigError

from . import restoring, stages, thresholds, train
from .config import SparsConfig
from .data import Loaded, load
from .hunting import make_table

if TYPE_CHECKING:
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
    # Wrong paths are found before a run folder is made.
    if cfg.data.root is None:
        raise ConfigError("data.root is missing", do="medrl train spars --data DATASET")
    if cfg.stage != "classifier" and cfg.inputs.classifier is not None:
        find_checkpoint(cfg.inputs.classifier, "last")
    data = load(cfg)
    with job.runtime() as rt:
        if cfg.stage == "classifier":
            stages.train_classifier(rt, cfg, data)
        else:
            play(rt, cfg, data)


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
