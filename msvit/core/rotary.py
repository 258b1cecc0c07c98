"""Rotary positions for tokens anywhere in a picture: timm's rotary modules, read as functions of a token's centre."""

import math
from typing import NamedTuple

import torch
from timm.layers import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from torch import Tensor, nn

from .precision import in_full
from .tokens import Tokens

ROTARY_KINDS = {  # by timm's names
    RotaryEmbeddingCat: "cat",
    RotaryEmbeddingMixed: "mixed",
    RotaryEmbeddingDinoV3: "dinov3",
    RotaryEmbeddingMRope: "mrope",
}


class Turn(NamedTuple):
    """Cosines and sines of the rows' angles, `[T, 1 or H, D / 2]`, in the planes (i, i + D / 2) or (2 i, 2 i + 1)."""

    cos: Tensor
    sin: Tensor
    half: bool


class Rotary:
    """How queries and keys are rotated (Su et al. 2021, "RoFormer"; in pictures Heo et al. 2024), for one forward pass.

    A token whose centre is c = (row, column), in fine patches from the upper left corner, has the coordinates t(c), and
    its queries and keys are rotated in D / 2 planes by the angles

        a_i = t_row(c) F_row,i + t_column(c) F_column,i

    so that q . k depends on where one token is as seen from the other. A fine patch, which has its centre at
    (r + 1/2, c + 1/2), gets what timm gives it, and a larger or merged token what its centre has. Prefix tokens, which
    have no extent, are not rotated. Kinds:

        axial ("cat": EVA-02, Perception Encoder)   t = c - 1/2 + offset, times ref / grid where there is a reference
                                                    grid; each frequency is of one axis
        "mrope"                                     the same; frequencies of rows and columns interleaved
        "dinov3"                                    t = 2 (c + offset) / grid - 1, in [-1, 1] whatever the size
        "mixed" (RoPE-ViT)                          t = c - 1/2; learned frequencies of each block and head, along both

    While training, timm may shift and stretch the coordinates at random; they are drawn once for a pass.
    """

    def __init__(self, rope: nn.Module):
        self.rope, self.per_block = rope, type(rope) is RotaryEmbeddingMixed
        self.half = type(rope) is RotaryEmbeddingMRope or getattr(rope, "rotate_half", False)
        frequencies = in_full(_frequencies(rope))
        if rope.grid_indexing == "xy":
            frequencies = frequencies.flip(0)
        self.frequencies = frequencies
        self._drawn = _draw(rope, frequencies) if rope.training and rope.aug_active else None
        self._turned: tuple[Tensor | None, Turn | None] = (None, None)

    def turn(self, layer: int, tokens: Tokens) -> Turn:
        """Return the rotation of tokens in a block; where all blocks have the same, it is computed once."""
        if self.per_block:
            return self._turn(tokens, self.frequencies[:, layer])
        if self._turned[0] is not tokens.centre:
            self._turned = tokens.centre, self._turn(tokens, self.frequencies[:, None])
        return self._turned[1]

    def _turn(self, tokens: Tokens, frequencies: Tensor) -> Turn:
        """Return the rotation by frequencies `[2, 1 or H, D / 2]`."""
        t = self.coordinates(tokens).to(frequencies.dtype)[:, :, None, None]
        angles = t[:, 0] * frequencies[0] + t[:, 1] * frequencies[1]
        angles = angles.masked_fill((tokens.extent[:, 0] == 0)[:, None, None], 0)
        return Turn(angles.cos(), angles.sin(), self.half)

    def coordinates(self, tokens: Tokens) -> Tensor:
        """Return t of rows and columns, `[T, 2]`."""
        rope, centre = self.rope, tokens.centre
        grid = tokens.grids.to(centre.dtype).index_select(0, tokens.layout.picture)
        kind = "centered" if type(rope) is RotaryEmbeddingDinoV3 else getattr(rope, "grid_type", "index")
        offset, reference = getattr(rope, "grid_offset", 0.0), getattr(rope, "ref_feat_shape", None)
        if kind == "centered":
            t = (centre + offset) / _norm(grid, rope.normalize_coords)
        elif kind == "pixel":
            t = 2 * (centre - 0.5) / (grid - 1).clamp(min=1) - 1
        else:
            t = centre - 0.5 + offset
        if reference is not None:
            t = t / grid * grid.new_tensor(reference)
        t = 2 * t - 1 if kind == "centered" else t
        if self._drawn is not None:
            shift, stretch = (part.to(t.dtype) for part in self._drawn)
            t = (t + shift) * stretch
        return t


def make_rotary(vit: nn.Module) -> Rotary | None:
    """Return how a backbone rotates queries and keys; None if it does not."""
    rope = getattr(vit, "rope", None)
    return None if rope is None else Rotary(rope)


def check_rotary(rope: nn.Module | None):
    """Raise a ValueError that says what would work, unless a rotary module is one that is known here."""
    if rope is not None and type(rope) not in ROTARY_KINDS:
        known = ", ".join(f"{name!r} ({kind.__name__})" for kind, name in ROTARY_KINDS.items())
        raise ValueError(
            f"rotary positions of the kind {type(rope).__name__} are not known; build the backbone with rope_type= "
            f"one of {known}"
        )


def turn_of(rotary: Rotary | None, layer: int, tokens: Tokens) -> Turn | None:
    """Return the rotation of tokens in a block; None where the backbone has none."""
    return None if rotary is None else rotary.turn(layer, tokens)


def rotate(x: Tensor, turn: Turn | None) -> Tensor:
    """Return queries or keys `[T, H, D]` rotated, or as they are where there is no rotation."""
    if turn is None:
        return x
    a, b = x.chunk(2, -1) if turn.half else (x[..., ::2], x[..., 1::2])
    parts = a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin
    return (torch.cat(parts, -1) if turn.half else torch.stack(parts, -1).flatten(-2)).to(x.dtype)


def _frequencies(rope: nn.Module) -> Tensor:
    """Return F by the axes as timm counts them, `[2, D / 2]`, or of each block and head `[2, depth, H, D / 2]`."""
    if type(rope) is RotaryEmbeddingMixed:
        return rope.freqs
    if type(rope) is RotaryEmbeddingMRope:
        return torch.stack([rope.inv_freq * (rope.axis == axis) for axis in (1, 2)])
    bands = 2 * math.pi / rope.periods if type(rope) is RotaryEmbeddingDinoV3 else rope.bands
    return torch.block_diag(bands, bands)


def _norm(grid: Tensor, by: str) -> Tensor:
    """Return by what rows and columns of pictures `[T, 2]` are divided."""
    if by == "separate":
        return grid
    return grid.amax(1, keepdim=True) if by == "max" else grid.amin(1, keepdim=True)


def _draw(rope: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a random shift of rows and columns, and by what they are stretched, both `[2]`."""

    def uniform(most: float, n: int) -> Tensor:
        return torch.empty(n, device=like.device).uniform_(-most, most)

    shift = uniform(rope.shift_coords or 0.0, 2)
    own = uniform(math.log(rope.jitter_coords or 1.0), 2)
    return shift, (own + uniform(math.log(rope.rescale_coords or 1.0), 1)).exp()
