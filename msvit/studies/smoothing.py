"""Attention as a low-pass filter of tokens (Marin et al. 2021, section 3), measured in a trained backbone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.blocks import after_attention, before_attention, mlp
from ..core.rotary import make_rotary, rotate, turn_of
from ..models.msvit import MSViT


class Smoothing(NamedTuple):
    """What attention does to patch tokens in each block; means over pictures.

    Attributes:
        response: `[depth, F]`, the amplitude of A v over that of v at spatial frequency f = 0 ... F-1.
        singular: `[depth, N]`, singular values of A, falling; mean over the heads.
        similarity: `[depth, 3]`, mean cosine of two patch tokens of a picture: before the block, after its attention,
            after its MLP.
    """

    response: Tensor
    singular: Tensor
    similarity: Tensor


@torch.no_grad()
def measure_smoothing(model: MSViT, images: Tensor) -> Smoothing:
    """Return what each block's attention A does to the values v of pictures `[B, 3, H, W]`, all tokens fine.

    A low-pass filter has a response that falls with the frequency, and singular values that fall fast; tokens become
    more alike.
    """
    tokens = model.tokenize(images, model.decide(images, model.all_fine(images.shape[-2:])), "packed")
    layout, rows, found = tokens.layout, tokens.x, []
    grid, prefix, rotary = tokens.where.shape[1:], model.vit.num_prefix_tokens, make_rotary(model.vit)

    def likeness() -> Tensor:
        return mean_cosine(layout.pad(rows)[:, prefix:])

    for layer, block in enumerate(model.vit.blocks):
        cosines = [likeness()]
        normed, *parts, v = before_attention(block, rows)
        turn = turn_of(rotary, layer, tokens)
        q, k, v = (layout.pad(part).transpose(1, 2) for part in (*(rotate(part, turn) for part in parts), v))
        shares = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        out = shares @ v
        before, after = (amplitudes(part[:, :, prefix:].unflatten(2, grid)) for part in (v, out))
        rows = after_attention(block, rows, normed, layout.unpad(out.transpose(1, 2)), layout)
        cosines.append(likeness())
        rows = mlp(block, rows, layout)
        cosines.append(likeness())
        found.append((after / before, torch.linalg.svdvals(shares).mean((0, 1)), torch.stack(cosines)))
    return Smoothing(*(torch.stack(part) for part in zip(*found, strict=True)))


def amplitudes(maps: Tensor) -> Tensor:
    """Return the root mean square of the Fourier amplitudes of maps `[..., H, W, D]` at frequency 0 ... F-1.

    A frequency is the rounded length of (cycles down, cycles across); those that only the diagonals have are left out.
    """
    height, width = maps.shape[-3:-1]
    down, across = (torch.fft.fftfreq(n, 1 / n, device=maps.device) for n in (height, width))
    ring = (down[:, None] ** 2 + across**2).sqrt().round().long().flatten()
    power = torch.fft.fft2(maps, dim=(-3, -2)).abs().square().flatten(-3, -2)
    power = power.movedim(-2, -1).flatten(0, -2).mean(0)
    count = min(height, width) // 2 + 1
    sums = power.new_zeros(int(ring.max()) + 1).index_add(0, ring, power)
    return (sums / ring.bincount(minlength=len(sums)))[:count].sqrt()


def mean_cosine(x: Tensor) -> Tensor:
    """Return the mean cosine of two different tokens of `[B, N, C]`, over pairs and pictures.

    sum over i != j of u_i . u_j = |sum u_i|² - N, of N unit vectors u.
    """
    n, unit = x.shape[1], F.normalize(x, dim=-1)
    return ((unit.sum(1).square().sum(-1) - n) / (n * (n - 1))).mean()
