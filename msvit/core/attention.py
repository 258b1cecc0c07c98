"""Layout: which rows belong to which picture, and attention among them.

Everything in a transformer block but attention works row by row. So the rows of all pictures stand one after the
other in one matrix `[T, C]`, and only this file knows where a picture begins and ends.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import in_full

PART = 1024  # rows
COLUMNS = 128  # keys at once, where scores are written out
SHORT_PICTURE = 64  # rows; pictures of no more than these are padded rather than taken one by one
HIDDEN = -3e4  # the score of a hidden key that still is a float16
MOST = 1.0  # the tangent of a hidden key, see `HiddenKeys`


class Layout:
    """B pictures of `lengths` rows each, T rows in all."""

    def __init__(self, lengths: list[int], device: torch.device):
        self.lengths = lengths
        self.device = device
        self.uniform = min(lengths) == max(lengths)
        self._parted: tuple[Tensor, tuple[Part, Part]] | None = None

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
        return rows if self.uniform else TakenRows.apply(rows, self.slot)

    def split(self, rows: Tensor | None) -> Sequence[Tensor | None]:
        """Return the rows `[T, ...]` of each picture, as views; None for each where there are none."""
        return [None] * len(self.lengths) if rows is None else rows.split(self.lengths)

    def parted(self, weight: Tensor) -> "tuple[Part, Part]":
        """Return the rows of positive weight `[T]`, and the others; found once for layers that share a weight."""
        if self._parted is None or self._parted[0] is not weight:
            shown = weight.detach() > 0
            counts = self.sum(shown.long()).tolist()
            rest = [n - count for n, count in zip(self.lengths, counts, strict=True)]
            parts = (
                Part(shown.nonzero()[:, 0], Layout(counts, self.device)),
                Part((~shown).nonzero()[:, 0], Layout(rest, self.device)),
            )
            self._parted = weight, parts
        return self._parted[1]

    def sum(self, rows: Tensor) -> Tensor:
        """Return rows `[T, ...]` summed over each picture, `[B, ...]`."""
        if self.uniform:
            return self.pad(rows).sum(1)
        return rows.new_zeros(len(self.lengths), *rows.shape[1:]).index_add(0, self.picture, rows)


class Part(NamedTuple):
    """Some of the rows, by their numbers, and how many each picture has."""

    rows: Tensor
    layout: Layout


class TakenRows(torch.autograd.Function):
    """The rows x[rows], none of them twice. To know that makes their gradient a copy, in place of a slow sum."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy(0, rows, grad), None


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call `function`, which treats every row on its own, on rows x `[T, C]`.

    Without a gradient, a CPU works on PART rows at a time: what lies between the layers of an MLP then takes little
    memory and stays in the cache.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_cuda or len(x) <= PART:
        return function(x)
    parts = math.ceil(len(x) / PART)
    return torch.cat([function(part) for part in x.chunk(parts)])


def attend(layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
    """Attend within each picture, every key counted `weight` times.

        out_i = sum_j A_ij v_j,    A_ij = w_j exp(s_ij) / sum_k w_k exp(s_ik),    s_ij = q_i . k_j / sqrt(D)

    With weight None all keys count once. Where the weight carries a gradient, keys of weight zero get theirs too, see
    `HiddenKeys`. Fused kernels do it all, in memory that is linear in the rows.

    Args:
        layout: Of the keys. The queries are as many per picture, or one per picture.
        q: `[T, H, D]`, or `[B, H, D]` for one query per picture.
        k, v: `[T, H, D]`.
        weight: `[T]`, not negative; in every picture at least one is positive.
    """
    queries = layout if q.shape[0] == k.shape[0] else Layout([1] * q.shape[0], q.device)
    if weight is not None and weight.requires_grad:
        return _attend_learned(queries, layout, q, k, v, weight)
    kernel = _kernel(q)
    if kernel == "each" and not layout.uniform:
        return _attend_each(queries, layout, q, k, v, weight)
    if kernel == "each" or (layout.uniform and weight is None):
        bias = None if weight is None else layout.pad(weight).to(q.dtype).log()[:, None, None, :]
        padded = [part.transpose(1, 2) for part in (queries.pad(q), layout.pad(k), layout.pad(v))]
        return queries.unpad(F.scaled_dot_product_attention(*padded, attn_mask=bias).transpose(1, 2))
    return _attend_counted(queries, layout, q, k, v, weight)[0]


def _kernel(q: Tensor) -> str:
    """Return what takes pictures of different lengths: a call for each, one that packs them, or one that pads."""
    if q.device.type == "cpu":
        return "each"
    return "packed" if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) else "padded"


