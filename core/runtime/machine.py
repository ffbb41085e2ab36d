"""`Runtime`: what all training loops share, and nothing that belongs to a method."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import Dataset

from medrl.core import rng
from medrl.core.checkpoint import CheckpointStore
from medrl.core.errors import ConfigError, Interrupted, RuntimeFault
from medrl.core.runlog import RunFolder, TensorBoardSink
from medrl.core.runtime.checks import Prepared, check_optimizer, check_registered
from medrl.core.runtime.loader import ResumableLoader
from medrl.core.runtime.metrics import mean_over_ranks
from medrl.core.runtime.ranks import Ranks
from medrl.core.runtime.signals import StopFlag
from medrl.core.runtime.stepping import StepInfo, Stepper

if TYPE_CHECKING:
    from medrl.core.jobs import TrainJob

T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)
Op = Literal["mean", "sum", "max", "min", "any"]
_log = logging.getLogger("medrl.runtime")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Device, ranks, precision and durability of one training run.

    A method's loop reads::

        student, policy = rt.prepare(student, policy)
        rt.checkpoint.register(student=student, policy=policy, optimizer=optimizer)
        rt.checkpoint.describe(label_names={"background": 0, "lesion": 1}, channel_names=["T2"], spacing=[3.0,
        0.5, 0.5]) batches = rt.loader(dataset, batch_size=cfg.train.batch_size, shuffle=True)
        for step in rt.steps(rt.checkpoint.resume(), cfg.train.max_steps):
            for _ in rt.micro_batches():                  # train.accumulate of them
                batch = next(batches)
                with rt.autocast():
                    loss = ...
                rt.backward(loss, cases=batch["case"])
            rt.step(optimizer, clip_norm=cfg.train.clip_norm)
            rt.log(step, loss=loss)

    Every method of this class that involves other ranks must be called by all of them in the same order.

    Attributes:
        device: Where tensors belong.
        rank, world_size, is_main: Place among the processes.
        run: The run folder; only the main rank writes to it.
        job: The training job.
        checkpoint: What is saved and restored.
        outcome: What the manifest says after a normal end; ``interrupted`` where more is to be done.
    """

    def __init__(
        self, job: TrainJob, *, ranks: Ranks, device: torch.device, run: RunFolder, stop: StopFlag
    ) -> None:
        self.job = job
        self.device = device
        self.ranks = ranks
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self.is_main = ranks.is_main
        self.run = run
        self.train = job.config.train
        self.total_steps = int(self.train.max_steps)
        self.best_metric: float | None = None
        self.best_step = 0
        self.best_name = "metric"
        self.completed = 0
        self.outcome = "finished"
        self._stop = stop
        self._precision = str(self.train.precision)
        self._stepper = Stepper(ranks, device, fp16=self._precision == "fp16", event=self._event)
        self._prepared: list[Prepared] = []
        self._checked: set[int] = set()
        self._loaders: dict[str, ResumableLoader[Any]] = {}
        self._loader_states: dict[str, dict[str, int]] = {}
        self._divisor = 1
        self._micro_used = False
        self._board: TensorBoardSink | None = None
        self._latest: dict[str, Any] = {}
        self._observe: Callable[..., None] = lambda _hook, **_kwargs: None
        self.checkpoint: CheckpointStore

    @classmethod
    def start(cls, job: TrainJob) -> AbstractContextManager[Runtime]:
        """Open the machine of a job: ranks, device, threads, seed, run folder, lock, signals, observers.

        On leaving, the last state is saved, the outcome is written to the manifest (``finished``,
        ``interrupted`` or ``failed``), observers are told, and the lock is released.

        Raises:
            ConfigError: The folder holds another run, or the device does not exist.
            RuntimeFault: The folder is locked or cannot be written, or a rank is missing.
            Interrupted: A signal stopped the run; its state is saved.
        """
        from medrl.core.runtime.session import session

        return session(cls, job)

    # -- modules -----------------------------------------------------------------------------------

    @overload
    def prepare(self, module: ModuleT, /) -> ModuleT: ...

    @overload
    def prepare(self, *modules: Any) -> Any: ...

    def prepare(self, *modules: Any) -> Any:
        """Move modules to the device and give all ranks the parameters and buffers of rank 0.

        Returns:
            The module, or the tuple of modules, in the given order.

        Raises:
            RuntimeFault: A module has lazy parameters, which would be created after the optimiser was built.
        """
        tensors: list[torch.Tensor] = []
        for module in modules:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
                    raise RuntimeFault(
                        f"{type(module).__name__}.{name} has no shape yet",
                        why="a parameter that appears later is neither trained, synchronised nor saved",
                        do="run the module once on an example, or give the layer its sizes",
                    )
            module.to(self.device)
            tensors += [parameter.data for parameter in module.parameters()]
            tensors += list(module.buffers())
        shapes = repr([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
        if any(other != shapes for other in self.ranks.exchange("prepare", shapes)):
            raise RuntimeFault(
                "the ranks prepare different modules", do="build the same modules on every rank"
            )
        self.ranks.broadcast(tensors)
        for module in modules:
            names = {id(parameter): name for name, parameter in module.named_parameters()}
            self._prepared.append((module, names))
        self._stepper.follow(modules)
        self._checked.clear()
        return modules[0] if len(modules) == 1 else modules

    # -- data --------------------------------------------------------------------------------------

    def loader(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool,
        collate: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        name: str = "",
    ) -> ResumableLoader[Any]:
        """Return a `ResumableLoader` of this rank's share; its position belongs to the checkpoint.

        Args:
            dataset: Map-style dataset.
            batch_size: Samples of one rank in a batch.
            shuffle: Whether every epoch has a new order.
            collate: Makes a batch of samples; torch's default if left out.
            drop_last: Leave out an incomplete batch.
            name: Key in the checkpoint; the number of the loader if left out.
        """
        key = name or f"loader{len(self._loaders)}"
        if key in self._loaders:
            raise RuntimeFault(f"two loaders are named '{key}'", do="give each another name")
        made: ResumableLoader[Any] = ResumableLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=int(self.train.seed),
            rank=self.rank,
            world_size=self.world_size,
            collate=collate,
            drop_last=drop_last,
            workers=int(self.train.workers),
            timeout_s=float(self.train.timeout_s),
            pin_memory=self.device.type == "cuda",
            name=key,
        )
        if key in self._loader_states:
            made.load_state_dict(self._loader_states[key])
        self._loaders[key] = made
        return made

    # -- computing ---------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """Return the context of mixed precision: bf16 or fp16 as configured, nothing for fp32."""
        dtype = _DTYPES.get(self._precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self._precision in _DTYPES)

    def micro_batches(self) -> Iterator[int]:
        """Yield 0 … ``train.accumulate`` - 1; the losses inside count ``1 / accumulate`` each."""
        self._micro_used = True
        count = int(self.train.accumulate)
        self._divisor = count
        try:
            yield from range(count)
        finally:
            self._divisor = 1

    def backward(self, loss: torch.Tensor, *, cases: Sequence[str] = ()) -> bool:
        """Add the gradient of a loss on this rank; no other rank is waited for.

        A loss that is not finite adds nothing; the next `step` is then left out on all ranks. With fp16,
        gradients must not be kept over a step of another optimiser, because the loss scale may change there.

        Args:
            loss: Scalar tensor.
            cases: Identifiers of the cases in it, for messages.

        Returns:
            Whether the loss was finite.
        """
        return self._stepper.backward(loss, cases=cases, divisor=self._divisor)

    def step(self, optimizer: torch.optim.Optimizer, *, clip_norm: float = 0.0) -> StepInfo:
        """Average the gradients over ranks, clip, step, and clear the gradients of this optimiser.

        Nothing is applied when a loss or gradient of any rank is not finite; after three such steps in a row
        the run ends. With fp16, an overflow lowers the loss scale and does not count.

        Args:
            optimizer: Registered in the checkpoint; all its parameters belong to prepared modules.
            clip_norm: Largest norm of the averaged gradient; 0 for no limit.

        Raises:
            RuntimeFault: Three steps in a row were not finite, or parameters appeared after `prepare`.
        """
        if id(optimizer) not in self._checked:
            check_optimizer(optimizer, self._prepared, self.checkpoint)
            self._checked.add(id(optimizer))
        return self._stepper.step(optimizer, clip_norm=clip_norm)

    # -- agreeing ----------------------------------------------------------------------------------

    @overload
    def reduce(self, value: torch.Tensor, op: Op = "mean") -> torch.Tensor: ...

    @overload
    def reduce(self, value: float, op: Op = "mean") -> float: ...

    def reduce(self, value: torch.Tensor | float, op: Op = "mean") -> torch.Tensor | float:
        """Combine a number or tensor of all ranks, in rank order; ``any`` is 1.0 where any is not zero."""
        tensor = (
            value.detach()
            if isinstance(value, torch.Tensor)
            else torch.tensor(float(value), dtype=torch.float64)
        )
        stack = torch.stack(self.ranks.gather_tensor(f"reduce {op}", tensor))
        if op == "mean":
            result = stack.sum(0) / self.world_size
        elif op == "sum":
            result = stack.sum(0)
        elif op == "max":
            result = stack.amax(0)
        elif op == "min":
            result = stack.amin(0)
        elif op == "any":
            result = (stack != 0).any(0).to(tensor.dtype)
        else:
            raise RuntimeFault(f"reduce cannot do '{op}'", do="use mean, sum, max, min or any")
        return result if isinstance(value, torch.Tensor) else float(result)

    def gather(self, per_case: Mapping[str, T]) -> dict[str, T]:
        """Return the values of all ranks by case identifier, sorted by it; a case of two ranks appears once.

        So the mean over the result is the same with one rank and with many.
        """
        merged: dict[str, T] = {}
        for part in self.ranks.exchange("gather", dict(per_case)):
            for case, value in part.items():
                merged.setdefault(case, value)
        return dict(sorted(merged.items()))

    @property
    def stop_requested(self) -> bool:
        """Whether this rank received a signal; `steps` agrees with the others and ends the loop."""
        return self._stop.number != 0

    def obey_stop(self) -> None:
        """Stop now if any rank received a signal, for work between steps that takes long.

        Raises:
            Interrupted: A signal arrived; the state of the last completed step is saved.
        """
        self._obey_stop(self.completed)

    # -- the loop ----------------------------------------------------------------------------------

    def steps(self, start: int, total: int) -> Iterator[int]:
        """Yield the numbers of the steps to do: ``start + 1 … total``.

        `start` is the number of completed steps, as `CheckpointStore.resume` returns it; while step 7 is
        being done, the loop sees 7, and a checkpoint saved after it is that of 7 completed steps. Between two
        steps the ranks agree on the stop flag, save every ``train.checkpoint_every`` steps and after the
        last, and report progress.

        Raises:
            Interrupted: A signal arrived; the state is saved.
            RuntimeFault: A trainable module is not registered in the checkpoint.
        """
        if not self.checkpoint.resumed and self.checkpoint.candidates():
            raise RuntimeFault(
                f"{self.run.dir} holds checkpoints and the method did not look at them",
                why="the run would silently start again",
                do="start the loop with rt.steps(rt.checkpoint.resume(), total)",
            )
        if self.job.fast_dev_run:
            total = min(total, start + 2)
        self.total_steps = total
        self.completed = start
        self.ranks.step = start
        check_registered(self._prepared, self.checkpoint)
        self._obey_stop(start)
        every = int(self.train.checkpoint_every)
        for step in range(start + 1, total + 1):
            self.ranks.step = step
            self.ranks.cases = ()
            yield step
            self.completed = step
            self._check_accumulation()
            self._obey_stop(step)
            if step % every == 0 or step == total:
                self._save(step)
            progress = self.job.extra.get("progress")
            if self.is_main and callable(progress):
                progress(step, total, dict(self._latest))

    def log(self, step: int, **metrics: object) -> None:
        """Record metrics of a step: numbers and tensors as means over ranks, text as on the main rank.

        Tensors with several elements become lists. Metrics that are already equal on all ranks stay what they
        are.
        """
        values = mean_over_ranks(self.ranks, metrics)
        if not self.is_main:
            return
        self.run.metrics(step, **values)
        if "tensorboard" in self.train.log:
            if self._board is None:
                self._board = TensorBoardSink(self.run.dir / "tensorboard", purge_step=step)
            self._board.write(step, values)
        self._latest.update(values)
        self._observe("medrl_metrics_logged", run=self.run, step=step, metrics=values)

    def best(self, step: int, metric: float, *, maximise: bool = True, name: str = "metric") -> bool:
        """Save ``best.pt`` if the main rank's metric is better than ever before; return whether it was.

        A metric that is not finite is never the best.
        """
        value = self.ranks.exchange("best", float(metric))[0]
        before = self.best_metric
        better = math.isfinite(value) and (before is None or (value > before if maximise else value < before))
        if better:
            self.best_metric, self.best_step, self.best_name = value, step, name
            self.checkpoint.save(step, kind="best", metric=value)
        return better

    def finish(self) -> None:
        """Save what the loop left unsaved; done anyway when the method returned normally."""
        self.ranks.meet("end of the run")
        if any(True for _ in self.checkpoint.registered()) and self.completed:
            self._save(self.completed)

    # -- private -----------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        if self.checkpoint.saved_step != step:
            self.checkpoint.save(step, kind="last", metric=self.best_metric)

    def _obey_stop(self, step: int) -> None:
        number = max(vote[0] for vote in self.ranks.meet("end of a step", self._stop.number))
        if not number:
            return
        _log.warning("signal %d: saving after step %d and stopping", number, step)
        self._save(step)
        raise Interrupted(number, checkpoint=str(self.checkpoint.folder / "last.pt"))

    def _check_accumulation(self) -> None:
        if int(self.train.accumulate) > 1 and not self._micro_used:
            raise ConfigError(
                f"train.accumulate is {self.train.accumulate}",
                why=f"method '{self.job.method}' takes one batch a step",
                do="--set train.accumulate=1",
            )

    def _event(self, name: str, facts: dict[str, Any]) -> None:
        self.run.event(self.ranks.step, name, **facts)

    def _capture_rank(self) -> dict[str, Any]:
        loaders = {name: loader.state_dict() for name, loader in self._loaders.items()}
        return {"rng": rng.capture(self.device), "loaders": loaders}

    def _restore_rank(self, state: dict[str, Any], exact: bool) -> None:
        self._loader_states = dict(state["loaders"])
        for name, loader in self._loaders.items():
            if name in self._loader_states:
                loader.load_state_dict(self._loader_states[name])
        if exact:
            rng.restore(state["rng"], self.device)

    def _capture_runtime(self) -> dict[str, Any]:
        best = {"metric": self.best_metric, "step": self.best_step, "name": self.best_name}
        return {"best": best, "stepper": self._stepper.state_dict()}

    def _restore_runtime(self, state: dict[str, Any]) -> None:
        best = state["best"]
        self.best_metric, self.best_step, self.best_name = best["metric"], best["step"], best["name"]
        self._stepper.load_state_dict(state["stepper"])

    def _resumed(self, step: int, path: Path | None) -> None:
        if path is None:
            if self.is_main and self.run.truncate_metrics(0):
                _log.info("no checkpoint was saved before: the run begins at step 0")
            return
        if self.is_main:
            dropped = self.run.truncate_metrics(step)
            _log.info("going on after step %d from %s (%d later records dropped)", step, path.name, dropped)

    def _outcome(self) -> dict[str, Any]:
        """Return what the manifest says about the run when it ends."""
        facts: dict[str, Any] = {"step": self.completed}
        if self.best_metric is not None:
            facts["best"] = {"name": self.best_name, "metric": self.best_metric, "step": self.best_step}
        if self._stepper.skipped:
            facts["skipped_steps"] = self._stepper.skipped
            facts["skipped_cases"] = dict(self._stepper.bad_cases)
        return facts

    def _close_loaders(self) -> None:
        """End the workers; torch may report a dead one once more, from a signal handler, while they end."""
        for loader in self._loaders.values():
            with suppress(RuntimeError):
                loader.close()

    def _close(self) -> None:
        self._close_loaders()
        if self._board is not None:
            self._board.close()
