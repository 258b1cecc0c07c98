"""One batch of several processes: a gather that carries gradients."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """The batches of all processes, one after the other; each may have its own length."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        size = torch.tensor([len(x)], device=x.device)
        sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, size)
        sizes = torch.cat(sizes).tolist()
        padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        start = sum(sizes[: dist.get_rank()])
        ctx.mine = slice(start, start + len(x))
        return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad[ctx.mine] * dist.get_world_size()


def global_batch(gates: Tensor) -> Tensor:
    """Gather `[B, h, w]` of this process and of all others, `[sum B, h, w]`, with gradients; alone: unchanged.

    Every process computes the same loss of the same gathered gates. What flows back to a process is its own share of
    the gradient times the number of processes W, because distributed data parallel then divides by W: after its
    averaging, weights and prior parameters have the gradient that one process has on the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return gates
    return _Gather.apply(gates.contiguous())
