"""What a token sees, and what a region is worth: attention, rollout, and what coarse regions cost."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.blocks import after_attention, before_attention, mlp, run_blocks
from ..core.rotary import make_rotary, rotate, turn_of
from ..models.tokenizer import Gating
from .state import State, masks_of

CHUNK = 32  # pictures that are run at once


@dataclass(frozen=True)
class Attention:
    """The attention matrices of a picture's tokens, without a reducer.

    Attributes:
        shares: `[depth, heads, N, N]`; row i is what token i takes from each token.
        where: `[H_f, W_f]`, the token of each fine patch.
        last: `[N, C]`, the tokens after the last block, before the norm.
        prefix: How many tokens stand before the patches'; the first is the class token, if there is any.
    """

    shares: Tensor
    where: Tensor
    last: Tensor
    prefix: int

    def seen(self, matrix: Tensor, patch: int) -> np.ndarray:
        """Return a row of a matrix `[N, N]` on the fine grid: of the token that covers a patch, -1: of the class token.

        Where there is no class token, the mean over all tokens stands for it.
        """
        if patch >= 0:
            row = matrix[self.where.flatten()[patch]]
        else:
            row = matrix[0] if self.prefix else matrix.mean(0)
        return row[self.where].numpy()

    def layer(self, block: int, head: int | None) -> Tensor:
        """Return the matrix of a block's head, or the mean over its heads."""
        return self.shares[block].mean(0) if head is None else self.shares[block, head]

    def rollout(self) -> Tensor:
        """Return what each token takes from each through all blocks (Abnar and Zuidema 2020).

        R = prod over the blocks of (A + 1) / 2, A the mean over heads; half is the token's own, by the skip connection.
        """
        n = self.shares.shape[-1]
        found = torch.eye(n)
        for matrix in self.shares.mean(1):
            found = (matrix + torch.eye(n)) / 2 @ found
        return found


class Worth(NamedTuple):
    """What regions are worth to the prediction, `[h, w]` each: more loss where they are coarse rather than fine.

    The loss is the cross entropy of what is predicted now; every other region stays as it is decided.

    Attributes:
        cost: The true difference, by running both.
        gradient: dL/dm, with which the gate is trained: what the difference would be if the loss were linear.
    """

    cost: np.ndarray
    gradient: np.ndarray


@torch.inference_mode()
def attention_of(state: State) -> Attention:
    """Return the attention of the state's tokens."""
    model, found = state.gated.loaded.model, []
    gating = model.decide(state.gated.pixels, masks_of(state.levels, len(model.scales) - 1))
    tokens = model.tokenize(state.gated.pixels, gating, "packed")
    layout, rows, rotary = tokens.layout, tokens.x, make_rotary(model.vit)
    for layer, block in enumerate(model.vit.blocks):
        normed, *parts, v = before_attention(block, rows)
        turn = turn_of(rotary, layer, tokens)
        q, k, v = (part.transpose(0, 1) for part in (*(rotate(part, turn) for part in parts), v))
        shares = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        rows = after_attention(block, rows, normed, (shares @ v).transpose(0, 1), layout)
        rows = mlp(block, rows, layout)
        found.append(shares)
    return Attention(torch.stack(found), tokens.where[0], rows, model.vit.num_prefix_tokens)


def worth_of(state: State) -> Worth:
    """Return what each region is worth to the prediction, truly and by the gate's gradient."""
    coarse, model, pixels = torch.from_numpy(state.coarse), state.gated.loaded.model, state.gated.pixels
    flipped = coarse ^ torch.eye(coarse.numel(), dtype=torch.bool).view(-1, *coarse.shape)
    with torch.inference_mode():
        logits = model.run(pixels, coarse).logits
        target = logits.argmax(1)
        parts = [model.run(pixels.expand(len(p), -1, -1, -1), p).logits for p in flipped.split(CHUNK)]
        other = torch.cat([_loss(part, target) for part in parts]).view(coarse.shape)
        change = other - _loss(logits, target)
    cost = torch.where(coarse, -change, change)
    return Worth(cost.numpy(), _gradient(state, target.clone()))


def _gradient(state: State, target: Tensor) -> np.ndarray:
    """Return dL/dm of each region, at the decisions as they are."""
    model, pixels = state.gated.loaded.model, state.gated.pixels.clone()  # made in inference mode, without gradients
    m = torch.from_numpy(state.coarse)[None].float().requires_grad_()
    tokens = model.tokenize(pixels, Gating(None, m, m), "masked")
    logits = model.head.logits(model.vit, run_blocks(model.vit, tokens).final, pixels.shape[-2:])
    return torch.autograd.grad(_loss(logits, target).sum(), m)[0][0].numpy()


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of each picture of a batch, `[B]`, or of its pixels' mean, against one target."""
    each = F.cross_entropy(logits.float(), target.expand(len(logits), *target.shape[1:]), reduction="none")
    return each.reshape(len(logits), -1).mean(1)
