"""The loop of every stage that goes down the gradient of one loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import schedules

if TYPE_CHECKING:
    from medrl.core.runtime import Runtime

    from .stages import Course


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one step learns from.

    Attributes:
        loss: A scalar with a graph.
        cases: Names of the images, for messages.
        shown: Numbers for the log; `loss` itself if empty.
    """

    loss: Tensor
    cases: Sequence[str]
    shown: Mapping[str, Any] = field(default_factory=dict)


class Plateau:
    """A tenth of the rate after ten validations without progress.

    Source: specification of rl4seg §8 (ReduceLROnPlateau of torch with its defaults).
    """

    def __init__(self, patience: int = 10, by: float = 0.1) -> None:
        self.patience, self.by = patience, by
        self.factor, self.best, self.waited = 1.0, float("inf"), 0

    def look(self, loss: float) -> None:
        """Note a validation loss."""
        if loss < self.best * (1.0 - 1e-4):
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.factor, self.waited = self.factor * self.by, 0

    def state_dict(self) -> dict[str, Any]:
        """Return factor, best loss and validations since."""
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.factor, self.best, self.waited = state["factor"], state["best"], state["waited"]


def adam(module: nn.Module, course: Course) -> torch.optim.Adam:
    """Return Adam with the rate and weight decay of a course."""
    return torch.optim.Adam(module.parameters(), lr=course.lr, weight_decay=course.weight_decay)


def descend(
    rt: Runtime,
    course: Course,
    optimizer: torch.optim.Optimizer,
    lesson: Callable[[int], Lesson],
    validate: Callable[[], dict[str, float]],
    *,
    best: str,
    maximise: bool = True,
    plateau: Plateau | None = None,
) -> None:
    """Train from where the checkpoint is to the end of a course; register everything before.

    Args:
        rt: The runtime.
        course: How long and how fast.
        optimizer: Of what is trained.
        lesson: Gives the loss of a batch, numbered from 1; a step takes `course.accumulate` of them.
        validate: Measures; called at the interval of the course and at the end.
        best: Which of its numbers decides the best checkpoint; left out where it is missing.
        maximise: Whether more of it is better.
        plateau: Decides the rate where the schedule of the course is ``plateau``; always kept informed.
    """
    for step in rt.steps(rt.checkpoint.resume(), course.steps):
        if plateau is not None and course.schedule == "plateau":
            part = plateau.factor
        else:
            part = schedules.factor(course.schedule, step, course.steps)
        rate = schedules.set_rate(optimizer, course.lr * part)
        shown: list[Mapping[str, Any]] = []
        for part in range(course.accumulate):
            told = lesson((step - 1) * course.accumulate + part + 1)
            rt.backward(told.loss / course.accumulate, cases=told.cases)
            shown.append(told.shown or {"loss": told.loss.detach()})
        done = rt.step(optimizer, clip_norm=course.clip_norm)
        rt.log(step, **_mean(shown), lr=rate, grad_norm=done.grad_norm)

        if step % course.every == 0 or step == rt.total_steps:
            found = validate()
            rt.log(step, **found)
            if plateau is not None:
                plateau.look(found[best])
            if best in found:
                rt.best(step, found[best], maximise=maximise, name=best)


def _mean(shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over batches of every number."""
    return {name: sum(numbers[name] for numbers in shown) / len(shown) for name in shown[0]}
