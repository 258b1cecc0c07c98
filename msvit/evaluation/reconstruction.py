"""How much of the tokens a reducer throws away: the reconstruction error that Token Pooling minimises."""

import math

import torch
from torch import Tensor

from ..core.blocks import run_blocks
from ..core.tokens import Tokens
from ..models.msvit import MSViT


def nearest_error(x: Tensor, centres: Tensor) -> float:
    """Return sum_i min_j |x_i - c_j|² of `[N, C]` by `[K, C]`."""
    return math.nan if not len(centres) else torch.cdist(x, centres).square().amin(1).sum().item()


@torch.no_grad()
def reconstruction_errors(model: MSViT, images: Tensor) -> Tensor:
    """Return `nearest_error` of the patch tokens at each layer of the model's reducer, as a share of their variance.

    Returns:
        `[layers, B]`; zero where the reducer left the tokens as they were.
    """
    reducer, prefix = model.reducer, model.vit.num_prefix_tokens
    errors = torch.zeros(len(reducer.layers), len(images))

    def watch(layer: int, before: Tokens, after: Tokens):
        parts = [tokens.x.float().split(tokens.layout.lengths) for tokens in (before, after)]
        for picture, (x, centres) in enumerate(zip(*parts, strict=True)):
            spread = (x[prefix:] - x[prefix:].mean(0)).square().sum().item()
            lost = nearest_error(x[prefix:], centres[prefix:])
            errors[reducer.layers.index(layer), picture] = lost / spread if spread else 0.0

    run_blocks(model.vit, model.tokenize(images, model.decide(images), "packed"), reducer, watch=watch)
    return errors
