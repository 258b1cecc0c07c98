"""Cumulative distribution functions, differentiable in argument and parameters, and the distance of values to them.

Each F(x; p, q) is written as a plain function that returns F and its three partial derivatives in closed form, and one
`autograd.Function` turns such a function into a differentiable operation. Parameters broadcast against x, everything
happens on the device of x, and half precision is computed in float32 (the Beta function always in float64).

F is exact on the closed interval. A density may be infinite at the ends, so within `torch.finfo(dtype).eps` of an end
the derivative in x is the one at that distance from it, and at exactly 0 and 1 it is zero: a saturated gate has no
gradient of its own to multiply it with, and zero times infinity would be NaN.
"""

import math
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


class _Cdf(torch.autograd.Function):
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
    """Cramér–von Mises distance of `values` to the distribution `cdf(values, *params)`.

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
    """Normal distribution: F(x) = Φ((x − mean) / std)."""
    in_interval("x", x, "(-inf, inf)")
    in_interval("mean", mean, "(-inf, inf)")
    in_interval("std", std, "(0, inf)")
    x, mean, std = _tensors(x, mean, std)
    return torch.special.ndtr((x - mean) / std)


def relaxed_bernoulli_cdf(x: Tensor, p: Tensor | float, temperature: Tensor | float) -> Tensor:
    """Relaxed Bernoulli (binary concrete) distribution: F(x) = σ(T logit x − logit p).

    It is the distribution of σ((logit p + noise) / T) for logistic noise, that is, of a Gumbel-sigmoid gate (Maddison
    et al. 2017). p is its location: P(x > 1/2) = p at every temperature T, while the mean of x is p only as T → 0.
    """
    in_interval("x", x, "[0, 1]")
    in_interval("p", p, "(0, 1)")
    in_interval("temperature", temperature, "(0, inf)")
    return _Cdf.apply(_relaxed_bernoulli, *_tensors(x, p, temperature))


def beta_cdf(x: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Beta distribution: the regularised incomplete beta function I_x(a, b), with its derivatives in x, a and b.

    Accurate to 1e-8 or better for a, b from 0.05 to 50 and any x, and usable far beyond; see `_incomplete_beta`.
    """
    in_interval("x", x, "[0, 1]")
    in_interval("a", a, "(0, inf)")
    in_interval("b", b, "(0, inf)")
    return _Cdf.apply(_beta, *_tensors(x, a, b))


def route(values: Tensor, params: tuple, gradients: str) -> tuple[Tensor, tuple]:
    """Values and parameters, detached where no gradient is to flow."""
    one_of("gradients", gradients, GRADIENTS)
    if gradients == "values":
        params = tuple(q.detach() if isinstance(q, Tensor) else q for q in params)
    return values.detach() if gradients == "prior" else values, params


def _tensors(x: Tensor, *params: Tensor | float) -> list[Tensor]:
    """All of them as tensors on the device of x, in float64 if one of them is float64 and in float32 otherwise."""
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


def _beta(x: Tensor, a: Tensor, b: Tensor, params: bool) -> Partials:
    """I_x(a, b) from the tail that x lies in, by the symmetry I_x(a, b) = 1 − I_{1−x}(b, a).

    Both tails are computed for every x, each with x cut to where its fraction converges: their coefficients then depend
    on the parameters alone, which a per-position prior shares among all values of a batch.
    """
    dtype, eps = x.dtype, torch.finfo(x.dtype).eps
    x, a, b = x.double(), a.double(), b.double()
    inside, ends = x.clamp(eps, 1 - eps), (x == 0) | (x == 1)
    turn = (a + 1) / (a + b + 2)
    low, log_beta = x <= turn, torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    lower = _incomplete_beta(torch.minimum(x, turn), a, b, log_beta, params)
    upper = _incomplete_beta(torch.minimum(1 - x, 1 - turn), b, a, log_beta, params)
    value = torch.where(low, lower.value, 1 - upper.value)
    log_density = torch.xlogy(a - 1, inside) + torch.special.xlog1py(b - 1, -inside) - log_beta
    by_x = log_density.exp_().masked_fill_(ends, 0)
    if not params:
        return Partials(value.to(dtype), by_x.to(dtype), None, None)
    by_a = torch.where(low, lower.by_p, -upper.by_q).masked_fill_(ends, 0)
    by_b = torch.where(low, lower.by_q, -upper.by_p).masked_fill_(ends, 0)
    return Partials(value.to(dtype), by_x.to(dtype), by_a.to(dtype), by_b.to(dtype))


def _incomplete_beta(x: Tensor, a: Tensor, b: Tensor, log_beta: Tensor, params: bool) -> Partials:
    """I_x(a, b) = x^a (1−x)^b / B(a, b) · 1/f for x ≤ (a+1)/(a+b+2), by a continued fraction, without ∂/∂x.

    f = β_0 + α_1/(β_1 + α_2/(β_2 + …)) is the even part of the classical fraction (DiDonato & Morris 1992):

        α_n = (a+n−1)(a+b+n−1) n(b−n) / (a+2n−1)² · x²
        β_n = n + n(b−n)/(a+2n−1) · x + (a+n)/(a+2n+1) · (a + 1 + 2n − (a+b+n) x)

    It is run backwards from a depth that grows like the root of the larger shape; f's derivatives in a and b travel
    along as tangents. With ψ the digamma function, ∂ ln I/∂a = ln x − ψ(a) + ψ(a+b) − f_a/f, and likewise in b.
    """
    total, square = a + b, x * x
    largest = torch.maximum(a.max(), b.max()).item() if x.numel() else 0
    f = f_a = f_b = None
    for n in range(math.ceil(7 + 2.5 * math.sqrt(largest)), -1, -1):
        # β_n = c + d x and α_{n+1} = e x², with their derivatives in a and b: small tensors, of the parameters alone.
        up = 1 / (a + 2 * n + 1)
        share, share_a = (a + n) * up, (n + 1) * up * up
        c, c_a = n + share * (a + 1 + 2 * n), share + share_a * (a + 1 + 2 * n)
        d, d_a, d_b = -share * (total + n), -share - share_a * (total + n), -share
        if n:
            down = n / (a + 2 * n - 1)
            d, d_a, d_b = d + down * (b - n), d_a - down / (a + 2 * n - 1) * (b - n), d_b + down
        step, step_a, step_b = torch.addcmul(c, d, x), None, None
        if params:
            step_a, step_b = torch.addcmul(c_a, d_a, x), d_b * x
        if f is not None:
            m, h = n + 1, b - n - 1
            g = m * (total + n) * up
            e = share * g * h
            q = square / f
            step.addcmul_(e, q)
            if params:
                e_a, e_b = (share_a * g + share * (m - g) * up) * h, share * (m * up * h + g)
                shrink = e * q / f
                step_a.addcmul_(e_a, q).addcmul_(shrink, f_a, value=-1)
                step_b.addcmul_(e_b, q).addcmul_(shrink, f_b, value=-1)
        f, f_a, f_b = step, step_a, step_b
    log_x, log_y = x.log(), torch.log1p(-x)
    value = (a * log_x + b * log_y - log_beta).exp_() / f
    if not params:
        return Partials(value, None, None, None)
    psi = torch.digamma(total)
    by_a = value * (log_x - (torch.digamma(a) - psi) - f_a / f)
    by_b = value * (log_y - (torch.digamma(b) - psi) - f_b / f)
    return Partials(value, None, by_a, by_b)