def _attend_each(queries: Layout, keys: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
    """Attend picture by picture, on views. On a CPU this beats padding, and does no more than the counted MACs."""
    bias, out = None if weight is None else weight.to(q.dtype).log(), []
    for *rows, mask in zip(queries.split(q), *map(keys.split, (k, v, bias)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in rows)
        mask = None if mask is None else mask[None]
        out.append(F.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(out)


def _attend_counted(
    queries: Layout, keys: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attend with each key's weight in the products themselves, so that no kernel needs a mask.

        s_ij + log w_j = [q_i, 1] . [k_j, sqrt(D) log w_j] / sqrt(D)

    The gradient by weights above zero comes with that by the keys. A weight of zero hides a key.

    Returns:
        The output `[T, H, D]`, and log sum_j w_j exp(s_ij) `[T, H]`; None where the kernel does not tell.
    """
    width, scale, kernel = q.shape[-1], q.shape[-1] ** -0.5, _kernel(q)
    full = torch.promote_types(q.dtype, torch.float32)
    log = None if weight is None else (weight.to(full).log() / scale).clamp(min=HIDDEN)
    if kernel == "packed":
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        rows = (x.contiguous() for x in ((q, k, v) if log is None else _with_logs(q, k, v, log)))
        ends, most = (queries.ends.int(), keys.ends.int()), (max(queries.lengths), max(keys.lengths))
        out, total = varlen_attn(*rows, *ends, *most, return_aux=AuxRequest(lse=True), scale=scale)
        return out[..., :width], total.t()
    if kernel == "padded" or max(queries.lengths) <= SHORT_PICTURE:
        log = keys.pad(k.new_zeros(len(k)) if log is None else log, HIDDEN)
        rows = (x.transpose(1, 2) for x in _with_logs(queries.pad(q), keys.pad(k), keys.pad(v), log))
        if kernel == "padded":
            out, total = F.scaled_dot_product_attention(*rows, scale=scale), None
        else:
            out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, scale=scale)
            total = queries.unpad(total.transpose(1, 2))
        return queries.unpad(out.transpose(1, 2))[..., :width], total
    found = []
    for rows in zip(*map(Layout.split, (queries, keys, keys), _with_logs(q, k, v, log)), strict=True):
        heads = (x.transpose(0, 1)[None] for x in rows)
        found.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale))
    out, total = (torch.cat([x[0].transpose(0, 1) for x in part]) for part in zip(*found, strict=True))
    return out[..., :width], total


def _with_logs(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v `[..., H, D]` with one more column for log w `[...]`, made up to a multiple of 8 for CUDA."""
    rest = -(q.shape[-1] + 1) % 8
    log = log.to(k.dtype)[..., None, None].expand(*k.shape[:-1], 1)
    q = F.pad(F.pad(q, (0, 1), value=1.0), (0, rest))
    return q, F.pad(torch.cat([k, log], -1), (0, rest)), F.pad(v, (0, 1 + rest))


def _attend_learned(queries: Layout, layout: Layout, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """Attend with a gradient by the weights: to active keys as they are, and to hidden ones in the gradient alone."""
    active, hidden = layout.parted(weight)
    seen = [x if len(hidden.rows) == 0 else TakenRows.apply(x, active.rows) for x in (k, v, weight)]
    out, total = _attend_counted(queries, active.layout, q, *seen)
    if len(hidden.rows) == 0:
        return out
    if total is None:
        total = _log_sums(queries, active.layout, q, seen[0], seen[2])
    unseen = [x.index_select(0, hidden.rows) for x in (weight, k.detach(), v.detach())]
    return HiddenKeys.apply(out, total, q.detach(), *unseen, queries, hidden.layout)


class HiddenKeys(torch.autograd.Function):
    """The gradient by the weights of hidden keys, on the output of attention to the active ones, which it leaves alone.

    Attention has, with u_ij = exp(s_ij) / sum_k w_k exp(s_ik), so that A_ij = w_j u_ij, and G = dL/d out:

        r_ij = u_ij (G_i . v_j - G_i . out_i)
        dL/dw_j = sum_i r_ij,   dL/ds_ij = w_j r_ij,   dL/dv_j = w_j sum_i u_ij G_i

    Where w_j = 0, only the first of these is not zero, and with the logarithm of the sum, which fused kernels know, it
    takes the hidden columns alone, some at a time.

    A bias log(max(w, eps)) in a plain softmax loses dL/dw_j where w_j = 0: a gate that trains through it learns from
    active tokens only. A hidden key that scores above all active ones together has u > 1, without a bound: its share
    would be at most 1 if it were there, but the tangent at zero can be a million times steeper, and a few such keys
    drown all other gradients of a batch. So u_ij of hidden keys is cut to MOST, which is the most of an active one.
    """

    @staticmethod
    def forward(ctx, out, total, q, weight, k, v, queries: Layout, keys: Layout) -> Tensor:
        ctx.save_for_backward(out, total, q, weight, k, v)
        ctx.layouts = queries, keys
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, total, q, weight, k, v = ctx.saved_tensors
        queries, keys = ctx.layouts
        gain, most = in_full((grad * out).sum(-1)), math.log(MOST)
        q, grad_, total, gain = (queries.pad(x).transpose(1, 2) for x in (q, grad, total, gain))
        columns = (keys.pad(x).transpose(1, 2).split(COLUMNS, 2) for x in (k, v))
        sums = []
        for k_part, v_part in zip(*columns, strict=True):
            u = _scores(q, k_part).sub_(total[..., None]).clamp_(max=most).exp_()
            r = in_full(grad_ @ v_part.mT).sub_(gain[..., None]).mul_(u)
            sums.append(r.sum((1, 2)))
        return grad, None, None, keys.unpad(torch.cat(sums, 1)).to(weight.dtype), None, None, None, None


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return s `[B, H, M, N]` of `[B, H, M, D]` and `[B, H, N, D]`, in float32 or better."""
    return in_full((q * q.shape[-1] ** -0.5) @ k.mT)


@torch.no_grad()
def _log_sums(queries: Layout, keys: Layout, q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """Return log sum_j w_j exp(s_ij) `[T, H]`, some columns at a time."""
    q_, k_, log = queries.pad(q), keys.pad(k), keys.pad(weight.log(), -torch.inf)[:, None, None]
    total = None
    for part, bias in zip(k_.transpose(1, 2).split(COLUMNS, 2), log.split(COLUMNS, 3), strict=True):
        sums = (_scores(q_.transpose(1, 2), part) + bias).logsumexp(-1)
        total = sums if total is None else torch.logaddexp(total, sums)
    return queries.unpad(total.transpose(1, 2))
