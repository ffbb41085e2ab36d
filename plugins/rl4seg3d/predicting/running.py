"""The prediction of files: read, segment, optimise if asked to, judge, write, record."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medrl.core.errors import ConfigError
from medrl.core.predicting import CaseLoop, CaseRecord, Clock, PredictOutcome, check_part, limited_threads
from medrl.core.predicting.planning import case_digest
from medrl.core.predicting.record import file_digest, json_bytes, plain, settings_digest, versions
from medrl.core.types import Case
from medrl.core.volume import image_suffix, write_volume
from medrl.core.volume.write import write_bytes

from .. import preview, tto
from ..io import (
    EchoSequence,
    Prepared,
    list_sequences,
    plan_sequences,
    prepare,
    read_sequence,
    restore,
    to_grid,
)
from ..predict_config import PredictConfig
from .assessing import Assessment, Assessor
from .model import load_model
from .segmenting import Segmenter, fused, largest_blobs
from .writing import write_probabilities

if TYPE_CHECKING:
    from medrl.core.jobs import PredictJob

_UNLIKE = 1.5
"""Factor between pixel sizes from which on a network is out of its depth."""
_log = logging.getLogger("medrl.rl4seg3d")


def run(job: PredictJob, config: PredictConfig) -> PredictOutcome:
    """Predict every file of a job; one that fails is recorded and the others go on.

    Raises:
        CheckpointError: The model is damaged, or none of rl4seg3d.
        ConfigError: The settings contradict each other or the model.
        DataError: Nothing to predict, or results would collide.
    """
    with limited_threads(job.threads):
        return SequenceRun(job, config).run()


@dataclass(eq=False, kw_only=True)
class _Found:
    """The segmentation of one file.

    Attributes:
        labels: `(X, Y, T)` on the grid of the file, uint8.
        inner: `(X', Y', T)` on the grid of the network.
        assessment: Verdict on `labels`.
        probabilities: `(K, X, Y, T)` on the grid of the file, if asked for.
        rewards: Maps `(X', Y', T)` by name, ``fused`` among them.
        uncertainty: 1 - calibrated fused reward, on the grid of the network.
    """

    labels: NDArray[np.uint8]
    inner: NDArray[np.uint8]
    assessment: Assessment | None = None
    probabilities: NDArray[np.float32] | None = None
    rewards: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    uncertainty: NDArray[np.float32] | None = None

    def worst(self, inner: tuple[slice, slice]) -> float:
        """Mean fused reward of the worst frame, padding left out."""
        return float(self.rewards["fused"][inner].mean(axis=(0, 1)).min())


class SequenceRun(CaseLoop):
    """One run over files of sequences."""

    def __init__(self, job: PredictJob, config: PredictConfig) -> None:
        check_part(job)
        if len(job.checkpoints) != 1:
            raise ConfigError("--model", why=f"{len(job.checkpoints)} models; sequences are predicted by one")
        self.config = config
        self.device = _device(job.device)
        self.model = load_model(job.checkpoints[0], config, device=self.device, manager=job.manager)
        self.assess = Assessor.of(config, self.model.label_names, self.model.facts)
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[job.precision]
        self.segmenter = Segmenter(
            device=self.device,
            dtype=dtype,
            blend=config.blend,
            batch=1 if self.device.type == "cpu" else 5,
        )
        if self.model.network is not None and self.device.type == "cpu":
            self.model.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._check(job)
        one_file = image_suffix(job.output) in (".nii", ".nii.gz") and not job.output.is_dir()
        cases = list_sequences(job.inputs, leave_out=None if one_file else job.output)
        folder, outputs = plan_sequences(job.output, cases)
        settings = {
            "method": job.method,
            "model": self.model.digest,
            "rewards": {name: file_digest(file) for name, file in config.reward_files},
            "tta": job.tta,
            "precision": job.precision,
            "config": config.model_dump(mode="json", exclude={"overwrite", "gif", "mp4"}),
        }
        super().__init__(
            job,
            cases=cases,
            folder=folder,
            outputs=outputs,
            names=self.model.label_names,
            settings=settings_digest(settings),
            facts=self._facts(job),
        )
        there = [str(self.outputs[case.id]) for case in self.cases if self.outputs[case.id].exists()]
        if there and not (config.overwrite or job.continue_):
            raise ConfigError(
                f"{len(there)} results exist, such as {there[0]}",
                why="they would be replaced",
                do="--continue keeps what is finished, --overwrite replaces it",
            )
        said = "25 views" if job.tta else "one view"
        _log.info("test-time augmentation: %s; test-time optimisation: %s", said, config.tto.mode)

    def predict(self, case: Case) -> CaseRecord:
        """Predict one file."""
        clock = Clock()
        digest = case_digest(case)
        sequence = read_sequence(
            case.images[0], time_axis=self.config.time_axis, pixel_size_mm=self.config.pixel_size_mm
        )
        clock.lap("read")
        prepared = prepare(sequence, self.model.plan)
        images = torch.from_numpy(prepared.images)
        odd = unlike(prepared.spacing_mm, self.model.facts.get("pixel_mm"))
        if odd:
            _log.warning("case %s: %s", case.id, odd)
            sequence = replace(sequence, notes=(*sequence.notes, odd))
        clock.lap("prepare")
        found = (
            self._package(sequence, prepared)
            if self.model.scripted
            else self._segment(self.model.network, sequence, prepared)
        )
        clock.lap("segment")
        self._judge(found, images)
        clock.lap("rewards")
        found, trace = self._optimised(found, sequence, prepared, images)
        clock.lap("optimise")
        info = self._info(found, sequence, prepared, trace)
        files = self._write(case, found, sequence, prepared)
        clock.lap("write")
        info["seconds"] = clock.seconds
        report = self.folder / "reports" / f"{case.id}.json"
        write_bytes(report, json_bytes({"case": case.id, **info}))
        return CaseRecord(
            status="done",
            output=self.relative(self.outputs[case.id]),
            files={self.relative(path): file_digest(path) for path in [*files, report]},
            inputs=digest,
            settings=self.settings,
            seconds=clock.seconds,
            info=plain(info),
        )

    def is_complete(self, record: CaseRecord) -> bool:
        """Whether the side outputs that are asked for now were written."""
        folders = {Path(name).parts[0] for name in record.files}
        suffixes = {Path(name).suffix for name in record.files if Path(name).parts[0] == "previews"}
        wanted = {
            "probabilities": self.job.save_probabilities,
            "uncertainty": self.job.save_uncertainty,
        }
        if any(asked and folder not in folders for folder, asked in wanted.items()):
            return False
        return suffixes >= {f".{kind}" for kind in self._movies()}

    # -- steps of one file ---------------------------------------------------------------------------

    def _segment(self, network: nn.Module | None, sequence: EchoSequence, prepared: Prepared) -> _Found:
        """Segment with a network, frame by frame."""
        if network is None:
            raise ConfigError("the model", why="it has no network")
        shape, inner = sequence.frames.shape, prepared.images.shape
        labels, small = np.zeros(shape, dtype=np.uint8), np.zeros(inner, dtype=np.uint8)
        keep: NDArray[np.float32] | None = None
        frames = self.segmenter.probabilities(network, torch.from_numpy(prepared.images), tta=self.job.tta)
        for t, probabilities in frames:
            back = restore(probabilities, prepared)
            labels[..., t] = back.argmax(axis=0)
            small[..., t] = probabilities.argmax(axis=0)
            if self.job.save_probabilities:
                if keep is None:
                    keep = np.zeros((len(probabilities), *shape), dtype=np.float32)
                keep[..., t] = back
        return self._assessed(_Found(labels=labels, inner=small, probabilities=keep), sequence)

    def _package(self, sequence: EchoSequence, prepared: Prepared) -> _Found:
        """Segment with a TorchScript package, which takes the whole sequence."""
        scripted = self.model.scripted
        if scripted is None:
            raise ConfigError("the model", why="it is no package")
        images = torch.from_numpy(prepared.images).to(self.device)
        small, rewards = scripted(images, tta=self.job.tta)
        inner = small.cpu().numpy().astype(np.uint8)
        labels = np.zeros(sequence.frames.shape, dtype=np.uint8)
        classes = len(self.model.label_names)
        for t in range(sequence.frames.shape[2]):
            each = (inner[..., t] == np.arange(classes)[:, None, None]).astype(np.float32)
            labels[..., t] = restore(each, prepared).argmax(axis=0)
        found = _Found(labels=labels, inner=inner)
        if self.config.rewards:
            found.rewards = {name: reward.cpu().numpy() for name, reward in rewards.items()}
            if rewards and "fused" not in rewards:
                found.rewards["fused"] = fused(list(rewards.values()), self.config.fusion).cpu().numpy()
            if rewards:
                found.uncertainty = np.float32(1.0) - found.rewards["fused"]
        return self._assessed(found, sequence)

    def _assessed(self, found: _Found, sequence: EchoSequence) -> _Found:
        """Keep the largest blob of each frame and judge the sequence by the rules."""
        found.labels, found.inner = largest_blobs(found.labels), largest_blobs(found.inner)
        found.assessment = self.assess(found.labels, sequence.spacing_mm, sequence.frame_time_s)
        return found

    def _judge(self, found: _Found, images: Tensor) -> None:
        """Let the reward nets judge the labels on the grid of the network."""
        if self.model.scripted is not None or not self.model.rewards or not self._wants_rewards():
            return
        labels = torch.from_numpy(found.inner)
        plain_maps: dict[str, Tensor] = {}
        calibrated: list[Tensor] = []
        for name, reward in self.model.rewards.items():
            raw = torch.empty(images.shape)
            for t, values in self.segmenter.reward(reward.raw, images, labels):
                raw[..., t] = values
            plain_maps[name] = reward.finish(raw, calibrated=False)
            calibrated.append(reward.finish(raw, calibrated=True))
        found.rewards = {name: values.numpy() for name, values in plain_maps.items()}
        found.rewards["fused"] = fused(list(plain_maps.values()), self.config.fusion).numpy()
        found.uncertainty = (1.0 - fused(calibrated, self.config.fusion)).numpy()

    def _optimised(
        self, found: _Found, sequence: EchoSequence, prepared: Prepared, images: Tensor
    ) -> tuple[_Found, tto.Trace | None]:
        """Optimise the actor on this file where that is asked for; keep what its own reward finds better."""
        mode = self.config.tto.mode
        if mode == "off" or self.model.network is None:
            return found, None
        if not self.model.rewards:
            return found, tto.Trace(why="the model has no reward nets")
        if mode == "auto" and found.assessment is not None and found.assessment.valid:
            return found, tto.Trace(why="the first prediction is valid")
        network, trace = tto.optimise(
            self.model.network, self._fused_reward, images, self.config.tto, device=self.device
        )
        if network is None:
            return found, replace(trace, why="no pass had a better worst frame")
        second = self._segment(network, sequence, prepared)
        self._judge(second, images)
        before, after = found.worst(prepared.inner), second.worst(prepared.inner)
        final = {"worst_before": before, "worst_after": after}
        if after <= before:
            return found, replace(trace, final=final, why="its whole prediction had no better worst frame")
        return second, replace(trace, final=final, accepted=True)

    def _fused_reward(self, images: Tensor, labels: Tensor) -> Tensor:
        rewards = [
            reward.finish(reward.raw(images, labels), calibrated=False)
            for reward in self.model.rewards.values()
        ]
        return fused(rewards, self.config.fusion)

    def _info(
        self, found: _Found, sequence: EchoSequence, prepared: Prepared, trace: tto.Trace | None
    ) -> dict[str, Any]:
        """Return what the report says of this file."""
        info: dict[str, Any] = {
            "shape": list(sequence.frames.shape),
            "spacing_mm": list(sequence.spacing_mm),
            "frame_time_s": sequence.frame_time_s,
            "network_grid": {
                "shape": list(prepared.images.shape),
                "spacing_mm": list(prepared.spacing_mm),
                "equalised": prepared.equalised,
            },
            "notes": list(sequence.notes),
        }
        empty = [t for t in range(found.labels.shape[-1]) if not found.labels[..., t].any()]
        if empty:
            info["empty_frames"] = empty
        if not sequence.frames.any():
            info["notes"].append("the sequence is blank")
        if found.assessment is not None:
            info |= found.assessment.to_dict()
        if found.rewards:
            info["rewards"] = {name: _summary(values, prepared) for name, values in found.rewards.items()}
        if trace is not None:
            info["tto"] = trace.to_dict()
        return info

    def _write(self, case: Case, found: _Found, sequence: EchoSequence, prepared: Prepared) -> list[Path]:
        """Write everything of one file, the segmentation last."""
        written: list[Path] = []
        maps: dict[str, tuple[str, NDArray[np.float32]]] = {
            f"reward_{name}": ("rewards", values)
            for name, values in found.rewards.items()
            if self.config.rewards
        }
        if self.job.save_uncertainty and found.uncertainty is not None:
            maps["uncertainty"] = ("uncertainty", found.uncertainty)
        for name, (place, values) in maps.items():
            path = self.folder / place / f"{case.id}_{name}.nii.gz"
            back = restore(np.moveaxis(values, -1, 0).astype(np.float32), prepared)
            write_volume(path, to_grid(np.moveaxis(back, 0, -1), sequence), sequence.volume, kind="image")
            written.append(path)
        if found.probabilities is not None:
            path = self.folder / "probabilities" / f"{case.id}.npz"
            write_probabilities(path, found.probabilities, sequence)
            written.append(path)
        for kind in self._movies():
            path = self.folder / "previews" / f"{case.id}.{kind}"
            preview.write_movie(path, sequence, found.labels, self.names, kind=kind)
            written.append(path)
        target = self.outputs[case.id]
        write_volume(target, to_grid(found.labels, sequence), sequence.volume, kind="image")
        return [*written, target]

    # -- settings ------------------------------------------------------------------------------------

    def _movies(self) -> list[str]:
        return ["gif"] * (self.config.gif or self.job.preview) + ["mp4"] * self.config.mp4

    def _wants_rewards(self) -> bool:
        return self.config.rewards or self.job.save_uncertainty or self.config.tto.mode != "off"

    def _check(self, job: PredictJob) -> None:
        """Refuse before the first file what could not be given."""
        if self.model.scripted is not None and job.save_probabilities:
            raise ConfigError("--save-probabilities", why="a TorchScript package gives labels only")
        judged = bool(self.model.rewards) or (self.model.scripted is not None and self.model.scripted.fused)
        if job.save_uncertainty and not judged:
            raise ConfigError(
                "--save-uncertainty",
                why="it is 1 - reward, and the model has no reward nets",
                do="add one: --reward anatomical=FILE",
            )
        if self.config.tto.mode != "off" and not self.model.rewards:
            _log.warning("--tto %s does nothing: the model has no reward nets", self.config.tto.mode)
        if job.overlap != type(job).overlap:
            _log.warning("--overlap does nothing: windows of four frames begin at every second frame")
        if job.statistics:
            _log.warning("--statistics adds nothing: areas and volumes are in reports/ always")
        if self.config.mp4:
            preview.require_ffmpeg()

    def _facts(self, job: PredictJob) -> dict[str, Any]:
        return {
            "method": job.method,
            "command": list(job.command),
            "options": {
                "tta": job.tta,
                "device": str(self.device),
                "precision": job.precision,
                "part": list(job.part),
            },
            "versions": versions(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": {"file": str(self.model.path), "sha256": self.model.digest, **self.model.facts},
            "reward_maps": list(self.model.reward_names),
            "settings": self.config.model_dump(mode="json"),
            "labels": dict(self.model.label_names),
        }


def unlike(pixel_mm: Sequence[float], trained_mm: Sequence[float] | None) -> str:
    """Say that pixels are of another size than those a network was trained on, or nothing."""
    if not trained_mm or len(trained_mm) < 2:
        return ""
    apart = max(abs(math.log(own / was)) for own, was in zip(pixel_mm, trained_mm[:2], strict=True))
    if apart < math.log(_UNLIKE):
        return ""
    own, was = (",".join(f"{step:.3g}" for step in size) for size in (pixel_mm, trained_mm[:2]))
    return f"the network sees pixels of {own} mm and was trained on {was} mm; --spacing {was} resamples"


def _summary(values: NDArray[np.float32], prepared: Prepared) -> dict[str, Any]:
    """Return mean and least frame of a reward map, over the frame without its padding."""
    inside: Mapping[int, Any] | NDArray[np.float32] = values[prepared.inner]
    frames = np.asarray(inside).mean(axis=(0, 1))
    return {"mean": float(frames.mean()), "worst_frame": float(frames.min()), "frames": frames.tolist()}


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
