"""The trunk of the column agent: residual blocks of dilated convolutions along the columns.

Maps are ``(B, W, C)``, channels last, so that every layer is a product of matrices; each block knows its
own derivative, which spares the copies and passes over memory of one recorded operation after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.plugins.kspace.models.blocks import where_positive

KERNEL = 5
DILATIONS = (1, 2, 4)
GROUPS = 4


class Trunk(nn.Module):
    """Features of columns and of the whole image to maps.

    Args:
        actions: W.
        features: F, of each column.
        pooled: G, of the whole image; 0 for none.
        width: C, a multiple of 4.
        embedding: Length of the learned vector of each column.
    """

    def __init__(self, actions: int, features: int, pooled: int, width: int, embedding: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(embedding, actions) * 0.02)
        self.stem = nn.Conv1d(features + embedding, width, 1)
        self.whole = nn.Linear(pooled, width, bias=False) if pooled else None
        self.blocks = nn.ModuleList(_Block(width, dilation) for dilation in DILATIONS)

    def forward(self, columns: Tensor, pooled: Tensor) -> Tensor:
        """Give maps ``(B, W, C)`` for ``(B, W, F)`` and ``(B, G)``."""
        weight = self.stem.weight.squeeze(-1)
        own, shared = torch.split(weight, [columns.shape[2], self.embedding.shape[0]], dim=1)
        known = F.linear(self.embedding.t(), shared, self.stem.bias).unsqueeze(0)
        if self.whole is not None:
            known = known + self.whole(pooled).unsqueeze(1)
        maps = F.linear(columns, own) + known
        for block in self.blocks:
            maps = block(maps)
        return F.relu(maps)


class _Block(nn.Module):
    """Look left and right, and at the summary of all columns; add to what was there."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.near = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2 * dilation, dilation=dilation)
        self.context = nn.Linear(2 * width, width)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        out: Tensor = _BlockFunction.apply(  # type: ignore[no-untyped-call]
            maps,
            self.norm.weight,
            self.norm.bias,
            self.near.weight,
            self.near.bias,
            self.context.weight,
            self.context.bias,
            self.mix.weight,
            self.mix.bias,
            self.norm.eps,
            self.near.dilation[0],
        )
        return out


def summary(maps: Tensor) -> Tensor:
    """Mean and largest value over the columns of ``(B, W, C)``: ``(B, 2C)``."""
    return torch.cat([maps.mean(dim=1), _largest(maps)], dim=1)


def _largest(maps: Tensor) -> Tensor:
    """Largest value over the columns ``(B, C)``, by halves: several times faster than `amax` on a CPU.

    Of equal values each half passes on what is its share of the derivative, as `torch.maximum` does.
    """
    while maps.shape[1] > 1:
        half, rest = divmod(maps.shape[1], 2)
        upper = torch.maximum(maps[:, :half], maps[:, half : 2 * half])
        maps = torch.cat([upper, maps[:, 2 * half :]], dim=1) if rest else upper
    return maps[:, 0]


class _BlockFunction(torch.autograd.Function):
    """``x + mix(relu(near(y) + context(summary(y))))`` with ``y = relu(norm(x))``, and its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        norm: Tensor,
        norm_bias: Tensor,
        near: Tensor,
        near_bias: Tensor,
        context: Tensor,
        context_bias: Tensor,
        mix: Tensor,
        mix_bias: Tensor,
        eps: float,
        dilation: int,
    ) -> Tensor:
        count, columns, width = maps.shape
        maps = maps.contiguous()
        inner, mean, scale = torch.native_group_norm(
            _wide(maps), norm, norm_bias, count, width, columns, GROUPS, eps
        )
        inner = _narrow(inner.relu_())
        seen = summary(inner)
        added = torch.addmm(context_bias + near_bias, seen, context.t())
        reach = KERNEL // 2 * dilation
        outer = F.conv2d(_wide(inner), near.unsqueeze(2), padding=(0, reach), dilation=(1, dilation))
        outer = _narrow(outer).contiguous().add_(added.unsqueeze(1)).relu_()
        out = torch.mm(outer.view(-1, width), mix.squeeze(-1).t()).view(maps.shape)
        ctx.save_for_backward(maps, inner, outer, seen, mean, scale, norm, near, context, mix)
        ctx.dilation = dilation
        return out.add_(mix_bias).add_(maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        maps, inner, outer, seen, mean, scale, norm, near, context, mix = ctx.saved_tensors
        count, columns, width = maps.shape
        given = grads[0].contiguous()
        flat = given.view(-1, width)
        of_mix = torch.mm(flat.t(), outer.view(-1, width)).unsqueeze(-1)
        of_mix_bias = flat.sum(dim=0)
        upper = torch.mm(flat, mix.squeeze(-1)).view(maps.shape)
        upper = where_positive(upper, outer)
        of_added = upper.sum(dim=1)
        of_bias = of_added.sum(dim=0)
        reach = KERNEL // 2 * ctx.dilation
        lower, of_near, _ = torch.ops.aten.convolution_backward(
            _wide(upper),
            _wide(inner),
            near.unsqueeze(2),
            None,
            [1, 1],
            [0, reach],
            [1, ctx.dilation],
            False,
            [0, 0],
            1,
            [True, True, False],
        )
        lower = _narrow(lower).contiguous()
        of_mean, of_largest = torch.chunk(torch.mm(of_added, context), 2, dim=1)
        largest = torch.eq(inner, seen[:, width:].unsqueeze(1), out=torch.empty_like(inner))
        of_largest = of_largest / largest.sum(dim=1)
        lower.addcmul_(largest, of_largest.unsqueeze(1)).add_(of_mean.unsqueeze(1) / columns)
        lower = where_positive(lower, inner)
        of_maps, of_norm, of_norm_bias = torch.ops.aten.native_group_norm_backward(
            _wide(lower),
            _wide(maps),
            mean,
            scale,
            norm,
            count,
            width,
            columns,
            GROUPS,
            [True, True, True],
        )
        return (
            _narrow(of_maps).add_(given),
            of_norm,
            of_norm_bias,
            of_near.squeeze(2),
            of_bias,
            torch.mm(of_added.t(), seen),
            of_bias,
            of_mix,
            of_mix_bias,
            None,
            None,
        )


def _wide(maps: Tensor) -> Tensor:
    """Maps ``(B, W, C)`` as an image of one row ``(B, C, 1, W)``, without a copy."""
    return maps.transpose(1, 2).unsqueeze(2)


def _narrow(image: Tensor) -> Tensor:
    """Undo `_wide`."""
    return image.squeeze(2).transpose(1, 2)
