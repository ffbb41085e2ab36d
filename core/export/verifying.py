"""Whether an exported file says what the checkpoint says, on phantoms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medrl.core.errors import CheckpointError
from medrl.core.export.formats import Format, format_of
from medrl.core.export.network import PHANTOM, Network, phantom

SAMPLES = 2
"""Phantoms that are compared, so that a network that was fixed to a batch of one is found."""
PROBES = 64
"""Numbers of each output that the file keeps, to be verified without the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far an exported file is from its checkpoint.

    Attributes:
        path: The file.
        format: Its format.
        facts: What it says about itself.
        against: ``checkpoint``: all numbers of all outputs were compared; ``record``: those that the file
            keeps; ``weights``: the digest of its weights, as it holds nothing else.
        deviations: Largest absolute difference of each output.
        numbers: How many numbers were compared.
        problems: What is wrong; empty if all is well.
    """

    path: Path
    format: str
    facts: dict[str, Any]
    against: str
    deviations: dict[str, float] = field(default_factory=dict)
    numbers: int = 0
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all is within tolerance."""
        return not self.problems


def verify(path: Path, network: Network | None = None) -> Verdict:
    """Run an exported file with its own loader on phantoms, and compare.

    Args:
        path: A file or a bundle that `export` wrote.
        network: That of the checkpoint, of which all outputs are compared; without it, those numbers are
            compared that the file keeps from its export.

    Raises:
        CheckpointError: The file is damaged, or nothing that medrl exported.
        ConfigError: The packages of the format are missing.
    """
    kind = format_of(path)
    if kind is None:
        why = "no file of a known format" if path.exists() else "it does not exist"
        raise CheckpointError(str(path), why=why, do="medrl model export RUN --format FORMAT")
    kind.require()
    facts = kind.facts(path)
    run = kind.load(path, facts, network)
    try:
        return _compared(path, kind, facts, run, network)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        text = (str(error).strip().splitlines() or [""])[0][:300]
        raise CheckpointError(
            str(path), why=f"it does not run: {type(error).__name__}: {text}", do="export again"
        ) from error


def record(network: Network) -> dict[str, Any]:
    """What the network says to the phantoms, as plain values that fit into a file."""
    answers = network.answers(network.phantoms(SAMPLES))
    return {
        "phantom": PHANTOM,
        "samples": SAMPLES,
        "outputs": {
            name: {"shape": list(value.shape), "values": _probes(value).tolist()}
            for name, value in answers.items()
        },
    }


def _compared(path: Path, kind: Format, facts: dict[str, Any], run: Any, network: Network | None) -> Verdict:
    check = facts["check"]
    if network is None and check["phantom"] != PHANTOM:
        why = f"what it keeps is about phantoms of version {check['phantom']}, this medrl draws {PHANTOM}"
        raise CheckpointError(str(path), why=why, do="compare it with its checkpoint: --model RUN")
    inputs = tuple(
        phantom(
            (int(check["samples"]), *(int(size) for size in shape)),
            seed=number,
            value_range=(float(facts["value_range"][0]), float(facts["value_range"][1])),
        )
        for number, shape in enumerate(facts["inputs"].values())
    )
    found = run(inputs)
    if not found:
        return Verdict(path=path, format=kind.name, facts=facts, against="weights")
    expected: Mapping[str, Tensor]
    if network is not None:
        if network.facts()["inputs"] != facts["inputs"] or list(network.outputs) != facts["outputs"]:
            why = f"it takes {facts['inputs']}, the network of the checkpoint {network.facts()['inputs']}"
            raise CheckpointError(str(path), why=why, do="name the checkpoint that it was exported from")
        expected, seen = network.answers(inputs), dict(found)
    else:
        expected = {name: torch.tensor(item["values"]) for name, item in check["outputs"].items()}
        seen = {name: _probes(value) for name, value in found.items()}
    problems, deviations = [], {}
    for name, wanted in expected.items():
        shape = list(wanted.shape) if network is not None else check["outputs"][name]["shape"]
        if list(found[name].shape) != shape:
            problems.append(f"output {name} has shape {list(found[name].shape)}, expected {shape}")
            continue
        difference = (seen[name].double() - wanted.double()).abs()
        deviations[name] = float(difference.max())
        allowed = kind.atol + kind.rtol * wanted.double().abs()
        wrong = int((~(difference <= allowed)).sum())
        if wrong:
            problems.append(
                f"output {name}: {wrong} of {wanted.numel()} numbers differ by more than the tolerance, "
                f"by up to {deviations[name]:.2g}"
            )
    return Verdict(
        path=path,
        format=kind.name,
        facts=facts,
        against="record" if network is None else "checkpoint",
        deviations=deviations,
        numbers=sum(value.numel() for value in expected.values()),
        problems=tuple(problems),
    )


def _probes(values: Tensor) -> Tensor:
    """Numbers ``(PROBES,)`` or fewer, spread evenly over a tensor."""
    flat = values.reshape(-1)
    places = np.unique(np.linspace(0, flat.numel() - 1, PROBES).round().astype(np.int64))
    return flat[torch.from_numpy(places)]
