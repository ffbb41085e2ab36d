"""Prediction: a policy hunts in a volume; its visits become a map, the map a mask on the grid of the file.

Beside the mask of each case are written: ``maps/<case>.nii.gz`` (the score map), ``paths/<case>.json`` (every
visited window) and, with ``--preview``, ``paths/<case>.png`` (the path over the volume).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from medrl.core.checkpoint import Checkpoint, load_checkpoint
from medrl.core.dataset import list_inputs, safe_case_id
from medrl.core.errors import ConfigError, DataError
from medrl.core.predicting import PredictOutcome
from medrl.core.types import Volume
from medrl.core.volume import grid_difference, read_volume, turn_like, write_volume
from medrl.core.volume.write import write_bytes

from .aggregate import components
from .data import prepare_volume, restore
from .hunting import NAMES, hunt, make_table, map_of, plan_of, policy_named
from .policies import Visits
from .restoring import Restored
from .restoring import restore as restore_run

if TYPE_CHECKING:
    from medrl.core.jobs import PredictJob

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for; None takes what the run says.

    Attributes:
        policy: One of `NAMES`.
        episodes: Rollouts.
        horizon: Steps of each.
        threshold: Of the map.
        organ: Folder of masks by case; nothing outside is kept.
        seed: Of starts and moves.
    """

    policy: str | None = None
    episodes: int | None = None
    horizon: int | None = None
    threshold: float | None = None
    organ: Path | None = None
    seed: int = 0


def run(job: PredictJob, options: Options) -> PredictOutcome:
    """Hunt in every volume of a job; maps of several folds are averaged.

    Raises:
        ConfigError: Options do not fit.
        CheckpointError: Self-play is asked for and the run has no policy.
    """
    if job.tta:
        raise ConfigError("--tta", why="a hunt is repeated by more rollouts", do="--episodes 16")
    if options.policy is not None and options.policy not in NAMES:
        raise ConfigError(f"--policy {options.policy}", why="unknown", do=", ".join(NAMES))
    names = {case.images[0].resolve(): case.id for case in list_inputs(job.inputs)}
    folder = job.output.parent if job.output.name.endswith(SUFFIXES) else job.output
    device = _device(job.device)

    def load(checkpoint: Checkpoint) -> HuntPredictor:
        opened = restore_run(checkpoint, job.manager, device)
        return HuntPredictor(opened, options, names, folder, picture=job.preview)

    for path in job.checkpoints:  # before anything is written
        opened = restore_run(load_checkpoint(path, method="spars"), job.manager, device)
        if (options.policy or opened.cfg.map.policy) == "self-play" and opened.agent is None:
            raise ConfigError("--policy self-play", why=f"{path} holds no policy", do="--policy scan")
    return job.run(load)


