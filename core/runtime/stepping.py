"""Backward and optimiser steps that never apply a number that is not finite.

Gradients are averaged by one flat all-reduce inside `step`, not by DistributedDataParallel. `backward` then
needs no other rank, so a rank with a non-finite loss can leave its backward pass out and vote against the
step; accumulation needs no special mode; several modules, several losses and unused parameters need no
search; and the order of the sum does not depend on when a gradient becomes ready. The price is that
communication does not overlap with the backward pass.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from medrl.core.errors import RuntimeFault
from medrl.core.runtime.ranks import Ranks

_log = logging.getLogger("medrl.runtime")
_PATIENCE = 3
_SMALLEST_SCALE = 2.0**-20


@dataclass(frozen=True)
class StepInfo:
    """The outcome of one optimiser step.

    Attributes:
        applied: Whether the parameters changed.
        grad_norm: Norm of the averaged gradient before clipping; not finite or 0 where nothing was applied.
        reason: Why nothing was applied: ``non-finite loss``, ``non-finite gradient``, ``fp16 overflow`` or
            ``no gradient``.
    """

    applied: bool
    grad_norm: float
    reason: str = ""


class Stepper:
    """Backward passes, votes and optimiser steps of one run.

    Args:
        ranks: The processes of the run.
        device: Where the modules are.
        fp16: Whether losses are scaled.
        event: Receives ``(name, facts)`` of every skipped step, on the main rank.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, *, fp16: bool, event: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self.ranks = ranks
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.skipped = 0
        self.overflows = 0
        self.bad_cases: dict[str, int] = {}
        self._event = event
        self._modules: list[nn.Module] = []
        self._order: list[torch.optim.Optimizer] = []
        self._in_a_row: dict[int, int] = {}
        self._bad: list[tuple[str, tuple[str, ...]]] = []
        self._window: list[str] = []
        self._snapshot: list[torch.Tensor] = []
        self._unscaled: set[int] = set()

    def follow(self, modules: Sequence[nn.Module]) -> None:
        """Keep the buffers of these modules equal over ranks and free of what skipped batches left."""
        self._modules.extend(modules)
        self._keep_buffers()

    def backward(self, loss: torch.Tensor, *, cases: Sequence[str], divisor: int) -> bool:
        """Add the gradient of ``loss / divisor``, if the loss is finite; return whether it was added."""
        self.ranks.cases = tuple(cases)
        self.ranks.tell()
        self.flush()
        self._window.extend(cases)
        if not bool(torch.isfinite(loss.detach()).all()):
            self._bad.append(("non-finite loss", tuple(cases)))
            return False
        scaled = self.scaler.scale(loss / divisor if divisor > 1 else loss)
        scaled.backward()  # type: ignore[no-untyped-call]
        return True

    def step(self, optimizer: torch.optim.Optimizer, *, clip_norm: float) -> StepInfo:
        """Let the ranks vote, average the gradients, clip, step, and clear the gradients."""
        index = self._index(optimizer)
        if index in self._unscaled:
            self.flush()
        params = _parameters(optimizer)
        has = bytes(parameter.grad is not None for parameter in params)
        votes = self.ranks.meet(f"step of optimiser {index + 1}", len(self._bad), zlib.crc32(has))
        if any(vote[0] for vote in votes):
            return self._skip(optimizer, index, "non-finite loss", 0.0)
        if any(vote[1] != votes[0][1] for vote in votes):
            has = bytes(
                max(flags) for flags in zip(*self.ranks.exchange("gradients present", has), strict=True)
            )
        present = [parameter for parameter, flag in zip(params, has, strict=True) if flag]
        if not present:
            self._forget(optimizer)
            return StepInfo(applied=False, grad_norm=0.0, reason="no gradient")
        for parameter in present:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in present if parameter.grad is not None]
        self.ranks.average(gradients)
        if self.scaler.is_enabled():
            self.scaler.unscale_(optimizer)
            self._unscaled.add(index)
        norm = torch.nn.utils.get_total_norm(gradients)
        size = float(norm)
        if not bool(torch.isfinite(norm)):
            if self.scaler.is_enabled():
                return self._overflow(optimizer, size)
            return self._skip(optimizer, index, "non-finite gradient", size)
        if clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(present, clip_norm, norm)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
        else:
            optimizer.step()
        self._in_a_row[index] = 0
        self._forget(optimizer)
        self._keep_buffers(share=True)
        return StepInfo(applied=True, grad_norm=size)

    def flush(self) -> None:
        """Let the gradient scaler draw its conclusions from the last steps."""
        if self._unscaled:
            self._unscaled.clear()
            self.scaler.update()
            if self.scaler.get_scale() < _SMALLEST_SCALE:
                raise RuntimeFault(
                    f"fp16 gradients overflow at step {self.ranks.step} whatever the loss scale",
                    why=f"the scale fell to {self.scaler.get_scale():g}",
                    do="train with --precision bf16 or a smaller learning rate; the last checkpoint is kept",
                )

    def share_buffers(self) -> None:
        """Give all ranks the buffers of rank 0. All ranks must have met before."""
        self.ranks.broadcast([buffer for module in self._modules for buffer in module.buffers()])

    def state_dict(self) -> dict[str, Any]:
        """Return counters and the state of the gradient scaler."""
        self.flush()
        return {
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "overflows": self.overflows,
            "bad_cases": dict(self.bad_cases),
            "in_a_row": [self._in_a_row.get(index, 0) for index in range(len(self._order))],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
        self.overflows = int(state["overflows"])
        self.bad_cases = dict(state["bad_cases"])
        self._in_a_row = dict(enumerate(state["in_a_row"]))
        self._keep_buffers()

    # -- private -----------------------------------------------------------------------------------

    def _index(self, optimizer: torch.optim.Optimizer) -> int:
        for index, known in enumerate(self._order):
            if known is optimizer:
                return index
        self._order.append(optimizer)
        return len(self._order) - 1

    def _skip(self, optimizer: torch.optim.Optimizer, index: int, reason: str, norm: float) -> StepInfo:
        mine = (
            [case for _, cases in self._bad for case in cases]
            if reason == "non-finite loss"
            else self._window
        )
        every = self.ranks.exchange("skipped step", list(dict.fromkeys(mine)))
        ranks = [rank for rank, cases in enumerate(every) if cases]
        cases = list(dict.fromkeys(case for found in every for case in found))
        self.skipped += 1
        row = self._in_a_row[index] = self._in_a_row.get(index, 0) + 1
        for case in cases:
            self.bad_cases[case] = self.bad_cases.get(case, 0) + 1
        self._restore_buffers()
        self._forget(optimizer)
        named = f", cases {', '.join(cases)}" if cases else ""
        _log.warning("step %d skipped: %s%s (%d in a row)", self.ranks.step, reason, named, row)
        if self.ranks.is_main:
            self._event("skipped_step", {"reason": reason, "cases": cases, "ranks": ranks, "in_a_row": row})
        if row >= _PATIENCE:
            raise RuntimeFault(
                f"{reason} {row} times in a row, at step {self.ranks.step}{named}",
                why="no such step was applied; the last checkpoint holds a good state",
                do="medrl data check, a smaller learning rate, or --precision fp32",
            )
        return StepInfo(applied=False, grad_norm=norm, reason=reason)

    def _overflow(self, optimizer: torch.optim.Optimizer, norm: float) -> StepInfo:
        self.overflows += 1
        _log.info("step %d skipped: fp16 overflow at loss scale %g", self.ranks.step, self.scaler.get_scale())
        if self.ranks.is_main:
            self._event("fp16_overflow", {"scale": self.scaler.get_scale()})
        self._forget(optimizer)
        return StepInfo(applied=False, grad_norm=norm, reason="fp16 overflow")

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._bad.clear()
        self._window.clear()

    @torch.no_grad()
    def _keep_buffers(self, *, share: bool = False) -> None:
        if share:
            self.share_buffers()
        self._snapshot = [buffer.detach().clone() for module in self._modules for buffer in module.buffers()]

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        for buffer, kept in zip(buffers, self._snapshot, strict=False):
            if buffer.shape == kept.shape:
                buffer.copy_(kept)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    seen: dict[int, nn.Parameter] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return list(seen.values())
