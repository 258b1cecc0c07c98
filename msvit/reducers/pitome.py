"""PiToMe (Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging")."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.precision import in_full
from ..core.tokens import Tokens
from .base import Keeping
from .tome import merge_by_size


class PiToMe(Keeping):
    """Merges tokens that have many like them, and protects the others, in every block between attention and MLP.

    With the keys k (mean over the heads) of a picture's n patch tokens, the energy of a token is

        E_i = mean over j of f(cos(k_i, k_j)),   f(x) = x (x >= m),  alpha (exp(x - m) - 1) (x < m),

    m = 0.9 - 0.9 l / L in block l of L, alpha = 1. Of the 2 K = 2 floor(n - keep n) tokens of the most energy, the 1st,
    3rd, 5th … are set A, the others B; each of A merges into the most similar of B. Tokens merge as the mean weighted
    by their sizes, and from then on a token of size s counts s times as a key. Prefix tokens take no part.

    Args:
        keep: The share of patch tokens that a layer leaves, for all layers or one for each; half of them at least stay.
        layers: By default every block.
    """

    needs = "keys"
    MARGIN, ALPHA = 0.9, 1.0

    def __init__(self, vit: nn.Module, keep: float | Sequence[float] = 0.9, layers: Sequence[int] | None = None):
        super().__init__(vit, keep, range(len(vit.blocks)) if layers is None else layers)
        self.key_width = vit.blocks[0].attn.head_dim

    def kept(self, layer: int, patches: Tensor) -> Tensor:
        n = patches.double()
        return patches - (n - n * self.keep[layer]).floor().long().minimum(patches // 2)

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        n = tokens - self.prefix
        return (n**2 * self.key_width).where(self.kept(layer, n) < n, torch.zeros_like(n))

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        layout = tokens.layout
        lengths = self.lengths(layer, layout)
        if lengths == layout.lengths:
            return tokens
        pairs = torch.tensor(layout.lengths) - torch.tensor(lengths)
        present = layout.pad((layout.position >= self.prefix).float())[:, self.prefix :] > 0
        margin = self.MARGIN * (1 - layer / self.depth)
        keys = layout.pad(seen)[:, self.prefix :]
        target = match_energy(keys, present, pairs.to(keys.device), margin, self.ALPHA) + self.prefix
        places = torch.arange(self.prefix + keys.shape[1], device=keys.device)
        lead = places[: self.prefix].expand(len(keys), -1)
        return merge_by_size(tokens, torch.cat([lead, target], 1), lengths, places)


def energy(similarity: Tensor, present: Tensor, margin: float, alpha: float) -> Tensor:
    """Return the energies `[B, N]` of tokens by their cosines `[B, N, N]`, over those that are `present` `[B, N]`."""
    near = torch.where(similarity >= margin, similarity, alpha * (similarity - margin).expm1())
    return near.masked_fill(~present[:, None], 0).sum(2) / present.sum(1, keepdim=True)


@torch.no_grad()
def match_energy(keys: Tensor, present: Tensor, pairs: Tensor, margin: float, alpha: float) -> Tensor:
    """Return the token into which each goes, `[B, N]`; its own number where it stays. Of equals, the first.

    Args:
        keys: `[B, N, D]`.
        present: `[B, N]`, where there is a token.
        pairs: `[B]`, how many tokens shall merge into others.
    """
    keys = F.normalize(in_full(keys), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):
        similarity = keys @ keys.transpose(1, 2)
    energies = energy(similarity, present, margin, alpha).masked_fill(~present, -torch.inf)
    order = energies.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(keys.shape[1], device=keys.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    merging = rank < 2 * pairs[:, None]
    giving, taking = merging & (rank % 2 == 0), merging & (rank % 2 == 1)
    partner = similarity.masked_fill(~taking[:, None], -torch.inf).max(2).indices
    return torch.where(giving, partner, places)
