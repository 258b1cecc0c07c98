"""MACs: multiply-accumulates of the matrix products, the same that torch's FlopCounterMode counts (at two FLOPs each).

A block on N tokens of width C with MLP ratio 4 costs 12 N C² + 2 N² C. Norms, activations and the averaging of pixels
and positions are not counted, as usual.
"""

import torch
from torch import Tensor, nn

from . import backbone


def linear_macs(module: nn.Module) -> int:
    """MACs of one row through every linear layer of a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def gate_macs(gate: nn.Module | None, regions: int) -> int:
    return regions * linear_macs(gate) if gate is not None else 0


def block_macs(block: nn.Module, tokens: Tensor) -> Tensor:
    """MACs of a timm block on so many tokens, attention's two products included."""
    return tokens * linear_macs(block) + 2 * tokens**2 * block.attn.num_heads * block.attn.head_dim


def head_macs(vit: nn.Module, tokens: Tensor) -> Tensor:
    """MACs of pooling and classifier on so many tokens per picture."""
    macs = torch.full_like(
        tokens, sum(linear_macs(h) for h in (vit.head, getattr(vit, "head_dist", None)) if h)
    )
    if vit.attn_pool is None:
        return macs
    pool = vit.attn_pool
    once = linear_macs(pool) - linear_macs(pool.kv)
    # The latent query is the same for every picture: its projection is computed once a batch and not counted.
    once -= linear_macs(pool.q)
    return macs + once + tokens * (linear_macs(pool.kv) + 2 * pool.num_heads * pool.head_dim)


def embedding_macs(vit: nn.Module, tokens: Tensor) -> Tensor:
    return (tokens - backbone.prefix_count(vit)) * vit.patch_embed.proj.weight.numel()


def vit_macs(vit: nn.Module, tokens: Tensor) -> Tensor:
    """MACs, int64 `[B]`, of a backbone whose blocks all see `tokens` tokens (int64 `[B]`, prefix included)."""
    tokens = tokens.long()
    blocks = torch.stack([block_macs(block, tokens) for block in vit.blocks]).sum(0)
    return embedding_macs(vit, tokens) + blocks + head_macs(vit, tokens)
