"""Layout: which rows belong to which picture, and attention among them.

Everything in a transformer block but attention works row by row. So the rows of all pictures stand one after the
other in one matrix `[T, C]`, and only this file knows where a picture begins and ends.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_full

PART = 1024  # rows


class Layout:
    """B pictures of `lengths` rows each, T rows in all."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.device = device
        self.uniform = min(lengths) == max(lengths)

    @cached_property
    def ends(self) -> Tensor:
        """`[B + 1]`: picture b has the rows ends[b] ... ends[b + 1] - 1."""
        return torch.tensor([0, *self.lengths], device=self.device).cumsum(0)

    @cached_property
    def picture(self) -> Tensor:
        """`[T]`: the picture that a row belongs to."""
        counts = torch.tensor(self.lengths, device=self.device)
        index = torch.arange(len(self.lengths), device=self.device)
        return index.repeat_interleave(counts, output_size=sum(self.lengths))

    @cached_property
    def position(self) -> Tensor:
        """`[T]`: where a row stands within its picture, from 0."""
        return torch.arange(sum(self.lengths), device=self.device) - self.ends[self.picture]

    @cached_property
    def slot(self) -> Tensor:
        """`[T]`: where a row stands when every picture is padded to the longest one, counted over `[B, Nmax]`."""
        return self.position + self.picture * max(self.lengths)

    def pad(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        """Return rows `[T, ...]` as `[B, Nmax, ...]`, the room behind the shorter pictures filled."""
        shape = (len(self.lengths), max(self.lengths), *rows.shape[1:])
        if self.uniform:
            return rows.view(shape)
        padded = rows.new_full((shape[0] * shape[1], *rows.shape[1:]), fill)
        return padded.index_copy(0, self.slot, rows).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the inverse of `pad`."""
        rows = padded.flatten(0, 1)
        return rows if self.uniform else rows[self.slot]

    def split(self, rows: Tensor | None) -> Sequence[Tensor | None]:
        """Return the rows `[T, ...]` of each picture, as views; None for each where there are none."""
        return [None] * len(self.lengths) if rows is None else rows.split(self.lengths)

    def sum(self, rows: Tensor) -> Tensor:
        """Return rows `[T, ...]` summed over each picture, `[B, ...]`."""
        if self.uniform:
            return self.pad(rows).sum(1)
        return rows.new_zeros(len(self.lengths), *rows.shape[1:]).index_add(0, self.picture, rows)


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call `function`, which treats every row on its own, on rows x `[T, C]`.

    Without a gradient, a CPU works on PART rows at a time: what lies between the layers of an MLP then takes little
    memory and stays in the cache.
    """
    parts = math.ceil(len(x) / PART)
    if parts < 2 or x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(x)
    return torch.cat([function(part) for part in x.chunk(parts)])


def attend(layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """Attend within each picture, every key counted `weight` times.

        out_i = sum_j A_ij v_j,    A_ij = w_j exp(s_ij) / sum_k w_k exp(s_ik),    s_ij = q_i . k_j / sqrt(D)

    With weight None all keys count once. Where the weight carries a gradient, keys of weight zero get theirs too.

    Args:
        layout: Of the keys. The queries are as many per picture, or one per picture.
        q: `[T, H, D]`, or `[B, H, D]` for one query per picture.
        k, v: `[T, H, D]`.
        weight: `[T]`, not negative; in every picture at least one is positive.
    """
    learned = weight is not None and weight.requires_grad
    queries = layout if len(q) == len(k) else Layout([1] * len(q), q.device)
    if not layout.uniform and not learned:
        if weight is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
            from torch.nn.attention.varlen import varlen_attn  # packed: one kernel for pictures of any lengths

            rows = (x.contiguous() for x in (q, k, v))
            return varlen_attn(*rows, queries.ends.int(), layout.ends.int(), max(queries.lengths), max(layout.lengths))
        if not q.is_cuda:
            return _attend_each(queries, layout, q, k, v, weight)
    padded = [part.transpose(1, 2) for part in (queries.pad(q), layout.pad(k), layout.pad(v))]
    if weight is None and not layout.uniform:
        weight = torch.ones(len(k), device=k.device)
    if learned:
        out = WeightedAttention.apply(*padded, layout.pad(weight))
    else:
        bias = None if weight is None else layout.pad(weight).to(q.dtype).log()[:, None, None, :]
        out = F.scaled_dot_product_attention(*padded, attn_mask=bias)
    return queries.unpad(out.transpose(1, 2))


def attend_by_policy(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, policy: Tensor, size: Tensor | None = None
) -> Tensor:
    """Attend within each picture as DynamicViT does while training: rows of weight zero still see themselves.

        A_ij = (e_ij + eps / n) / (sum_k e_ik + eps),   e_ij = exp(s_ij - max_k s_ik) (w_j + (1 - w_j) [i = j])

    The maximum is over all n keys of a picture, dropped ones included, and carries gradient; eps = 1e-6.

    Args:
        weight: w `[T]`, the policy times a gate's activity.
        policy: `[T]`. The tangent of what it keeps and the gate hides is cut as that of `WeightedAttention`.
        size: `[T]`, positive: s_ij + log size_j is taken for s_ij.
    """
    q, k, v = (layout.pad(rows).transpose(1, 2) for rows in (q, k, v))
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    if size is not None:
        s = s + layout.pad(size, 1.0).to(s.dtype).log()[:, None, None]
    n = torch.tensor(layout.lengths, dtype=s.dtype, device=s.device)[:, None, None, None]
    if not layout.uniform:
        s = s.masked_fill(torch.arange(s.shape[-1], device=s.device) >= n, -torch.inf)
    w = layout.pad(weight)[:, None, None]
    seen = w + (1 - w) * torch.eye(s.shape[-1], dtype=w.dtype, device=s.device)
    e = (s - s.max(-1, keepdim=True).values).exp()
    hidden = layout.pad((policy > 0.5) & (weight < 0.5))[:, None, None]
    if hidden.any():
        with torch.no_grad():
            u = e / ((e * seen).sum(-1, keepdim=True) + 1e-6)
            cut = (WeightedAttention.MOST / u).clamp(max=1).masked_fill(~hidden, 1)
        seen = seen.detach() + cut * (seen - seen.detach())
    e = e * seen
    a = (e + 1e-6 / n) / (e.sum(-1, keepdim=True) + 1e-6)  # the padding has values of zero
    return layout.unpad((a.to(v.dtype) @ v).transpose(1, 2))


def _attend_each(queries: Layout, layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
    """Attend picture by picture, on views. On a CPU this beats padding, and does no more than the counted MACs."""
    bias, out = None if weight is None else weight.to(q.dtype).log(), []
    for *rows, mask in zip(queries.split(q), *map(layout.split, (k, v, bias)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in rows)
        mask = None if mask is None else mask[None]
        out.append(F.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(out)


def attend_watched(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend, and add up what each row j receives from active rows i, `[T]`: the mean over the heads of sum_i A_ij.

    What is received has no gradient. All has the MACs of attention, but is not fused: only a layer whose reducer needs
    the weights calls it.
    """
    learned = weight is not None and weight.requires_grad
    out, received = [], []
    for part, *rows in _groups(layout, q, k, v, weight):
        q_, k_, v_ = (part.pad(x).transpose(1, 2) for x in rows[:3])
        a, count = _shares(part, q_, k_, None if rows[3] is None else rows[3].detach())
        if not learned:
            out.append(part.unpad((a @ v_).transpose(1, 2)))
        a = a.detach() if count is None else a.detach() * (count > 0)[:, None, :, None]
        received.append(part.unpad(in_full(a).sum(2).mean(1)))
    return attend(layout, q, k, v, weight) if learned else torch.cat(out), torch.cat(received)


def attention_of_first(layout: Layout, q: Tensor, k: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the share of attention that each picture's first row (the class token) gives to each row, `[T]`.

    The mean over the heads. It carries its gradient, by the weights too, hidden keys' cut as in `WeightedAttention`.
    """
    shares = []
    for part, q_, k_, w_ in _groups(layout, q, k, weight):
        first, keys = q_[part.ends[:-1]][:, :, None], part.pad(k_).permute(0, 2, 3, 1)
        s = in_full((first * first.shape[-1] ** -0.5) @ keys)
        w = part.pad(torch.ones_like(k_[:, 0, 0]) if w_ is None else w_).to(s.dtype)[:, None, None]
        e = (s - s.detach().masked_fill(w <= 0, -torch.inf).amax(-1, keepdim=True)).clamp(max=10).exp()
        most = WeightedAttention.MOST * (w * e).sum(-1, keepdim=True).detach()
        a = w * torch.where(w > 0, e, e.minimum(most))
        shares.append(part.unpad((a / a.sum(-1, keepdim=True)).mean(1)[:, 0]))
    return torch.cat(shares)


def _groups(layout: Layout, *rows: Tensor | None):
    """Yield the whole batch at once where that needs no padding or runs on a GPU, else picture by picture."""
    if layout.uniform or rows[0].is_cuda:
        yield layout, *rows
        return
    for n, *part in zip(layout.lengths, *map(layout.split, rows), strict=True):
        yield Layout([n], layout.device), *part


def _shares(layout: Layout, q: Tensor, k: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return A `[B, H, M, N]`, and how often each key counts, `[B, N]`: 0 in the padding; None if all count once."""
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if weight is None and layout.uniform:
        return s.softmax(-1), None
    rows = layout.picture.new_ones(len(layout.picture)).float() if weight is None else in_full(weight)
    count = layout.pad(rows)
    log = count.to(torch.promote_types(count.dtype, s.dtype)).log()
    return (s + log[:, None, None].to(s.dtype)).softmax(-1), count


class WeightedAttention(torch.autograd.Function):
    """`attend` on `[B, H, N, D]` with the true gradient by the weights `[B, M]`, those that are zero included.

    With u_ij = exp(s_ij) / sum_k w_k exp(s_ik), so that A_ij = w_j u_ij, and G = dL/d out:

        r_ij = u_ij (G_i . v_j - G_i . out_i)
        dL/dw_j = sum_i r_ij,   dL/ds_ij = w_j r_ij,   dL/dv_j = w_j sum_i u_ij G_i

    A bias log(max(w, eps)) in a plain softmax loses dL/dw_j where w_j = 0: a gate that trains through it learns from
    active tokens only. A hidden key that scores above all active ones together has u > 1, without a bound: its share
    would be at most 1 if it were there, but the tangent at zero can be a million times steeper, and a few such keys
    drown all other gradients of a batch. So u_ij of hidden keys is cut to MOST, which is the most of an active one.
    """

    MOST = 1.0

    @staticmethod
    def _scores(q: Tensor, k: Tensor) -> Tensor:
        """Return s, in float32 or better."""
        s = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return in_full(s)

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        s, w = WeightedAttention._scores(q, k), weight[:, None, :, None]
        top = s.masked_fill(w.transpose(-2, -1) <= 0, -torch.inf).amax(-1, keepdim=True)
        e = s.sub_(top).clamp_(max=10).exp_()  # hidden keys count for nothing, but must be finite in float16
        sums = e @ w.to(e.dtype)
        out = (e.to(v.dtype) @ (v * w).to(v.dtype)) / sums.to(v.dtype)
        ctx.save_for_backward(q, k, v, weight, top + sums.log(), out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, weight, total, out = ctx.saved_tensors
        w = weight[:, None, :, None].to(v.dtype)
        limit = torch.full_like(weight, math.log(WeightedAttention.MOST)).masked_fill_(weight > 0, torch.inf)
        u = WeightedAttention._scores(q, k).sub_(total).clamp_(max=limit[:, None, None].to(total.dtype)).exp_()
        grad_v = (u.to(grad.dtype).transpose(-2, -1) @ grad) * w
        r = (grad @ v.transpose(-2, -1)).sub_((grad * out).sum(-1, keepdim=True)).to(u.dtype).mul_(u)
        grad_weight = r.sum((1, 2)).to(weight.dtype)
        r, scale = r.to(q.dtype), q.shape[-1] ** -0.5
        return r @ (k * w) * scale, (r.transpose(-2, -1) @ q) * (w * scale), grad_v, grad_weight
