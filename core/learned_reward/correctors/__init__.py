"""Correctors: what makes a label map anatomically plausible, and tells how plausible it was."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from medrl.core.errors import ConfigError, did_you_mean

from ..corruption import AffineRanges, CorruptionRanges
from ..fields import from_params
from .base import Corrector, CorrectorModule, LearnedCorrector
from .classical import AtlasCorrector, MorphologyCorrector, NoCorrector, dice_per_image
from .denoiser import Denoiser
from .vae import MaskVAE, attribute_loss, gaussian_kl, mask_attributes, soft_dice

CorrectorKind = Literal["denoiser", "vae", "morphology", "atlas", "none"]
CORRECTORS: tuple[CorrectorKind, ...] = ("denoiser", "vae", "morphology", "atlas", "none")
LEARNED: tuple[CorrectorKind, ...] = ("denoiser", "vae")


def build_corrector(
    kind: str,
    *,
    classes: int,
    network: nn.Module | None = None,
    masks: Tensor | None = None,
    shape: Sequence[int] | None = None,
    **params: Any,
) -> CorrectorModule:
    """Build a corrector by name.

    Args:
        kind: ``denoiser``, ``vae``, ``morphology``, ``atlas`` or ``none``.
        classes: K.
        network: Of the denoiser: K channels in, K out; for other kinds it is not used.
        masks: Of the atlas: ``(M, *S)`` source masks; None waits for those of a state dict.
        shape: Of the VAE, where `params` has no `size`: that of the label maps, each length of the plane
            rounded to a multiple of 2^(blocks + 1).
        params: Further settings of that kind; `jitter` and `corruption` may be mappings of plain values, and
            `jitter` None.

    Raises:
        ConfigError: Unknown kind or setting, or something that it needs is missing.
    """
    what = f"corrector '{kind}'"
    if kind not in CORRECTORS:
        raise ConfigError(what, why=did_you_mean(kind, CORRECTORS))
    target: type[CorrectorModule] = {
        "denoiser": Denoiser,
        "vae": MaskVAE,
        "morphology": MorphologyCorrector,
        "atlas": AtlasCorrector,
        "none": NoCorrector,
    }[kind]
    known = set(inspect.signature(target).parameters) - {"classes", "network", "masks"}
    unknown = [f"{name}: {did_you_mean(name, known)}" for name in params if name not in known]
    if unknown:
        raise ConfigError(what, why="unknown settings", problems=unknown)
    for name, ranges in (("jitter", AffineRanges), ("corruption", CorruptionRanges)):
        if isinstance(params.get(name), Mapping):
            params[name] = from_params(ranges, params[name], f"{what}, {name}")
    if kind == "denoiser":
        if network is None:
            raise ConfigError(what, why="it has no network")
        return Denoiser(network, classes, **params)
    if kind == "vae":
        if params.get("size") is None:
            if shape is None:
                raise ConfigError(what, why="the size of the label maps is not known", do="set its size")
            step = 2 ** (int(params.get("blocks", 4)) + 1)
            plane = [max(step, round(length / step) * step) for length in shape[:2]]
            params["size"] = (*plane, *shape[2:])
        return MaskVAE(classes, **params)
    if kind == "atlas":
        return AtlasCorrector(classes, masks)
    return target(classes)


__all__ = [
    "CORRECTORS",
    "LEARNED",
    "AtlasCorrector",
    "Corrector",
    "CorrectorKind",
    "CorrectorModule",
    "Denoiser",
    "LearnedCorrector",
    "MaskVAE",
    "MorphologyCorrector",
    "NoCorrector",
    "attribute_loss",
    "build_corrector",
    "dice_per_image",
    "gaussian_kl",
    "mask_attributes",
    "soft_dice",
]
