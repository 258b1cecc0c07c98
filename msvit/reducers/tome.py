"""ToMe (Bolya et al. 2023, "Token Merging: Your ViT But Faster")."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import in_interval, one_of
from ..core.attention import Layout
from ..core.precision import in_full
from ..core.tokens import Tokens
from .base import Reducer, merge

ORDERS = ("published", "picture")


class ToMe(Reducer):
    """Merges the r most similar pairs of tokens in every block, between attention and MLP.

    Bipartite soft matching on the keys (mean over the heads): tokens with even numbers are in set A, those with odd
    ones in B; each of A has an edge to the most similar of B, and the r best edges merge. Tokens merge as the mean
    weighted by their sizes, and from then on a token of size s counts s times as a key (proportional attention).

    Prefix tokens never merge. Afterwards a picture has its prefix tokens, the others of A that stayed, and the others
    of B, and the next block numbers them so: as many neighbours as not meet in one set there.

    Args:
        r: Tokens to lose in a layer, at most half of its patch tokens. A list has a number for each of the layers; if
            it is short, zeros follow.
        inflect: The slope of a schedule: layer i of L loses int(a + (2 r - 2 a) i / (L - 1)), a = int(r (1 - inflect)).
            -1 is the paper's decreasing schedule, from 2 r to nothing; 0 is r in every layer.
        prop_attn: Off, a merged token counts once as a key; sizes still weigh the means.
        order: "picture" leaves the tokens in the picture's order, so that A and B stay a checkerboard's colours.
        layers: By default every block.
    """

    needs = "keys"

    def __init__(
        self,
        vit: nn.Module,
        r: int | Sequence[int] = 13,
        inflect: float = 0.0,
        prop_attn: bool = True,
        order: str = "published",
        layers: Sequence[int] | None = None,
    ):
        super().__init__(vit, range(len(vit.blocks)) if layers is None else layers)
        numbers = list(r) if isinstance(r, Sequence) and not isinstance(r, str) else [r]
        if bad := [n for n in numbers if not isinstance(n, int) or isinstance(n, bool) or n < 0]:
            raise ValueError(f"r={bad[0]!r}: the tokens to merge in a layer are a whole number; use 0, 8, 13 …")
        in_interval("inflect", inflect, "[-1, 1]")
        if numbers != [r] and (inflect or len(numbers) > len(self.layers)):
            raise ValueError(
                f"r={r}, inflect={inflect}: a list has one number for each of the layers {list(self.layers)} at most, "
                "and is no schedule; use one number with inflect"
            )
        if numbers == [r]:
            numbers = schedule(r, inflect, len(self.layers))
        numbers += [0] * (len(self.layers) - len(numbers))
        self.r = dict(zip(self.layers, numbers, strict=True))
        self.proportional, self.order = prop_attn, one_of("order", order, ORDERS)
        self.key_width = vit.blocks[0].attn.head_dim

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        return tokens - ((tokens - self.prefix) // 2).clamp(max=self.r[layer])

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        pairs = (tokens + 1) // 2 * (tokens // 2) * self.key_width
        return pairs.where(self.count(layer, tokens) < tokens, torch.zeros_like(tokens))

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        layout = tokens.layout
        lengths = self.lengths(layer, layout)
        if lengths == layout.lengths:
            return tokens
        merging = layout.pad((layout.position >= self.prefix).float()) > 0
        r = [old - new for old, new in zip(layout.lengths, lengths, strict=True)]
        target = match(layout.pad(seen), merging, torch.tensor(r, device=merging.device))
        places = torch.arange(target.shape[1], device=target.device)
        if self.order == "published":
            lead, rest = places[: self.prefix], places[self.prefix :]
            places = torch.cat([lead, rest[self.prefix % 2 :: 2], rest[1 - self.prefix % 2 :: 2]])
        return merge_by_size(tokens, target, lengths, places)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={list(self.r.values())}, order={self.order}"


def schedule(r: int, inflect: float, layers: int) -> list[int]:
    """Return how many tokens each layer loses on a line through r in the middle, rounded down."""
    first = int(r * (1.0 - inflect))
    step = (2 * r - first - first) / max(layers - 1, 1)
    return [int(first + step * i) for i in range(layers)]


def merge_by_size(tokens: Tokens, target: Tensor, lengths: list[int], places: Tensor) -> Tokens:
    """Merge tokens as the mean weighted by their sizes.

    Args:
        target: `[B, N]`, the token into which each goes, counted in its picture; its own number where it stays.
        lengths: New rows per picture.
        places: `[N]`, the numbers in the order in which those that stay shall stand.
    """
    layout = tokens.layout
    present = layout.pad(torch.ones(len(tokens.x), device=target.device)) > 0
    stays = (target == torch.arange(target.shape[1], device=target.device)) & present
    number = torch.empty_like(target)
    number[:, places] = stays[:, places].cumsum(1) - 1
    into = layout.unpad(number.gather(1, target)) + Layout(lengths, target.device).ends[layout.picture]
    return merge(replace(tokens, size=tokens.sizes), into, lengths, weight=tokens.sizes)


@torch.no_grad()
def match(keys: Tensor, merging: Tensor, r: Tensor) -> Tensor:
    """Match softly in two sets: return the token into which each goes, `[B, N]`; its own number where it stays.

    Args:
        keys: `[B, N, D]`; similar is what has a large cosine. Of equals, the first.
        merging: `[B, N]`, the tokens that may merge.
        r: `[B]`, how many shall.
    """
    keys = F.normalize(in_full(keys), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):
        similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    allowed = merging[:, ::2, None] & merging[:, None, 1::2]
    best, partner = similarity.masked_fill(~allowed, -torch.inf).max(2)
    order = best.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(order.shape[1], device=order.device) < r[:, None]
    merged = torch.zeros_like(first).scatter(1, order, first)
    target = torch.arange(keys.shape[1], device=keys.device).repeat(len(keys), 1)
    target[:, ::2] = torch.where(merged, 2 * partner + 1, target[:, ::2])
    return target


@torch.no_grad()
def most_similar(
    x: Tensor, layout: Layout, order: Tensor, first: int, left: list[int], found: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Match what stands behind others in an order: return its rows, for each the most similar of those, and the cosine.

    Args:
        x: `[T, C]`.
        order: `[B, Nmax]`, positions of each picture's rows, see `ranked`.
        first, left, found: The rows at places `left` to `found` are matched with those at `first` to `left`.
    """
    sources, given = _rows(layout, order, left, found)
    targets, taken = _rows(layout, order, [first] * len(left), left)
    x = F.normalize(in_full(x), dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        similarity = x[sources] @ x[targets].transpose(1, 2)
    cosine, best = similarity.masked_fill(~taken[:, None], -torch.inf).max(2)
    return sources[given], targets.gather(1, best)[given], cosine[given]


def _rows(layout: Layout, order: Tensor, first: list[int], last: list[int]) -> tuple[Tensor, Tensor]:
    """Return the rows at places first to last of an order, `[B, most]`, and where there is one."""
    begin, end = (torch.tensor(part, device=order.device)[:, None] for part in (first, last))
    most = max(b - a for a, b in zip(first, last, strict=True))
    places = begin + torch.arange(most, device=order.device)
    rows = order.gather(1, places.clamp(max=order.shape[1] - 1)) + layout.ends[:-1, None]
    return rows.clamp(max=len(layout.picture) - 1), places < end
