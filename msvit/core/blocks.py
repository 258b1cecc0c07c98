"""The blocks of a timm ViT on rows: attention, the rows' own work, and a reducer where it acts."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import backbone
from .attention import Layout, attend, by_rows
from .attention_weights import attend_by_policy, attend_watched, attention_of_first
from .hooks import run_hooked, warn_of_hooks
from .rotary import Rotary, Turn, make_rotary, rotate, turn_of
from .tokens import Tokens


class TokenStage(NamedTuple):
    """What there was after a decision: the tokenizer's (layer None), or a reducer's at a block.

    Attributes:
        layer: The block.
        where: `[B, H_f, W_f]`, the row that covers each fine patch; -1 where it was dropped.
        kept: Active patch tokens, `[B]`, with the decisions' gradient while training.
    """

    layer: int | None
    where: Tensor
    kept: Tensor


class Encoded(NamedTuple):
    """Tokens after the last norm, how many active ones attention and MLPs saw, `[depth, 2, B]`, and stages."""

    final: Tokens
    counts: Tensor
    stages: tuple[TokenStage, ...]


def before_attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows that attention sees `[T, C]`, and their queries, keys and values `[T, H, D]`."""
    attn, seen = block.attn, x if backbone.norms_after(block) else block.norm1(x)
    q, k, v = backbone.projections(attn, seen)
    q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    if k.shape[1] < q.shape[1]:  # queries share keys and values in groups
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    return seen, q, k, v


def after_attention(block: nn.Module, x: Tensor, seen: Tensor, heads: Tensor, layout: Layout) -> Tensor:
    """Return the rows with attention's branch added, which is made of its output `[T, H, D]`."""
    attn = block.attn
    out = attn.norm(heads.flatten(1))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(seen).sigmoid()
    branch = backbone.scaled(block, 1, attn.proj_drop(attn.proj(out)))
    return x + backbone.drop_path(block.drop_path1, branch, layout)


def mlp(block: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """Return the rows with the MLP's branch added."""

    def work(rows: Tensor) -> Tensor:
        return backbone.scaled(block, 2, block.mlp(rows if backbone.norms_after(block) else block.norm2(rows)))

    branch = by_rows(work, x)
    return x + backbone.drop_path(block.drop_path2, branch, layout)


class Steps(NamedTuple):
    """What a block does row by row, before and after its attention; each may be compiled on its own."""

    before_attention: Callable = before_attention
    after_attention: Callable = after_attention
    mlp: Callable = mlp


Watch = Callable[[int, Tokens, Tokens], None]  # of a block, and the tokens before and after a reducer acted there


def run_blocks(
    vit: nn.Module,
    tokens: Tokens,
    reducer: nn.Module | None = None,
    steps: Steps = Steps(),  # noqa: B008 (a named tuple cannot be changed)
    watch: Watch | None = None,
    after: Callable[[int, Tokens], None] | None = None,
) -> Encoded:
    """Take tokens from before the first block to after the last norm.

    Where the backbone's `grad_checkpointing` is on, what lies within a block is computed again for its gradient. Hooks
    on a block are called with its rows `[T, C]`.

    Args:
        after: Called with the number of each block and the tokens that it returns.
    """
    prefix, rotary = vit.num_prefix_tokens, make_rotary(vit)
    stages, counts, n = [_stage(None, tokens, prefix)], [], tokens.active_counts()
    warn_of_hooks(vit)
    if reducer is not None:
        tokens = reducer.enter(tokens)
    proportional, again = reducer is None or reducer.proportional, vit.grad_checkpointing and torch.is_grad_enabled()
    for layer, block in enumerate(vit.blocks):
        acting = reducer if reducer is not None and layer in reducer.layers else None
        work = partial(_run_block, block, layer, n, acting, proportional, steps, watch, again, rotary)
        tokens, seen = run_hooked(block, work, tokens)
        counts += seen
        n = seen[-1]
        if acting is not None:
            stages.append(_stage(layer, tokens, prefix))
        if after is not None:
            after(layer, tokens)
    final = replace(tokens, x=vit.norm(tokens.x))
    return Encoded(final, torch.stack(counts).unflatten(0, (-1, 2)), tuple(stages))


def _run_block(
    block: nn.Module,
    layer: int,
    n: Tensor,
    reducer: nn.Module | None,
    proportional: bool,
    steps: Steps,
    watch: Watch | None,
    again: bool,
    rotary: Rotary | None,
    tokens: Tokens,
) -> tuple[Tokens, tuple[Tensor, Tensor]]:
    """Return the tokens after a block, and how many active ones its attention and its MLP saw.

    Args:
        n: Active tokens that come to the block.
        reducer: That acts in it, if any.
        again: Compute both halves of the block again for their gradient.
    """
    half = partial(checkpoint, use_reentrant=False) if again else _call
    if reducer is not None:
        tokens = _watched(watch, layer, tokens, reducer.before_block(layer, tokens))
        n = tokens.active_counts()
    attended, needs = n, None if reducer is None else reducer.needs
    x, seen = half(_attention, block, tokens, proportional, needs, steps, turn_of(rotary, layer, tokens))
    if reducer is not None:
        tokens = replace(tokens, x=x)
        tokens = _watched(watch, layer, tokens, reducer.after_attention(layer, tokens, seen))
        x, n = tokens.x, tokens.active_counts()
    return replace(tokens, x=half(steps.mlp, block, x, tokens.layout)), (attended, n)


def _call(function: Callable, *args):
    return function(*args)


def _watched(watch: Watch | None, layer: int, before: Tokens, after: Tokens) -> Tokens:
    if watch is not None and after is not before:
        watch(layer, before, after)
    return after


def _attention(
    block: nn.Module, tokens: Tokens, proportional: bool, needs: str | None, steps: Steps, turn: Turn | None
) -> tuple[Tensor, Tensor | None]:
    """Return the rows after attention, and what a reducer needs of it; queries, keys and values go before the MLP.

    What a token says of itself are its keys before they are rotated.

    Args:
        proportional: Whether a row of size s counts s times as a key.
    """
    layout, size = tokens.layout, tokens.size if proportional else None
    weight = tokens.weight if proportional else tokens.activity
    rows, q, key, v = steps.before_attention(block, tokens.x)
    q, k = rotate(q, turn), rotate(key, turn)
    if needs == "received":
        heads, seen = attend_watched(layout, q, k, v, weight)
    elif tokens.policy is not None:
        heads, seen = attend_by_policy(layout, q, k, v, tokens.activity, tokens.policy, size), None
    else:
        heads, seen = attend(layout, q, k, v, weight), None
    if needs == "class":
        seen = attention_of_first(layout, q, k, weight)
    elif needs == "keys":
        seen = key.detach().mean(1)
    return steps.after_attention(block, tokens.x, rows, heads, layout), seen


def _stage(layer: int | None, tokens: Tokens, prefix: int) -> TokenStage:
    activity = tokens.activity
    kept = tokens.active_counts().float() if activity is None else tokens.layout.sum(activity)
    return TokenStage(layer, tokens.where, kept - prefix)
