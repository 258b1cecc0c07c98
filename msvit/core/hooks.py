"""Forward and backward hooks of a backbone whose blocks are run on rows, not called."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from .tokens import Tokens

T = TypeVar("T")


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)


def run_hooked(block: nn.Module, work: Callable[[Tokens], tuple[Tokens, T]], tokens: Tokens) -> tuple[Tokens, T]:
    """Do a block's work on tokens, its hooks called with the rows `[T, C]` before and after.

    With hooks, the block is called as PyTorch calls it, and for this one call has our work for a forward.
    """
    if not is_hooked(block):
        return work(tokens)
    done: list[tuple[Tokens, T]] = []

    def forward(x: Tensor) -> Tensor:
        done.append(work(replace(tokens, x=x)))
        return done[0][0].x

    own = vars(block).get("forward")
    block.forward = forward
    try:
        x = block(tokens.x)
    finally:
        del block.forward
        if own is not None:
            block.forward = own
    after, rest = done[0]
    return replace(after, x=x), rest


def warn_of_hooks(vit: nn.Module):
    """Warn of hooks on modules that are never called; their layers are, on rows."""
    silent = {"the backbone": vit, "patch_embed": vit.patch_embed, "patch_embed.proj": vit.patch_embed.proj}
    silent |= {f"blocks.{i}.attn": block.attn for i, block in enumerate(vit.blocks)}
    if hooked := [name for name, module in silent.items() if is_hooked(module)]:
        warnings.warn(
            f"hooks on {', '.join(hooked)} are never called: rows of pictures of different lengths do not pass "
            "through as a whole. Hook blocks[i], or its attn.qkv, attn.proj, norm1, norm2 or mlp, called with rows "
            "[T, C]; or use model.forward_intermediates",
            stacklevel=2,
        )
