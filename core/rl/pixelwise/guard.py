"""A policy that stops using a label never draws it again: notice it early and go back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from medrl.core.errors import ConfigError, RuntimeFault
from medrl.core.rl.pixelwise.rollout import Rollout

_log = logging.getLogger("medrl.rl")


class CollapseGuard(nn.Module):
    """Compares the labels of the policy with those of the reference and undoes a collapse.

    An empty mask is absorbing: once foreground has no probability it is never drawn, and no reward can bring
    it back. So, before an update, the share of foreground and that of background in the most probable actions
    are divided by their shares under the reference, on the same images. If one of them falls below `floor`,
    the update of that batch is left out, the weights go back to the last good ones, the optimisers forget
    their moments, and `rate` is halved.

    The good weights are kept every `every` healthy batches, where healthy is at least `keep_above` of the
    reference's share. A policy that begins with less than the reference is measured by its own beginning.

    It is a module without trainable parameters, so that it can be registered in a checkpoint as it is.

    Args:
        modules: What is kept and restored, such as ``{"actor": actor, "critic": critic}``.
        optimizers: Their optimisers.
        per_label: Look at each label by itself instead of at all foreground together. For tasks in which
            every image shows every label; elsewhere a label that the reference draws wrongly could not be
            unlearned.
        floor: Smallest share in parts of the reference's, in (0, keep_above).
        keep_above: Weights are kept above this share, in (floor, 1].
        least_share: What is on a smaller share of the reference's pixels is not looked at.
        every: Batches between two copies.
        limit: Restorations before the run is given up.

    Attributes:
        rate: Multiply the learning rate with this; 1 until something collapsed.
        restored: Times that the weights went back.

    Raises:
        ConfigError: A number is out of its range.

    Example::

        guard = CollapseGuard({"actor": actor}, [optimizer])
        rt.checkpoint.register(actor=actor, optimizer=optimizer, guard=guard)
        ...
        if guard.check(batch, reduce=rt.reduce):
            update(...)
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        per_label: bool = False,
        floor: float = 0.1,
        keep_above: float = 0.5,
        least_share: float = 0.005,
        every: int = 10,
        limit: int = 5,
    ) -> None:
        super().__init__()
        if not (0.0 < floor < keep_above <= 1.0 and 0.0 <= least_share < 1.0 and every >= 1 and limit >= 1):
            raise ConfigError(
                "collapse guard",
                why=f"floor {floor}, keep_above {keep_above}, least_share {least_share}, every {every}, "
                f"limit {limit}: out of range",
                do="0 < floor < keep_above <= 1, 0 <= least_share < 1, every and limit at least 1",
            )
        self.floor, self.keep_above, self.least_share = floor, keep_above, least_share
        self.every, self.limit, self.per_label = every, limit, per_label
        self._live = dict(modules)  # not registered as parts: they are the caller's
        self._optimizers = list(optimizers)
        self.kept = nn.ModuleDict({name: copy.deepcopy(module) for name, module in modules.items()})
        self.kept.requires_grad_(requires_grad=False)
        self.register_buffer("_rate", torch.ones((), dtype=torch.float64))
        self.register_buffer("_anchor", torch.ones((), dtype=torch.float64))
        self.register_buffer("_counts", torch.zeros(2, dtype=torch.int64))  # batches seen, restorations

    @property
    def rate(self) -> float:
        """Factor of the learning rate."""
        return float(self._buffer("_rate"))

    @property
    def restored(self) -> int:
        """How often the weights went back."""
        return int(self._buffer("_counts")[1])

    @torch.no_grad()
    def check(self, batch: Rollout, *, reduce: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Look at a rollout before its update; true if the update may be done.

        Args:
            batch: From `rollout`, with the reference.
            reduce: Mean over ranks, so that all of them decide alike.

        Raises:
            RuntimeFault: The policy collapsed more than `limit` times.
        """
        shares = batch.shares if reduce is None else reduce(batch.shares)
        lost, share = self._least(shares.double().cpu())
        counts, anchor = self._buffer("_counts"), self._buffer("_anchor")
        if int(counts[0]) == 0:
            anchor.fill_(min(1.0, share))
            self._keep()
            if share < self.floor:
                _log.warning("the policy begins with %.3g of the reference's share of %s", share, lost)
        counts[0] += 1
        if share < self.floor * float(anchor):
            self._restore(lost, share)
            return False
        if share >= self.keep_above * float(anchor) and int(counts[0]) % self.every == 0:
            self._keep()
        return True

    def _least(self, shares: Tensor) -> tuple[str, float]:
        """What the policy lost most of, and its share in parts of the reference's."""
        names = [f"label {label}" for label in range(shares.shape[1])]
        if not self.per_label:
            shares = torch.stack([shares[:, 0], shares[:, 1:].sum(dim=1)], dim=1)
            names = ["background", "foreground"]
        policy, reference = shares
        used = reference >= max(self.least_share, 1e-12)
        parts = torch.where(used, policy / reference.clamp_min(1e-12), torch.inf)
        least = int(parts.argmin())
        return names[least], float(parts[least])

    def _keep(self) -> None:
        for name, module in self._live.items():
            self.kept[name].load_state_dict(module.state_dict())

    def _restore(self, lost: str, share: float) -> None:
        counts = self._buffer("_counts")
        counts[1] += 1
        if self.restored > self.limit:
            raise RuntimeFault(
                f"the policy gave up {lost}, now {self.restored} times",
                why=f"it has {share:.2g} of the reference's share of pixels; a label without probability is "
                "never drawn again",
                do="a smaller learning rate, a longer warm-up, or a larger weight of the KL penalty",
            )
        for name, module in self._live.items():
            module.load_state_dict(self.kept[name].state_dict())
        for optimizer in self._optimizers:
            optimizer.state.clear()
        self._buffer("_rate").mul_(0.5)
        _log.warning(
            "the policy gave up %s (%.3g of the reference's share): back to the last good weights, "
            "learning rate times %g",
            lost,
            share,
            self.rate,
        )

    def _buffer(self, name: str) -> Tensor:
        return cast("Tensor", getattr(self, name))
