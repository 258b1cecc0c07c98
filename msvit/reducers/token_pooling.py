"""Token Pooling (Marin et al. 2021, "Token Pooling in Vision Transformers")."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import one_of
from ..core.attention import Layout
from ..core.precision import in_full
from ..core.tokens import Tokens
from .base import Keeping, merge


class TokenPooling(Keeping):
    """Between attention and MLP, patch tokens become the K cluster centres that lose least:

        minimise over c, a:   sum_i w_i |x_i - c_a(i)|²

    by K-means (centres are weighted means) or K-medoids (centres are tokens), with w = 1 or w = significance, the
    attention that a token receives. Both begin with the K most significant tokens, and no step makes the sum larger.

    A centre to which no token is nearest stays at the token it began with and covers no pixel.

    Args:
        keep: K as a share of the patch tokens that are there, for all layers or one for each.
        clusters: K itself for each layer, in place of `keep`; a picture with fewer tokens keeps them all.
        method: "kmeans" or "kmedoids".
        weighted: Whether w is the significance.
        iterations: Assignments to the nearest centre; between them the centres move.
    """

    needs = "received"

    def __init__(
        self,
        vit: nn.Module,
        keep: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        clusters: Sequence[int] | None = None,
        method: str = "kmeans",
        weighted: bool = True,
        iterations: int = 3,
    ):
        super().__init__(vit, keep, layers)
        one_of("method", method, ALGORITHMS)
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations={iterations!r}: tokens are assigned once at least")
        self.keep_numbers("clusters", clusters)
        self.method, self.weighted, self.iterations = method, weighted, iterations

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the MACs of the products x_i . x_j, from which all else follows."""
        n = tokens - self.prefix
        return (n**2 * self.width).where(self.kept(layer, n) < n, torch.zeros_like(n))

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        layout = tokens.layout
        lengths = self.lengths(layer, layout)
        if lengths == layout.lengths:
            return tokens
        device = seen.device
        significance = layout.pad(seen.clamp(min=1e-12))[:, self.prefix :]
        counts = torch.tensor(lengths, device=device) - self.prefix
        most, n = max(lengths) - self.prefix, significance.shape[1]
        beyond = torch.arange(most, device=device) >= counts[:, None]
        # The most significant, in the picture's order; of equals, the first. What is beyond `counts` means nothing.
        order = significance.sort(dim=1, descending=True, stable=True).indices[:, :most]
        start = order.masked_fill(beyond, n).sort(1).values.clamp(max=n - 1)
        weight = significance if self.weighted else (significance > 0).to(significance.dtype)
        x = layout.pad(tokens.x.detach())[:, self.prefix :]
        beyond = None if min(lengths) == max(lengths) else beyond
        assignment, centre = ALGORITHMS[self.method](x, weight, start, beyond, self.iterations)

        lead = torch.arange(self.prefix, device=device).expand(len(x), -1)
        local = torch.cat([lead, assignment + self.prefix], 1)
        into = layout.unpad(local) + Layout(lengths, device).ends[layout.picture]
        seeds = torch.cat([lead, centre + self.prefix], 1) + layout.ends[:-1, None]
        seeds = seeds.flatten() if beyond is None else seeds[~F.pad(beyond, (self.prefix, 0))]
        weight = F.pad(weight, (self.prefix, 0), value=1)
        merged = merge(tokens, into, lengths, layout.unpad(weight), seeds=seeds)
        if self.method == "kmeans":
            return merged
        return replace(merged, x=tokens.x[seeds], centre=None if tokens.centre is None else tokens.centre[seeds])


