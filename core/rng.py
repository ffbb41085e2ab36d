"""Random number streams: seeding, derived seeds, capture and restore.

One root seed gives every stream of a run. Streams are separated by hashing names, never by adding small
numbers to a seed, so that rank 1 of seed 1 and rank 0 of seed 2 share nothing.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_SEED_BITS = 63


def derive_seed(seed: int, *names: object) -> int:
    """Return a seed in ``[0, 2**63)`` that depends on `seed` and on every name, the same on every machine.

    Example:
        >>> derive_seed(1, "loader", 0) == derive_seed(1, "loader", 0)
        True
        >>> derive_seed(1, "rank", 1) == derive_seed(2, "rank", 0)
        False
    """
    text = "\x1f".join(str(item) for item in (int(seed), *names))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def seed_global(seed: int) -> None:
    """Seed the global streams of `random`, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # libraries such as MONAI draw from numpy's global stream
    torch.manual_seed(seed)


def seed_run(seed: int, rank: int = 0) -> None:
    """Seed the global streams of one rank; every rank has its own, and rank 0 that of a single process."""
    seed_global(derive_seed(seed, "rank", rank))


def torch_generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator of its own, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """Return a numpy generator of its own, seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, *names))


def capture(device: torch.device | None = None) -> dict[str, Any]:
    """Return the state of the global streams as tensors and plain types, safe for weights-only storage.

    Args:
        device: Also the stream of this accelerator; each rank keeps that of its own.
    """
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
            "pos": int(legacy["state"]["pos"]),
            "has_gauss": int(legacy["has_gauss"]),
            "gauss": float(legacy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device is not None and device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Set the global streams to a state from `capture`; that of an accelerator, if both had the same kind."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device is not None and device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run a block on global streams seeded by `seed`, and put the former streams back afterwards.

    Only CPU streams are touched; the block must not draw on a device.
    """
    before_python = random.getstate()
    before_numpy = np.random.get_state()
    before_torch = torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before_python)
        np.random.set_state(before_numpy)
        torch.set_rng_state(before_torch)


def use_deterministic_algorithms() -> None:
    """Make torch raise where an operation has no deterministic form; fix the choices of cuDNN and NCCL."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    # The same switch as torch.use_deterministic_algorithms, without the seconds to import torch's compiler.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
