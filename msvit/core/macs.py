"""MACs: multiply-accumulates of the matrix products, the same that torch's FlopCounterMode counts (at two FLOPs each).

A block on N tokens of width C with MLP ratio 4 costs 12 N C² + 2 N² C. Norms, activations and the averaging of pixels
and positions are not counted, as usual.
"""

import torch
from torch import Tensor, nn


def linear_macs(module: nn.Module) -> int:
    """Return the MACs of one row through every linear layer of a module; one that cuts it says into how many rows."""
    linear = (m for m in module.modules() if _is_linear(m))
    return sum(m.in_features * m.out_features * getattr(m, "rows", 1) for m in linear)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, maybe quantised, and no adapter such as LoRA's around some."""
    inside = (m for m in module.modules() if m is not module)
    return hasattr(module, "in_features") and not any(hasattr(m, "in_features") for m in inside)


def gate_macs(gate: nn.Module | None, regions: int) -> int:
    return regions * linear_macs(gate) if gate is not None else 0


def block_costs(block: nn.Module) -> tuple[int, int, int]:
    """Return a block's MACs: for a row of its attention branch, for a pair of rows there, for a row of its MLP."""
    mlp = linear_macs(block.mlp)
    return linear_macs(block) - mlp, 2 * block.attn.num_heads * block.attn.head_dim, mlp


def classifier_macs(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Return the MACs of timm's own pooling and classifier on so many tokens per picture."""
    macs = torch.full_like(tokens, sum(linear_macs(h) for h in (vit.head, getattr(vit, "head_dist", None)) if h))
    if vit.attn_pool is None:
        return macs
    pool = vit.attn_pool
    # The latent query is the same for every picture: its projection is computed once a batch and not counted.
    once = linear_macs(pool) - linear_macs(pool.kv) - linear_macs(pool.q)
    return macs + once + tokens * (linear_macs(pool.kv) + 2 * pool.num_heads * pool.head_dim)


def embedding_macs(vit: nn.Module, tokens: Tensor) -> Tensor:
    return (tokens - vit.num_prefix_tokens) * sum(p.numel() for p in vit.patch_embed.proj.parameters() if p.dim() > 1)


def vit_macs(vit: nn.Module, tokens: Tensor) -> Tensor:
    """Return the MACs, int64 `[B]`, of a classifier whose blocks all see `tokens` tokens (int64 `[B]`)."""
    tokens = tokens.long()
    return encoder_macs(vit, tokens, token_counts(len(vit.blocks), tokens)) + classifier_macs(vit, tokens)


def token_counts(depth: int, entering: Tensor, reducer: nn.Module | None = None) -> Tensor:
    """Return how many tokens each block's attention and MLP will see, int64 `[depth, 2, B]`, of so many that enter."""
    n, counts = entering.long(), []
    for layer in range(depth):
        seen = n, n
        if reducer is not None and layer in reducer.layers:
            seen = reducer.counts(layer, entering.long() if reducer.of_entered else n)
        counts.append(torch.stack(seen))
        n = seen[1]
    return torch.stack(counts)


def encoder_macs(vit: nn.Module, entering: Tensor, counts: Tensor, reducer: nn.Module | None = None) -> Tensor:
    """Return the MACs, int64 `[B]`, of all before the head: patch embedding, blocks, and the reducer's own work.

    Args:
        entering: Tokens that enter the first block, `[B]`.
        counts: Those that each block's attention and MLP saw, `[depth, 2, B]`.
    """
    attended, mixed = counts[:, 0], counts[:, 1]
    rows, keys, mlp = torch.tensor([block_costs(block) for block in vit.blocks], device=counts.device).T[..., None]
    blocks = attended * rows + attended**2 * keys + mixed * mlp
    macs = embedding_macs(vit, entering) + blocks.sum(0)
    for layer in () if reducer is None else reducer.layers:
        before = counts[layer - 1, 1] if layer else entering
        macs = macs + reducer.macs(layer, before)
    return macs
