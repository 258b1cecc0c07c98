"""Cumulative distribution functions, differentiable in argument and parameters, and the distance of values to them.

Each F(x; p, q), here and in `beta`, is a plain function that returns F and its three partial derivatives in closed
form, and one `autograd.Function` makes a differentiable operation of it. Parameters broadcast against x, everything
happens on the device of x, and half precision is computed in float32 (the Beta function always in float64).

F is exact on the closed interval. A density may be infinite at the ends, so within `torch.finfo(dtype).eps` of an end
the derivative in x is the one at that distance from it, and at exactly 0 and 1 it is zero: a saturated gate has no
gradient of its own to multiply it with, and zero times infinity would be NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import in_interval, one_of

GRADIENTS, TIES = ("both", "values", "prior"), ("order", "average")


class Partials(NamedTuple):
    """F(x; p, q) and its derivatives; those in the parameters may be None where nobody needs them."""

    value: Tensor
    by_x: Tensor
    by_p: Tensor | None
    by_q: Tensor | None


class Cdf(torch.autograd.Function):
    """y = F(x; p, q) for a `formula` that knows its own derivatives."""

    @staticmethod
    def forward(ctx, formula: Callable[..., Partials], x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        ctx.shapes = x.shape, p.shape, q.shape
        y, *partials = formula(x, p, q, any(ctx.needs_input_grad[2:]))
        ctx.save_for_backward(*partials)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        wanted = zip(ctx.needs_input_grad[1:], ctx.saved_tensors, ctx.shapes, strict=True)
        return None, *((grad * d).sum_to_size(shape) if need else None for need, d, shape in wanted)


def cvm(
    values: Tensor,
    cdf: Callable[..., Tensor],
    dim: int | None = None,
    *,
    params: tuple[Tensor | float, ...] = (),
    gradients: str = "both",
    ties: str = "order",
) -> Tensor:
    """Return the Cramér–von Mises distance of `values` to the distribution `cdf(values, *params)`.

    What is ranked is u = F(v). F increases, so these are the ranks of v where all share one prior; and where they do
    not, u is uniform under each value's own prior.

    Args:
        values: Any shape; `params` broadcast against it.
        cdf: Differentiable F, called as `cdf(values, *params)`.
        dim: Dimension that is sorted, one distance for each index of the others; None: one for all values.
        gradients: What they flow to: "values", "prior" (that is, `params`) or "both".
        ties: Equal values get ranks in the "order" they come, or all of them their "average" rank.
    """
    one_of("ties", ties, TIES)
    values, params = route(values, params, gradients)
    u = cdf(values, *params)
    u = u.flatten() if dim is None else u.movedim(dim, -1)
    n = u.shape[-1]
    if n < 2:
        raise ValueError(f"{n} value to compare with a distribution; expected 2 or more (a larger batch)")
    u = u.sort(dim=-1).values
    if ties == "average":
        fixed = u.detach().contiguous()
        ranks = (torch.searchsorted(fixed, fixed) + torch.searchsorted(fixed, fixed, right=True) + 1) / 2
    else:
        ranks = torch.arange(1, n + 1, device=u.device)
    return (ranks.to(u.dtype) / (n + 1) - u).square().mean(-1)


def normal_cdf(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Return F(x) of the normal distribution: Φ((x − mean) / std)."""
    in_interval("x", x, "(-inf, inf)")
    in_interval("mean", mean, "(-inf, inf)")
    in_interval("std", std, "(0, inf)")
    x, mean, std = as_tensors(x, mean, std)
    return torch.special.ndtr((x - mean) / std)


def relaxed_bernoulli_cdf(x: Tensor, p: Tensor | float, temperature: Tensor | float) -> Tensor:
    """Return F(x) of the relaxed Bernoulli (binary concrete) distribution: σ(T logit x − logit p).

    It is the distribution of σ((logit p + noise) / T) for logistic noise, that is, of a Gumbel-sigmoid gate (Maddison
    et al. 2017). p is its location: P(x > 1/2) = p at every temperature T, while the mean of x is p only as T → 0.
    """
    in_interval("x", x, "[0, 1]")
    in_interval("p", p, "(0, 1)")
    in_interval("temperature", temperature, "(0, inf)")
    return Cdf.apply(_relaxed_bernoulli, *as_tensors(x, p, temperature))


def route(values: Tensor, params: tuple, gradients: str) -> tuple[Tensor, tuple]:
    """Return values and parameters, detached where no gradient is to flow."""
    one_of("gradients", gradients, GRADIENTS)
    if gradients == "values":
        params = tuple(q.detach() if isinstance(q, Tensor) else q for q in params)
    return values.detach() if gradients == "prior" else values, params


def as_tensors(x: Tensor, *params: Tensor | float) -> list[Tensor]:
    """Return all of them as tensors on the device of x, in float64 if one of them is, and in float32 otherwise."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (x, *params))
    dtype = torch.float64 if wide else torch.float32
    return [torch.as_tensor(t, dtype=dtype, device=x.device) for t in (x, *params)]


def _relaxed_bernoulli(x: Tensor, p: Tensor, temperature: Tensor, params: bool) -> Partials:
    eps = torch.finfo(x.dtype).eps
    inside, ends = x.clamp(eps, 1 - eps), (x == 0) | (x == 1)
    logit = torch.logit(x)
    y = torch.sigmoid(temperature * logit - torch.logit(p))
    slope = y * (1 - y)
    by_x = (slope * temperature / (inside * (1 - inside))).masked_fill_(ends, 0)
    if not params:
        return Partials(y, by_x, None, None)
    return Partials(y, by_x, -slope / (p * (1 - p)), slope * logit.masked_fill(ends, 0))
