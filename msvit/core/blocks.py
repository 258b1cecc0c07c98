"""The way through the blocks: attention, the rows' own work, and a reducer where it acts."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backbone
from .attention import Layout, attend, attend_watched, attention_of_first, by_rows
from .tokens import Tokens


class Stage(NamedTuple):
    """What there was after a decision: the tokenizer's (layer None), or a reducer's at a block.

    Attributes:
        layer: The block.
        where: `[B, H_f, W_f]`, the row that covers each fine patch; -1 where it was dropped.
        kept: Active patch tokens, `[B]`, with the decisions' gradient while training.
    """

    layer: int | None
    where: Tensor
    kept: Tensor


class Passage(NamedTuple):
    """Tokens after the last norm, how many active ones attention and MLPs saw, `[depth, 2, B]`, and stages."""

    final: Tokens
    counts: Tensor
    stages: tuple[Stage, ...]


def pass_blocks(vit: nn.Module, tokens: Tokens, reducer: nn.Module | None, steps: tuple) -> Passage:
    """Takes tokens from before the first block to after the last norm."""
    *_, mixed = steps
    prefix = backbone.prefix_count(vit)
    stages, counts, n = [_stage(None, tokens, prefix)], [], tokens.active_counts()
    for layer, block in enumerate(vit.blocks):
        place = reducer.place if reducer is not None and layer in reducer.layers else None
        if place == "before":
            tokens = reducer(layer, tokens, None)
            n = tokens.active_counts()
            stages.append(_stage(layer, tokens, prefix))
        seen_by_attention = n
        x, seen = _attention(block, tokens, reducer.needs if place == "between" else None, steps)
        tokens = replace(tokens, x=x)
        if place == "between":
            tokens = reducer(layer, tokens, seen)
            n = tokens.active_counts()
            stages.append(_stage(layer, tokens, prefix))
        counts.append(torch.stack([seen_by_attention, n]))
        tokens = replace(tokens, x=mixed(block, tokens.x, tokens.layout))
    return Passage(replace(tokens, x=vit.norm(tokens.x)), torch.stack(counts), tuple(stages))


def _attention(block: nn.Module, tokens: Tokens, needs: str | None, steps: tuple) -> tuple[Tensor, Tensor | None]:
    """The rows after attention, and what a reducer needs of it. Queries, keys and values are gone before the MLP."""
    before, attended, _ = steps
    layout, weight = tokens.layout, tokens.weight
    h, q, k, v = before(block, tokens.x)
    if needs == "received":
        heads, seen = attend_watched(layout, q, k, v, weight)
    else:
        heads, seen = attend(layout, q, k, v, weight), None
    if needs == "class":
        seen = attention_of_first(layout, q, k, weight)
    elif needs == "keys":
        seen = k.detach().mean(1)
    return attended(block, tokens.x, h, heads, layout), seen


def _stage(layer: int | None, tokens: Tokens, prefix: int) -> Stage:
    activity = tokens.activity
    kept = tokens.active_counts().float() if activity is None else tokens.layout.sum(activity)
    return Stage(layer, tokens.where, kept - prefix)


def before_attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention needs: the normed rows, queries, keys and values."""
    h = block.norm1(x)
    return h, *backbone.split_heads(block, h)


def after_attention(block: nn.Module, x: Tensor, h: Tensor, heads: Tensor, layout: Layout) -> Tensor:
    """The rows with attention's branch added."""
    return x + backbone.drop_path(block.drop_path1, backbone.merge_heads(block, h, heads), layout)


def after_mlp(block: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    """The rows with the MLP's branch added."""
    return x + backbone.drop_path(block.drop_path2, by_rows(partial(backbone.mlp_branch, block), x), layout)


STEPS = (before_attention, after_attention, after_mlp)
