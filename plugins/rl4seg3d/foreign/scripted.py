"""TorchScript packages of the original: both generations of their contract.

First generation: ``forward(image, tta)`` gives ``(labels, fused, stacked)``. Later ones:
``forward(image, view, tta)`` with `view_names()` and `reward_map_names()`, and labels alone or with
rewards. Images are padded to multiples of 32 before, so that the package never crops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medrl.core.errors import CheckpointError, ConfigError, did_you_mean
from medrl.core.predicting.record import file_digest

from .naming import REWARD_NAMES
from .reading import refuse_pointer

PROBE = (1, 1, 64, 64, 4)
LEAST_FRAMES = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Scripted:
    """A package that maps a whole sequence to labels.

    Attributes:
        path: The file.
        digest: Its SHA-256.
        module: What was loaded.
        generation: 1 or 2, see above.
        view: View that the package is told, second generation only.
        reward_names: Names of its reward maps.
        fused: Whether it gives a fused reward.
    """

    path: Path
    digest: str
    module: Any
    generation: int
    view: Any = None
    reward_names: tuple[str, ...] = ()
    fused: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, images: Tensor, *, tta: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Segment a sequence.

        Args:
            images: `(X, Y, T)` in [0, 1], sides multiples of 32.
            tta: Whether the package averages its views.

        Returns:
            Labels `(X, Y, T)`, and reward maps `(X, Y, T)` by name, ``fused`` among them if there is one.

        Raises:
            CheckpointError: The package fails, or gives something else than its contract says.
        """
        length = images.shape[-1]
        if length < LEAST_FRAMES:
            images = torch.cat([images, *([images[..., -1:]] * (LEAST_FRAMES - length))], dim=-1)
        asked = [images[None, None].float()]
        if self.generation == 2:
            asked.append(self.view)
        try:
            found = self.module(*asked, tta)
        except RuntimeError as error:
            raise _failed(self.path, error) from error
        labels, rewards = _taken(self.path, found, tuple(images.shape), self.reward_names)
        return labels[..., :length], {name: reward[..., :length] for name, reward in rewards.items()}


def load_scripted(
    path: Path, *, device: torch.device, trust: bool = False, view: str | None = None
) -> Scripted:
    """Load a TorchScript package and try it on an empty sequence.

    Args:
        path: The file.
        device: Where it runs.
        trust: Must be true: the file holds a program. It runs in TorchScript's own interpreter, not as
            Python.
        view: ``a2c``, ``a3c``, ``a4c``, …: for packages of the second generation.

    Raises:
        CheckpointError: Not trusted, damaged, of an unknown contract, or it does not run on this device.
        ConfigError: The view is missing or unknown.
    """
    refuse_pointer(path)
    if not trust:
        raise CheckpointError(
            f"{path} is a TorchScript package",
            why="it holds a program, and medrl runs a program of a file only when told to",
            do="add --trust-checkpoint if you trust whoever made it",
        )
    try:
        load: Any = torch.jit.load
        module = load(str(path), map_location=device).eval()
        names = [argument.name for argument in module.forward.schema.arguments if argument.name != "self"]
    except Exception as error:  # torch raises many kinds of errors for unusable archives
        raise CheckpointError(
            f"{path} cannot be loaded as TorchScript",
            why=" ".join(str(error).split())[:300],
            do="copy it again; packages frozen on a GPU may need --device cuda",
        ) from error
    generation = 2 if "view" in names or len(names) >= 3 else 1
    if not 1 < len(names) <= 3:
        raise CheckpointError(
            f"{path} has another contract",
            why=f"its forward takes ({', '.join(names)}), expected (image, tta) or (image, view, tta)",
        )
    chosen = _view(module, view) if generation == 2 else None
    given: tuple[str, ...] = REWARD_NAMES
    if generation == 2:
        told = getattr(module, "reward_map_names", None)
        given = tuple(str(name) for name in told()) if told is not None else ()
    scripted = Scripted(
        path=path,
        digest=file_digest(path),
        module=module,
        generation=generation,
        view=chosen,
        reward_names=tuple(_plain(name) for name in given),
    )
    _, rewards = scripted(torch.zeros(PROBE[2:], device=device), tta=False)
    return Scripted(
        path=path,
        digest=scripted.digest,
        module=module,
        generation=generation,
        view=chosen,
        reward_names=tuple(name for name in rewards if name != "fused"),
        fused="fused" in rewards,
        facts={"generation": generation, "view": view if generation == 2 else None},
    )


def _view(module: Any, view: str | None) -> Any:
    """Return the view in the type that the package wants."""
    told = getattr(module, "view_names", None)
    known = [str(name) for name in told()] if told is not None else ["a2c", "a3c", "a4c"]
    if view is None:
        raise ConfigError(
            "--view is missing", why=f"this package wants one of {', '.join(known)}", do="--view a4c"
        )
    lower = [name.lower() for name in known]
    if view.lower() not in lower:
        raise ConfigError(f"--view {view}", why=did_you_mean(view, known))
    number = lower.index(view.lower())
    arguments = [one for one in module.forward.schema.arguments if one.name != "self"]
    kind = str(arguments[1].type)
    if kind == "int":
        return number
    if kind == "Tensor":
        return torch.tensor([number])
    return known[number]


def _taken(
    path: Path, found: Any, shape: tuple[int, ...], names: tuple[str, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return labels and rewards of an answer of either generation."""
    parts = list(found) if isinstance(found, (tuple, list)) else [found]
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise _wrong(path, "it gives no tensors")
    labels = parts[0].reshape(parts[0].shape[-3:])
    if tuple(labels.shape) != shape:
        raise _wrong(path, f"labels of shape {tuple(labels.shape)} for an image of {shape}")
    rewards: dict[str, Tensor] = {}
    maps = [part for part in parts[1:] if part.numel()]
    for part in maps:
        if (part.dim() > 3 and part.shape[-4] > 1) or (part.dim() == 4 and part is not maps[0]):
            stacked = part.reshape(-1, *part.shape[-3:])
            known = names if len(names) == len(stacked) else tuple(str(k) for k in range(len(stacked)))
            rewards |= dict(zip(known, stacked, strict=True))
        else:
            rewards.setdefault("fused", part.reshape(part.shape[-3:]))
    for name, reward in rewards.items():
        if tuple(reward.shape) != shape:
            raise _wrong(path, f"reward {name} of shape {tuple(reward.shape)} for an image of {shape}")
    if set(rewards) == {"fused"} and len(names) == 1:
        rewards = {names[0]: rewards["fused"], "fused": rewards["fused"]}
    return labels.to(torch.int64), {name: reward.float() for name, reward in rewards.items()}


def _plain(name: str) -> str:
    """Return a name that is safe in a file name."""
    text = "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_") or "reward"
    return {"anat": "anatomical", "lm": "landmark", "landmarks": "landmark"}.get(text, text)


def _wrong(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} does not keep to its contract", why=why)


def _failed(path: Path, error: Exception) -> CheckpointError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CheckpointError(
        f"{path} does not run here",
        why=lines[-1][:300] if lines else type(error).__name__,
        do="packages frozen on a GPU may need --device cuda",
    )
