"""Weights of nnU-Net v2: read safely, mapped onto a student, or rebuilt as the network that they belong to.

A ``checkpoint_best.pth`` of a plain 7-stage U-Net holds 344 keys, of which 128 are different tensors: the
rest are the aliases ``*.all_modules.*`` and ``decoder.encoder.*``. They map one to one onto `PlainConvUNet`.

Source: specification §3 ("nnU-Net initialisation"); nnunetv2 and dynamic_network_architectures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medrl.core.checkpoint import load_foreign
from medrl.core.errors import CheckpointError, ConfigError, did_you_mean
from medrl.plugins.graft.models import PlainConvUNet

SCOPES = ("encoder", "all")
REQUIRED = 0.9
"""Share of the student's encoder tensors that must be filled."""

_PREFIXES = ("module.", "_orig_mod.")
_CONTAINERS = ("network_weights", "state_dict", "model_state_dict", "model")
_CONV = re.compile(r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.conv\.weight")
_UP = re.compile(r"decoder\.transpconvs\.(\d+)\.weight")
_DECODER_CONV = re.compile(r"decoder\.stages\.(\d+)\.convs\.(\d+)\.conv\.weight")


@dataclass(frozen=True)
class InitReport:
    """What an initialisation did.

    Attributes:
        copied: Names of the student's tensors that were filled.
        skipped: Names that were not, each with the reason.
        unused: Names of the checkpoint that found no place.
    """

    copied: tuple[str, ...]
    skipped: Mapping[str, str]
    unused: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for the log."""
        text = f"{len(self.copied)} tensors copied, {len(self.skipped)} left as they were"
        reasons = sorted(set(self.skipped.values()))
        return f"{text} ({'; '.join(reasons)})" if reasons else text


@dataclass(frozen=True)
class NnUNetCheckpoint:
    """A checkpoint of nnU-Net v2.

    Attributes:
        weights: Clean weights, see `clean_weights`.
        plans: The plans, if the file has them.
        configuration: Name of the configuration, such as ``3d_fullres``.
        dataset: Its dataset.json.
        fold: Fold that the network was trained for: its validation cases were not trained on.
        mirroring: Axes that its inference may mirror.
    """

    path: Path
    weights: dict[str, Tensor]
    plans: dict[str, Any] = field(default_factory=dict)
    configuration: str = ""
    dataset: dict[str, Any] = field(default_factory=dict)
    fold: str = ""
    mirroring: tuple[int, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration with everything it inherits; empty without plans."""
        return configuration_of(self.plans, self.configuration) if self.plans else {}

    def network(self, *, deep_supervision: bool = False, neg2: str = "decoder") -> PlainConvUNet:
        """Rebuild the network with its weights, in evaluation mode."""
        network = network_of(self.weights, deep_supervision=deep_supervision, neg2=neg2, what=str(self.path))
        network.load_state_dict(self.weights)
        return network.eval()


def read_nnunet(path: Path, *, trust: bool = False) -> NnUNetCheckpoint:
    """Read a checkpoint of nnU-Net v2.

    Args:
        path: ``checkpoint_best.pth`` or ``checkpoint_final.pth``.
        trust: Accept pickled Python objects beside the weights (they are replaced by stubs, never run).

    Raises:
        CheckpointError: Damaged, not loadable without `trust`, or without weights.
    """
    content = load_foreign(path, trust=trust)
    weights = clean_weights(_tensors(content, path))
    init = content.get("init_args")
    init = init if isinstance(init, Mapping) else {}
    axes = content.get("inference_allowed_mirroring_axes")
    return NnUNetCheckpoint(
        path=path,
        weights=weights,
        plans=_plain(init.get("plans")),
        configuration=str(init.get("configuration", "")),
        dataset=_plain(init.get("dataset_json")),
        fold=str(init.get("fold", "")),
        mirroring=tuple(int(a) for a in axes) if isinstance(axes, Sequence) else (),
    )


def clean_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip ``module.`` and ``_orig_mod.`` and leave out the aliases."""
    clean = {}
    for name, tensor in weights.items():
        while name.startswith(_PREFIXES):
            name = name[len(next(p for p in _PREFIXES if name.startswith(p))) :]
        if ".all_modules." not in name and not name.startswith("decoder.encoder."):
            clean[name] = tensor
    return clean


def init_student(
    student: nn.Module,
    path: Path,
    *,
    scope: str = "encoder",
    trust: bool = False,
    regions: bool = False,
) -> InitReport:
    """Start a student from a checkpoint of nnU-Net; see `apply_weights`."""
    return apply_weights(
        student, read_nnunet(path, trust=trust).weights, scope=scope, regions=regions, what=str(path)
    )


def apply_weights(
    student: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    scope: str = "encoder",
    regions: bool = False,
    what: str = "checkpoint",
) -> InitReport:
    """Copy weights of equal name and shape into a student; the student is untouched on error.

    Args:
        student: A `PlainConvUNet` on any device.
        weights: Of nnU-Net, clean or not.
        scope: ``encoder`` or ``all``.
        regions: The target is the two prostate regions; three region outputs then give their first two
            rows, because region {2, 3} is cancer. Otherwise segmentation layers are copied only if their
            outputs are equal in number.
        what: Names the checkpoint in errors.

    Raises:
        ConfigError: The student is no `PlainConvUNet`, or the scope is unknown.
        CheckpointError: Less than 90 % of the encoder's tensors could be filled.
    """
    if scope not in SCOPES:
        raise ConfigError(f"init scope '{scope}'", why=did_you_mean(scope, SCOPES))
    if not isinstance(student, PlainConvUNet):
        raise ConfigError(
            "initialisation from nnU-Net",
            why=f"{type(student).__name__} has other layers than nnU-Net's plain U-Net",
            do="choose graft.fullres or another plain U-Net of graft",
        )
    weights = clean_weights(weights)
    chosen: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    own = student.state_dict()
    for name, tensor in own.items():
        if scope == "encoder" and not name.startswith("encoder."):
            skipped[name] = "outside the scope"
        elif name not in weights:
            skipped[name] = "not in the checkpoint"
        elif weights[name].shape == tensor.shape:
            chosen[name] = weights[name]
        elif name.startswith("decoder.seg_layers.") and regions and _rows(weights[name], tensor):
            chosen[name] = weights[name][: tensor.shape[0]]
        else:
            skipped[name] = (
                "another number of classes" if name.startswith("decoder.seg_layers.") else "another shape"
            )
    encoder = [name for name in own if name.startswith("encoder.")]
    filled = sum(name in chosen for name in encoder)
    if filled < REQUIRED * len(encoder):
        first = next(name for name in encoder if name not in chosen)
        raise CheckpointError(
            f"{what} does not fit the student",
            why=f"{filled} of {len(encoder)} encoder tensors fit; '{first}': {skipped[first]}",
            do="choose the model that the checkpoint was trained with (channels, stages, kernels)",
        )
    with torch.no_grad():
        for name, tensor in chosen.items():
            own[name].copy_(tensor)
    unused = tuple(name for name in weights if name not in chosen)
    return InitReport(tuple(chosen), skipped, unused)


def network_of(
    weights: Mapping[str, Tensor],
    *,
    deep_supervision: bool = False,
    neg2: str = "decoder",
    what: str = "checkpoint",
) -> PlainConvUNet:
    """Build the empty plain U-Net that clean weights belong to.

    Channels and kernels are read from the convolutions, strides from the transposed convolutions, whose
    kernel equals the stride; the first stage never downsamples.

    Raises:
        CheckpointError: The weights are of another kind of network.
    """
    encoder = _stages(weights, _CONV)
    decoder = _stages(weights, _DECODER_CONV)
    ups = {int(m.group(1)): t for name, t in weights.items() if (m := _UP.fullmatch(name))}
    stages = len(encoder)
    complete = (
        stages >= 2
        and sorted(encoder) == list(range(stages))
        and sorted(decoder) == list(range(stages - 1)) == sorted(ups)
        and "decoder.seg_layers.0.weight" in weights
    )
    if not complete:
        raise CheckpointError(
            f"{what} is no plain U-Net of nnU-Net",
            why="its layers have other names (residual encoders and transformers are not supported)",
            do="train the teacher with the default nnU-Net planner",
        )
    if any(tensor.dim() != 5 for tensor in ups.values()):
        raise CheckpointError(f"{what} is a 2D network", do="use a 3D configuration, such as 3d_fullres")
    network = PlainConvUNet(
        in_channels=encoder[0][0].shape[1],
        out_channels=weights["decoder.seg_layers.0.weight"].shape[0],
        features=[encoder[s][0].shape[0] for s in range(stages)],
        kernels=[tuple(encoder[s][0].shape[2:]) for s in range(stages)],
        strides=[(1, 1, 1), *(tuple(ups[stages - 1 - s].shape[2:]) for s in range(1, stages))],
        convs=[len(encoder[s]) for s in range(stages)],
        convs_decoder=[len(decoder[s]) for s in range(stages - 1)],
        deep_supervision=deep_supervision,
        neg2=neg2,
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        odd = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{what} is no plain U-Net of nnU-Net",
            why=f"{len(odd)} tensors differ, the first is '{odd[0]}'",
            do="train the teacher with the default nnU-Net planner",
        )
    return network


def configuration_of(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration of nnU-Net's plans with what it inherits.

    Raises:
        CheckpointError: It is missing, or inherits from itself.
    """
    known = plans.get("configurations")
    known = known if isinstance(known, Mapping) else {}
    merged: dict[str, Any] = {}
    seen: list[str] = []
    while name:
        if name not in known or name in seen:
            raise CheckpointError(
                f"plans have no usable configuration '{name}'",
                why="it inherits from itself" if name in seen else did_you_mean(name, known),
            )
        seen.append(name)
        merged = {**known[name], **merged}
        name = str(known[name].get("inherits_from", ""))
    return merged


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors in a checkpoint."""
    for candidate in (*(content.get(name) for name in _CONTAINERS), content):
        if isinstance(candidate, Mapping):
            found = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
            if found:
                return found
    raise CheckpointError(
        f"{path} holds no network weights",
        why=f"looked for {', '.join(_CONTAINERS)}; found {', '.join(map(str, list(content)[:8]))}",
    )


def _stages(weights: Mapping[str, Tensor], pattern: re.Pattern[str]) -> dict[int, list[Tensor]]:
    """Convolution kernels by stage, in order."""
    found: dict[int, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        match = pattern.fullmatch(name)
        if match:
            found.setdefault(int(match.group(1)), {})[int(match.group(2))] = tensor
    return {stage: [convs[j] for j in sorted(convs)] for stage, convs in found.items()}


def _rows(given: Tensor, wanted: Tensor) -> bool:
    """Whether the first two of three outputs fill this tensor."""
    return given.shape[0] == 3 and wanted.shape[0] == 2 and given.shape[1:] == wanted.shape[1:]


def _plain(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
