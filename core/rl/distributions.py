"""Distributions over actions: categorical with illegal actions, and Dirichlet over weights on a simplex.

Both compute in float32 at least, whatever the autocast type, and draw with an explicit generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medrl.core.errors import RuntimeFault


class MaskedCategorical:
    """A categorical distribution in which illegal actions have probability zero.

    Args:
        logits: ``(..., A)``.
        mask: ``(..., A)`` boolean, true where the action is legal; None makes all legal.
        validate: Check that each row has a legal action, and that asked actions are legal. Costs one
            device synchronisation.

    Raises:
        RuntimeFault: If a row has no legal action, or its legal logits are not finite.

    Source: Huang and Ontañón 2022, "A closer look at invalid action masking".

    >>> policy = MaskedCategorical(torch.zeros(1, 3), torch.tensor([[True, False, True]]))
    >>> policy.probs
    tensor([[0.5000, 0.0000, 0.5000]])
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None, *, validate: bool = True) -> None:
        logits = _full(logits)
        if mask is None:
            mask = torch.ones_like(logits, dtype=torch.bool)
        mask = mask.to(device=logits.device, dtype=torch.bool).expand(logits.shape)
        if validate:
            _check_rows(logits, mask)
        self.mask = mask
        self._validate = validate
        self.log_probs = torch.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)

    @property
    def probs(self) -> Tensor:
        """Probabilities ``(..., A)``; exactly zero for illegal actions."""
        return self.log_probs.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions ``(...)``, int64; never an illegal one. The generator may be of another device."""
        with torch.no_grad():
            where = self.log_probs.device if generator is None else generator.device
            clocks = torch.empty_like(self.log_probs, device=where).exponential_(generator=generator)
            clocks = clocks.to(self.log_probs.device).clamp_min(torch.finfo(clocks.dtype).tiny)
            return (self.log_probs - clocks.log()).argmax(dim=-1)

    def mode(self) -> Tensor:
        """The most probable action ``(...)``, int64; the first of equals."""
        return self.log_probs.argmax(dim=-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability ``(...)`` of the actions ``(...)``.

        Raises:
            RuntimeFault: If an action is illegal here (with `validate`).
        """
        index = actions.to(torch.int64).unsqueeze(-1)
        if self._validate and not bool(self.mask.gather(-1, index).all()):
            raise RuntimeFault(
                "masked policy",
                why="the log-probability of an illegal action was asked for",
                do="store the mask of each step beside its action",
            )
        return self.log_probs.gather(-1, index).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy ``(...)`` in nats over the legal actions; 0 with one legal action."""
        # Illegal actions are taken out before the product, so that neither 0 * inf nor its gradient appears.
        legal = self.log_probs.masked_fill(~self.mask, 0.0)
        return -(self.probs * legal).sum(dim=-1)


class DirichletPolicy:
    """A Dirichlet distribution over weights that are positive and sum to one.

    Args:
        concentration: ``(..., N)``, positive.

    Raises:
        RuntimeFault: If a concentration is not positive and finite.

    >>> policy = DirichletPolicy(torch.full((3,), 3.0))
    >>> print(f"{policy.log_prob(torch.tensor([0.5, 0.3, 0.2])):.4f} {policy.entropy():.4f}")
    1.5120 -1.2180
    """

    def __init__(self, concentration: Tensor) -> None:
        concentration = _full(concentration)
        if not bool(((concentration > 0) & torch.isfinite(concentration)).all()):
            raise RuntimeFault(
                "Dirichlet policy",
                why="a concentration is not positive and finite",
                do="look for a diverging policy: lower its learning rate or clip its gradient",
            )
        self.concentration = concentration

    @classmethod
    def around(cls, mean: Tensor, *, kappa: float, floor: float = 1e-3) -> DirichletPolicy:
        """A policy around mean weights ``(..., N)``: concentration = kappa * mean + floor."""
        return cls(kappa * _full(mean) + floor)

    @property
    def mean(self) -> Tensor:
        """Expected weights ``(..., N)``."""
        return self.concentration / self.concentration.sum(dim=-1, keepdim=True)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights ``(..., N)``: positive, summing to one; no graph.

        Gamma draws are normalised as logarithms, so that concentrations far below one neither
        underflow to 0/0 nor give an exact zero.
        """
        with torch.no_grad():
            alpha = self.concentration.double()
            # Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha), taken as logarithms.
            gamma = torch._standard_gamma(alpha + 1.0, generator=generator)
            uniform = torch.empty_like(alpha).uniform_(generator=generator)
            tiny = torch.finfo(alpha.dtype).tiny
            logs = gamma.clamp_min(tiny).log() + uniform.clamp_min(tiny).log() / alpha
            weights = torch.softmax(logs, dim=-1).to(self.concentration.dtype)
            return weights.clamp_min(torch.finfo(weights.dtype).tiny)

    def log_prob(self, weights: Tensor) -> Tensor:
        r"""Log-density ``(...)`` of the weights ``(..., N)``.

        :math:`\ln\Gamma(\sum\alpha) - \sum\ln\Gamma(\alpha_i) + \sum(\alpha_i - 1)\ln a_i`
        """
        alpha = self.concentration
        weights = _full(weights).to(alpha.dtype)
        weights = weights.clamp_min(torch.finfo(weights.dtype).tiny)
        spread = torch.lgamma(alpha.sum(dim=-1)) - torch.lgamma(alpha).sum(dim=-1)
        return spread + ((alpha - 1.0) * weights.log()).sum(dim=-1)

    def entropy(self) -> Tensor:
        """Differential entropy ``(...)`` in nats; negative where the density is concentrated."""
        alpha = self.concentration
        total = alpha.sum(dim=-1)
        log_beta = torch.lgamma(alpha).sum(dim=-1) - torch.lgamma(total)
        count = alpha.shape[-1]
        inner = ((alpha - 1.0) * torch.digamma(alpha)).sum(dim=-1)
        return log_beta + (total - count) * torch.digamma(total) - inner


def _full(values: Tensor) -> Tensor:
    """Raise half precision to float32; keep float32 and float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_rows(logits: Tensor, mask: Tensor) -> None:
    """Refuse rows without a legal action and legal logits that are not finite."""
    if not bool(mask.any(dim=-1).all()):
        raise RuntimeFault(
            "masked policy",
            why="a state has no legal action",
            do="end the episode in the environment when its last legal action is used up",
        )
    if not bool(torch.isfinite(logits.masked_fill(~mask, 0.0)).all()):
        raise RuntimeFault(
            "masked policy",
            why="a logit of a legal action is not finite",
            do="lower the learning rate of the policy or clip its gradient",
        )
