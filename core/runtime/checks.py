"""What must hold before a parameter is changed: everything trainable is prepared and saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from medrl.core.checkpoint import CheckpointStore
from medrl.core.errors import RuntimeFault

Prepared = tuple[nn.Module, dict[int, str]]
"""A module given to `Runtime.prepare`, and the names of its parameters by identity at that time."""


def check_registered(prepared: Sequence[Prepared], store: CheckpointStore) -> None:
    """Raise unless every trainable prepared module is registered in the checkpoint."""
    for module, _ in prepared:
        trainable = any(parameter.requires_grad for parameter in module.parameters())
        if trainable and not store.covers(module):
            raise RuntimeFault(
                f"the trainable module {type(module).__name__} is not registered in the checkpoint",
                why="a resumed run would continue with random weights",
                do="rt.checkpoint.register(name=module), or set requires_grad to False",
            )


def check_optimizer(
    optimizer: torch.optim.Optimizer, prepared: Sequence[Prepared], store: CheckpointStore
) -> None:
    """Raise unless the optimiser is registered and holds parameters of prepared modules only.

    A parameter that appeared in a prepared module later is an error too.
    """
    check_registered(prepared, store)
    if not store.holds(optimizer):
        raise RuntimeFault(
            f"the optimiser {type(optimizer).__name__} is not registered in the checkpoint",
            why="a resumed run would lose its moments",
            do="rt.checkpoint.register(optimizer=optimizer)",
        )
    known: set[int] = set()
    for module, names in prepared:
        for name, parameter in module.named_parameters():
            if id(parameter) not in names:
                raise RuntimeFault(
                    f"parameter {name} of {type(module).__name__} appeared after rt.prepare",
                    why="it is neither synchronised over ranks nor in the optimiser",
                    do="create every layer in __init__",
                )
        known.update(names)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise RuntimeFault(
                    f"the optimiser {type(optimizer).__name__} holds a parameter of shape "
                    f"{tuple(parameter.shape)} that belongs to no prepared module",
                    why="it would differ between ranks",
                    do="give its module to rt.prepare first",
                )