class HuntPredictor:
    """Hunts in volumes, writes maps and paths, and returns the map as the probability of the target.

    Args:
        opened: The run.
        options: Of the command line.
        names: Identifier of each input file.
        folder: Where ``maps`` and ``paths`` go.
        picture: Also draw paths.
    """

    def __init__(
        self,
        opened: Restored,
        options: Options,
        names: Mapping[Path, str],
        folder: Path,
        *,
        picture: bool = False,
    ) -> None:
        self.run, self.options, self.names, self.folder, self.picture = (
            opened,
            options,
            dict(names),
            folder,
            picture,
        )
        self.label_names: Mapping[str, int] = opened.label_names
        self.channel_names: Sequence[str] = tuple(opened.meta.get("channel_names") or ("image",))
        self.policy = options.policy or opened.cfg.map.policy
        chosen = float(opened.threshold["value"])
        self.threshold = chosen if options.threshold is None else options.threshold
        self._smallest = opened.cfg.map.smallest

    def probabilities(self, volume: Volume, *, tta: bool, overlap: float) -> NDArray[Any]:
        """Return ``(2, X, Y, Z)``: 1 - map and map, on the grid of the input.

        Args:
            volume: One channel.
            tta: Not used.
            overlap: Not used: stride and window are of the run.
        """
        del tta, overlap
        cfg, name = self.run.cfg, self._name(volume)
        prepared, plan = prepare_volume(volume, cfg)
        table = make_table(cfg, self.run.scorer, [prepared], [name], cached=False)
        policy = policy_named(self.policy, cfg, table, self.run.agent)
        lengths = plan_of(cfg, episodes=self.options.episodes, horizon=self.options.horizon)
        visits = hunt(table, 0, policy, lengths, seed=self.options.seed, name=name)
        score_map = map_of(table, 0, visits, cfg.map)
        largest = float(score_map.max())
        if cfg.map.normalise and largest > 0.0:
            score_map = score_map / largest
        if not largest > cfg.map.floor:
            score_map = torch.zeros_like(score_map)
        native = np.asarray(restore(score_map, plan, kind="linear"), dtype=np.float32)
        organ = self._organ(volume, name)
        if organ is not None:
            native = native * organ
        self._smallest = round(cfg.map.smallest * native.size / prepared.numel())
        self._write(volume, name, native, prepared, visits)
        found = np.clip(native, 0.0, 1.0) if cfg.map.aggregate != "sum" or cfg.map.normalise else native
        result: NDArray[Any] = np.stack([1.0 - found, found])
        return result

    def decode(self, probabilities: NDArray[Any]) -> NDArray[Any]:
        """Turn ``(2, X, Y, Z)`` into labels ``(X, Y, Z)``: above the threshold, without small components."""
        mask = torch.from_numpy(np.ascontiguousarray(probabilities[1])) > self.threshold
        settings = self.run.cfg.map
        if self._smallest > 1 or settings.largest:
            mask = components(mask, smallest=self._smallest, largest=settings.largest)
        value = self.label_names[self.run.target]
        labels: NDArray[Any] = mask.numpy().astype(np.uint8) * np.uint8(value)
        return labels

    def _write(
        self, volume: Volume, name: str, native: NDArray[np.float32], prepared: torch.Tensor, visits: Visits
    ) -> None:
        from medrl.core.predicting.record import json_bytes

        write_volume(self.folder / "maps" / f"{name}.nii.gz", native, volume, kind="image")
        window = self.run.cfg.score.window
        path = {
            "case": name,
            "policy": self.policy,
            "window": list(window),
            "grid": list(prepared.shape),
            "axes": "voxels of the prepared volume in RAS order; corners are minimum corners",
            "windows_scored": visits.windows_scored,
            "label_source": self.run.scorer.label_source,
            "threshold": {**self.run.threshold, "used": self.threshold},
            "visits": {
                "episode": visits.episode.tolist(),
                "step": visits.step.tolist(),
                "agent": visits.agent.tolist(),
                "corner": visits.corners.tolist(),
                "score": [round(float(score), 6) for score in visits.scores.tolist()],
            },
            "final": visits.final.tolist(),
        }
        write_bytes(self.folder / "paths" / f"{name}.json", json_bytes(path), suffix=".json")
        if self.picture:
            from .drawing import draw_path

            centres = visits.corners.cpu().float() + torch.tensor(window) / 2.0
            picture = draw_path(
                prepared.cpu().numpy(),
                centres.numpy(),
                visits.episode.cpu().numpy(),
                visits.agent.cpu().numpy(),
                title=f"{name}, {self.policy}, {visits.windows_scored} windows scored",
                episodes=0 if self.policy in ("scan", "tiles") else 4,
            )
            write_bytes(self.folder / "paths" / f"{name}.png", picture, suffix=".png")

    def _organ(self, volume: Volume, name: str) -> NDArray[np.bool_] | None:
        """The organ mask of a case ``(X, Y, Z)``, in the voxel order of its image."""
        folder = self.options.organ
        if folder is None:
            return None
        path = next(
            (folder / f"{name}{end}" for end in SUFFIXES if (folder / f"{name}{end}").is_file()), None
        )
        if path is None:
            raise DataError(f"case {name}", why=f"no organ mask in {folder}", do=f"{name}.nii.gz", case=name)
        found = read_volume(path, kind="label")
        placed = turn_like(found, volume) if grid_difference(found, volume) else found
        if placed is None:
            raise DataError(f"case {name}", why="the organ mask does not lie on the image", case=name)
        mask: NDArray[np.bool_] = np.asarray(placed.data[0] > 0)
        return mask

    def _name(self, volume: Volume) -> str:
        source = None if volume.source is None else Path(volume.source).resolve()
        if source in self.names:
            return self.names[source]
        return safe_case_id("scan" if source is None else source.name.split(".")[0])


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
