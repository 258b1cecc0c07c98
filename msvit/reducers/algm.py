"""ALGM (Norouzi et al. 2024, "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation")."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import one_of
from ..core.blocks import run_blocks
from ..core.precision import in_full
from ..core.tokens import Tokens
from .base import Reducer, merge
from .pruning import groups_by_cell


class ALGM(Reducer):
    """Merges what is alike, in small windows in the first layer and all over the picture later, as far as it is alike.

    Both steps act on the tokens x between attention and MLP, and compare cosines with the threshold tau:

        local:   the m tokens of a k x k window merge where  mean over i != j of cos(x_i, x_j) >= tau
        global:  every second token is in set A, the others are in B; i of A merges with its most similar j of B where
                 cos(x_i, x_j) >= tau

    Merged tokens are the mean of the patches that they cover; each counts once as a key. The paper's tau is the mean
    plus a standard deviation of the windows' similarities on the training pictures: `training_threshold`.

    As in the authors' code, the local step puts windows that merged, the most similar first, before what is left, which
    decides who is in A, and the global step puts A before B. Unlike there, where all pictures of a batch merge as much
    as the one that merges least, each picture is on its own. A coarse token is alone in its window if it fills it; a
    token that covers several windows takes part in that of its first patch.

    Args:
        threshold: tau. The authors use .90, .88, .94 and .95 for ViT-Ti, S, B and L on ADE20K.
        layers: The first merges locally, all others globally. By default the first block and that at a third of the
            depth: the 1st and 5th of 12, as the authors have them.
        window: k.
        global_threshold: "same" is tau, as in the paper. "picture" is what the authors' code has: mean + std / l of the
            cosines of A with their most similar of B, in each picture, l being the number of the block, from 1.
    """

    adaptive = True

    def __init__(
        self,
        vit: nn.Module,
        threshold: float = 0.88,
        layers: Sequence[int] | None = None,
        window: int = 2,
        global_threshold: str = "same",
    ):
        super().__init__(vit, sorted({0, len(vit.blocks) // 3}) if layers is None else layers)
        if isinstance(threshold, bool | str) or not threshold >= -1:
            raise ValueError(
                f"threshold={threshold!r}: a cosine from which tokens merge, such as 0.88; over 1, none do"
            )
        if not isinstance(window, int) or window < 2:
            raise ValueError(f"window={window!r}: a window is a whole number of fine patches wide; use 2, 3, 4 …")
        one_of("global_threshold", global_threshold, ("same", "picture"))
        self.threshold, self.window, self.global_threshold = threshold, window, global_threshold

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the MACs of the products of A with B; a window's are sums of squares, without any."""
        if layer == self.layers[0]:
            return torch.zeros_like(tokens)
        return (tokens + 1) // 2 * (tokens // 2) * self.width

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        target, rank = self._local(tokens) if layer == self.layers[0] else self._global(layer, tokens)
        return join_targets(tokens, target, rank)

    @torch.no_grad()
    def _local(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the row into which each goes, `[T]`, and the ranks: prefix, windows by similarity, the rest."""
        group, similarity = window_similarities(tokens, self.window)
        row = torch.arange(len(group), device=group.device)
        first = row.new_full((len(similarity),), len(group)).scatter_reduce(0, group, row, "amin")
        merging = (similarity >= self.threshold)[group]
        rank = similarity[group].masked_fill(~merging, -torch.inf)
        return first[group].where(merging, row), rank.masked_fill(tokens.layout.position < self.prefix, torch.inf)

    @torch.no_grad()
    def _global(self, layer: int, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the row into which each goes, `[T]`, and the ranks: prefix, what is left of A, B."""
        layout = tokens.layout
        best, partner = most_similar(tokens, self.prefix)
        row, source = torch.arange(len(best), device=best.device), best > -torch.inf
        threshold = self.threshold
        if self.global_threshold == "picture":
            count = layout.sum(source.to(best.dtype))
            zero = torch.zeros_like(best)
            mean = layout.sum(best.where(source, zero)) / count.clamp(min=1)
            square = layout.sum((best - mean[layout.picture]).square().where(source, zero))
            threshold = (mean + (square / (count - 1).clamp(min=1)).sqrt() / (layer + 1))[layout.picture]
        rank = (layout.position % 2 == 0).to(best.dtype).masked_fill(layout.position < self.prefix, torch.inf)
        return partner.where(source & (best >= threshold), row), rank


def window_similarities(tokens: Tokens, window: int) -> tuple[Tensor, Tensor]:
    """Return the window of each token, `[T]`, and the mean cosine of different tokens in each; -inf where one is alone.

    With unit vectors u: sum over i != j of u_i . u_j = |sum_i u_i|² - sum_i |u_i|².
    """
    group, unit = groups_by_cell(tokens, window), _unit(tokens)
    windows = int(group.max()) + 1
    members = unit.new_zeros(windows).index_add(0, group, torch.ones_like(unit[:, 0]))
    total = unit.new_zeros(windows, unit.shape[1]).index_add(0, group, unit).square().sum(1)
    own = unit.new_zeros(windows).index_add(0, group, unit.square().sum(1))
    pairs = (members * (members - 1)).masked_fill(members < 2, 1)
    return group, ((total - own) / pairs).masked_fill(members < 2, -torch.inf)


def most_similar(tokens: Tokens, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the cosine of each token with even number and its most similar one with odd number, and that one's row.

    Both `[T]`. Prefix tokens and those with odd numbers have -inf, and so has everything that finds no partner.
    """
    layout, unit = tokens.layout, _unit(tokens)
    best, partner = unit.new_full((len(unit),), -torch.inf), torch.arange(len(unit), device=unit.device)
    together = layout.uniform or unit.is_cuda
    parts = [layout.pad(unit)] if together else [part[None] for part in layout.split(unit)]
    starts = [layout.ends[:-1]] if together else layout.ends[:-1].split(1)
    lengths = torch.tensor(layout.lengths, device=unit.device).split([len(part) for part in parts])
    for part, start, n in zip(parts, starts, lengths, strict=True):
        number = torch.arange(part.shape[1], device=unit.device)
        merging = (number >= prefix) & (number < n[:, None])
        if part.shape[1] < 2:
            continue
        with torch.autocast(unit.device.type, enabled=False):
            cosine = part[:, ::2] @ part[:, 1::2].transpose(1, 2)
        highest, which = cosine.masked_fill(~merging[:, None, 1::2], -torch.inf).max(2)
        rows = (start[:, None] + number[::2])[merging[:, ::2]]
        best[rows] = highest[merging[:, ::2]]
        partner[rows] = (start[:, None] + 2 * which + 1)[merging[:, ::2]]
    return best, partner


def join_targets(tokens: Tokens, target: Tensor, rank: Tensor) -> Tokens:
    """Merge each token into the row `target` `[T]`; what stays is put in the order of falling ranks `[T]`."""
    row = torch.arange(len(target), device=target.device)
    staying = row[target == row]
    staying = staying[rank[staying].sort(descending=True, stable=True).indices]
    picture = tokens.layout.picture[staying]
    staying = staying[picture.sort(stable=True).indices]
    number = torch.empty_like(row).index_copy(0, staying, row[: len(staying)])
    lengths = torch.bincount(picture, minlength=len(tokens.layout.lengths)).tolist()
    return merge(tokens, number[target], lengths, weight=tokens.area.clamp(min=1))


@torch.no_grad()
def training_threshold(model: nn.Module, loader: Iterable, window: int = 2) -> float:
    """Return the paper's tau: mean + standard deviation of the similarities in the windows of a loader's pictures.

    They are those of a `MSViT` in the first block, all tokens fine. The loader yields pictures, or tuples that begin
    with them.
    """
    found: list[Tensor] = []

    def watch(layer: int, before: Tokens, after: Tokens):
        similarities = window_similarities(before, window)[1]
        found.append(similarities[similarities > -torch.inf])

    everything = ALGM(model.vit, threshold=-1.0, layers=[0], window=window)  # what is behind the first block is cheap
    with model.evaluating():
        for batch in loader:
            images = (batch if isinstance(batch, Tensor) else batch[0]).to(model.cut.device)
            fine = model.all_fine(images.shape[-2:])
            run_blocks(model.vit, model.tokenize(images, model.decide(images, fine)), everything, watch=watch)
    if not found:
        raise ValueError("the loader is empty; give the training pictures")
    similarities = torch.cat(found)
    return (similarities.mean() + similarities.std()).item()


def _unit(tokens: Tokens) -> Tensor:
    """Return the embeddings as unit vectors, in float32 or better: rounding would decide what is alike."""
    x = tokens.x.detach()
    return F.normalize(in_full(x), dim=-1)