@torch.no_grad()
def kmeans(x: Tensor, weight: Tensor, start: Tensor, beyond: Tensor | None, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster x `[B, N, C]` by weighted K-means, all pictures at once: each token's cluster `[B, N]`, and `start`.

    Of equally near centres the first has the token.

    A centre is a mean of its tokens, c_k = sum_i M_ki x_i, so that all distances follow from sums of the products
    G_ij = x_i . x_j, which are computed once:  |x_j - c_k|² = G_jj - 2 (M G)_kj + sum_i M_ki (M G)_ki.

    Args:
        weight: `[B, N]`, 0 where there is no token.
        start: `[B, K]`, the tokens that are the first centres.
        beyond: `[B, K]`, the centres that a picture does not have; None if it has all.
        iterations: Assignments; the centres move between them. The last move is the caller's.
    """
    gram = _products(x)
    first = gram[torch.arange(len(x), device=x.device)[:, None], start]
    first_norm = gram.diagonal(dim1=1, dim2=2).gather(1, start)
    weight, clusters = weight.to(gram.dtype), start.shape[1]
    weighted = gram * weight[..., None]
    assignment = _nearest(first, first_norm, beyond)
    for _ in range(iterations - 1):
        total = _sums(weight, assignment, clusters)
        share = total.clamp(min=1e-30)
        inner = _sums(weighted, assignment, clusters) / share[..., None]
        own = inner.gather(1, assignment[:, None])[:, 0]
        norm = _sums(weight * own, assignment, clusters) / share
        found = total > 0
        assignment = _nearest(inner.where(found[..., None], first), norm.where(found, first_norm), beyond)
    return assignment, start


def _sums(values: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """Sum values `[B, N, ...]` of tokens over each cluster, `[B, clusters, ...]`."""
    b = len(values)
    into = assignment + clusters * torch.arange(b, device=values.device)[:, None]
    sums = values.new_zeros(b * clusters, *values.shape[2:])
    return sums.index_add_(0, into.flatten(), values.flatten(0, 1)).unflatten(0, (b, clusters))


@torch.no_grad()
def kmedoids(x: Tensor, weight: Tensor, start: Tensor, beyond: Tensor | None, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster by weighted K-medoids, with the arguments of `kmeans`: each token's cluster, and the medoids `[B, K]`.

    A cluster's centre is that of its tokens whose weighted sum of squared distances to the others is smallest, the
    first of equals. The last assignment is to the last medoids.
    """
    gram = _products(x)
    norm = gram.diagonal(dim1=1, dim2=2)
    # Exactly symmetric, so that the two tokens of a pair are equally good and the first becomes the medoid.
    distance = (norm[:, :, None] + norm[:, None] - (gram + gram.transpose(1, 2))).clamp_(min=0)
    clusters = start.shape[1]
    numbers = torch.arange(clusters, device=x.device)
    weighted, centre = distance * weight.to(gram.dtype)[..., None], start

    def nearest() -> Tensor:
        return _first_nearest(distance.gather(1, centre[..., None].expand(-1, -1, x.shape[1])), beyond)

    assignment = nearest()
    for _ in range(iterations - 1):
        cost = _sums(weighted, assignment, clusters).gather(1, assignment[:, None])[:, 0]
        member = (assignment[:, None] == numbers[:, None]) & (weight > 0)[:, None]
        medoid = cost[:, None].expand_as(member).masked_fill(~member, torch.inf).argmin(2)
        centre = torch.where(member.any(2), medoid, centre)
        assignment = nearest()
    return assignment, centre


def _products(x: Tensor) -> Tensor:
    """Return x_i . x_j, `[B, N, N]`, in float32 or better: rounding would decide who is nearest."""
    x = in_full(x)
    with torch.autocast(x.device.type, enabled=False):
        return x @ x.transpose(1, 2)


def _nearest(inner: Tensor, norm: Tensor, beyond: Tensor | None) -> Tensor:
    """Return each token's nearest centre from the products with them `[B, K, N]` and their squared norms `[B, K]`."""
    return _first_nearest(torch.add(norm[..., None], inner, alpha=-2), beyond)


def _first_nearest(distance: Tensor, beyond: Tensor | None) -> Tensor:
    """Return the centre `[B, N]` of the smallest distance `[B, K, N]`, the first of equals, but for those beyond."""
    distance = distance if beyond is None else distance.masked_fill(beyond[..., None], torch.inf)
    return distance.min(1).indices  # many times as fast on a CPU as argmin


ALGORITHMS = {"kmeans": kmeans, "kmedoids": kmedoids}
