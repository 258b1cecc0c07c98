"""Attention written out, for those that need its weights: a reducer's scores, or a softmax that is none."""

import torch
from torch import Tensor

from . import attention
from .attention import Layout, attend
from .precision import in_full


def attend_by_policy(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, policy: Tensor, size: Tensor | None = None
) -> Tensor:
    """Attend within each picture as DynamicViT does while training: rows of weight zero still see themselves.

        A_ij = (e_ij + eps / n) / (sum_k e_ik + eps),   e_ij = exp(s_ij - max_k s_ik) (w_j + (1 - w_j) [i = j])

    The maximum is over all n keys of a picture, dropped ones included, and carries gradient; eps = 1e-6.

    Args:
        weight: w `[T]`, the policy times a gate's activity.
        policy: `[T]`. The tangent of what it keeps and the gate hides is cut as that of `HiddenKeys`.
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
            cut = (attention.MOST / u).clamp(max=1).masked_fill(~hidden, 1)
        seen = seen.detach() + cut * (seen - seen.detach())
    e = e * seen
    a = (e + 1e-6 / n) / (e.sum(-1, keepdim=True) + 1e-6)  # the padding has values of zero
    return layout.unpad((a.to(v.dtype) @ v).transpose(1, 2))


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

    The mean over the heads. It carries its gradient, by the weights too, hidden keys' cut as in `HiddenKeys`.
    """
    shares = []
    for part, q_, k_, w_ in _groups(layout, q, k, weight):
        first, keys = q_[part.ends[:-1]][:, :, None], part.pad(k_).permute(0, 2, 3, 1)
        s = in_full((first * first.shape[-1] ** -0.5) @ keys)
        w = part.pad(torch.ones_like(k_[:, 0, 0]) if w_ is None else w_).to(s.dtype)[:, None, None]
        e = (s - s.detach().masked_fill(w <= 0, -torch.inf).amax(-1, keepdim=True)).clamp(max=10).exp()
        most = attention.MOST * (w * e).sum(-1, keepdim=True).detach()
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
