"""The interface of the methods that drop or merge tokens inside the network, and what they share.

A reducer acts on `Tokens` at some blocks: before the block, or between its attention and its MLP. All rows of all
pictures stand in one matrix and the `Layout` knows the pictures, so everything here works for pictures of different
lengths. The prefix tokens of a picture come first, then its patches: as the picture has them, unless the reducer says
that its order is another.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.attention import Layout
from ..core.precision import in_full
from ..core.tokens import Tokens


class Teacher(NamedTuple):
    """What the dense backbone says: logits `[B, K]` and patch tokens after the last norm, `[B, H_f, W_f, C]`."""

    logits: Tensor
    tokens: Tensor


class Reducer(nn.Module):
    """Fewer tokens from some blocks on.

    Subclasses implement `reduce` on active tokens, `macs`, and `count` unless how many tokens are left depends on the
    picture. What acts before a block instead of in it implements `before_block` and `counts`.

    While a gate trains, its inactive tokens ride along untouched: reducing sees the active ones alone, as in
    evaluation, so that all executions agree; an inactive token's gradient is that of its coming back as itself. The
    activity of merged tokens is the weighted mean of theirs.

    Attributes:
        layers: Blocks at which it acts, sorted; by default those at a quarter, half and three quarters of the depth.
        lossless: Whether every pixel still has a token afterwards, as dense tasks need.
        adaptive: Whether how many tokens are left depends on the picture, and so do the MACs.
        needs: What of the block's attention `reduce` is given as `seen`: None, "received" (`[T]`, the attention that a
            token receives), "class" (`[T]`, the attention that the class token gives, with its gradient) or "keys"
            (`[T, D]`, their mean over the heads). Only the layers in `layers` compute it.
        proportional: Whether a token of size s counts s times as a key.
        needs_teacher: Whether `loss` compares with the dense backbone.
        of_entered: Whether `count` and `counts` are asked by how many tokens entered the first block, in place of how
            many came to theirs.
    """

    lossless: bool = True
    adaptive: bool = False
    needs: str | None = None
    proportional: bool = True
    needs_teacher: bool = False
    of_entered: bool = False

    def __init__(self, vit: nn.Module, layers: Sequence[int] | None = None):
        super().__init__()
        self.prefix, self.width, self.depth = vit.num_prefix_tokens, vit.embed_dim, len(vit.blocks)
        self.patches = vit.patch_embed.num_patches
        layers = {self.depth * part // 4 for part in (1, 2, 3)} if layers is None else list(layers)
        if bad := [i for i in layers if not isinstance(i, int) or not 0 <= i < self.depth]:
            raise ValueError(f"layer {bad[0]!r} is out of range; the backbone has blocks 0 to {self.depth - 1}")
        if len(set(layers)) < len(layers):
            raise ValueError(f"layers={layers} names a block twice; a reducer acts once in a block")
        self.layers = tuple(sorted(layers))

    def begin(self, progress: float):
        """Prepare a training step; `progress` is the share of the stage that is over."""

    def enter(self, tokens: Tokens) -> Tokens:
        """Return the tokens that enter the first block."""
        return tokens

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the tokens that enter a block."""
        return tokens

    def after_attention(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        """Return the tokens that a block's MLP will see; `seen` is what `needs` asks for."""
        if tokens.activity is None:
            return self.reduce(layer, tokens, seen)
        active = tokens.activity.detach() > 0.5
        rows, rest = active.nonzero()[:, 0], (~active).nonzero()[:, 0]
        counts = tokens.active_counts().tolist()
        resting = [n - c for n, c in zip(tokens.layout.lengths, counts, strict=True)]
        seen = None if seen is None else seen[rows]
        return join(self.reduce(layer, tokens.select(rows, counts), seen), tokens.select(rest, resting))

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        """Return what is left of active tokens."""
        raise NotImplementedError

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        """Return how many tokens are left of so many (int64, prefix included)."""
        raise ValueError(
            f"how many tokens {type(self).__name__} leaves depends on the picture; run the model and read Result.macs"
        )

    def counts(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens attention and MLP of a block see of so many that come to it."""
        return tokens, self.count(layer, tokens)

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the MACs, int64, of the reducer's own matrix products on so many tokens (prefix included)."""
        return torch.zeros_like(tokens)

    def loss(self, result, teacher: Teacher | None = None) -> dict[str, Tensor]:
        """Return weighted terms to add to the task's loss, by name, from a training step's `Result`."""
        return {}

    def lengths(self, layer: int, layout: Layout) -> list[int]:
        """Return `count` for the pictures of a layout, without asking the device."""
        return self.count(layer, torch.tensor(layout.lengths)).tolist()

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}"


class Keeping(Reducer):
    """A reducer that leaves the share `keep` of the patch tokens that it finds: round(keep n), at least one.

    Args:
        keep: In (0, 1], for all layers or one for each.
    """

    def __init__(self, vit: nn.Module, keep: float | Sequence[float] = 0.7, layers: Sequence[int] | None = None):
        super().__init__(vit, layers)
        shares = list(keep) if isinstance(keep, Sequence) else [keep] * len(self.layers)
        if len(shares) != len(self.layers):
            raise ValueError(f"keep={keep}: {len(shares)} ratios for {len(self.layers)} layers {list(self.layers)}")
        if bad := [k for k in shares if isinstance(k, str | bool) or not 0 < k <= 1]:
            raise ValueError(f"keep={bad[0]!r}: a keep ratio is a share in (0, 1], such as 0.7; 1 keeps every token")
        self.keep = dict(zip(self.layers, shares, strict=True))
        self.numbers: dict[int, int] | None = None

    def keep_numbers(self, name: str, numbers: Sequence[int] | None):
        """Keep so many patch tokens at each layer in place of a share, unless `numbers`, a setting's, is None."""
        if numbers is None:
            return
        if len(numbers) != len(self.layers):
            raise ValueError(f"{name}={numbers}: one number for each of the layers {list(self.layers)}")
        if bad := [n for n in numbers if not isinstance(n, int) or not 1 <= n <= self.patches]:
            raise ValueError(f"{name}={numbers}: {bad[0]!r} of {self.patches} patch tokens; use 1 to {self.patches}")
        self.numbers = dict(zip(self.layers, numbers, strict=True))

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        return self.prefix + self.kept(layer, tokens - self.prefix)

    def kept(self, layer: int, patches: Tensor) -> Tensor:
        """Return how many patch tokens are left of so many."""
        if self.numbers is not None:
            return patches.clamp(max=self.numbers[layer])
        return (patches * self.keep[layer] + 0.5).floor().long().clamp(min=1).minimum(patches)

    def top(self, layer: int, tokens: Tokens, scores: Tensor) -> Tokens:
        """Return the prefix tokens and the patch tokens with the highest scores `[T]`."""
        lengths = self.lengths(layer, tokens.layout)
        if lengths == tokens.layout.lengths:
            return tokens
        scores = scores.masked_fill(tokens.layout.position < self.prefix, torch.inf)
        return tokens.select(top_rows(tokens.layout, scores, lengths), lengths)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep={list(self.keep.values())}"


def check_lossless(reducer: Reducer | None):
    """Raise a ValueError if a reducer loses pixels that a dense task would have to label."""
    if reducer is not None and not reducer.lossless:
        raise ValueError(
            f"{type(reducer).__name__} drops tokens, so that some pixels have none, and a dense task must label them "
            "all; use a method that merges (token_pooling, tome, algm, grid) or the gate alone"
        )


def check_same_backbone(reducer: Reducer, vit: nn.Module):
    """Raise a ValueError if a reducer was built for another kind of backbone."""
    own = (reducer.prefix, reducer.width, reducer.depth)
    if own != (found := (vit.num_prefix_tokens, vit.embed_dim, len(vit.blocks))):
        raise ValueError(
            f"the reducer was made for a backbone with (prefix tokens, width, depth) = {own}, this one has {found}; "
            "make it with make_reducer(name, vit) from the backbone that it will serve"
        )


def top_rows(layout: Layout, scores: Tensor, counts: list[int]) -> Tensor:
    """Return the row numbers of the `counts` highest scores `[T]` of each picture, in order; of equals, the first."""
    rows = ranked(layout, scores) + layout.ends[:-1, None]
    most = max(counts)
    if min(counts) == most:
        return rows[:, :most].flatten().sort().values
    taken = torch.arange(most, device=rows.device) < torch.tensor(counts, device=rows.device)[:, None]
    return rows[:, :most][taken].sort().values


def merge(
    tokens: Tokens,
    into: Tensor,
    lengths: list[int],
    weight: Tensor,
    average: bool = True,
    seeds: Tensor | None = None,
) -> Tokens:
    """Merge tokens r into new rows n: x_n = sum w_r x_r / sum w_r over all r with into_r = n.

    Areas add up, sizes too, and the pixels follow. A new row stands where its members do in the mean, by the same
    weights: c_n = sum w_r c_r / sum w_r.

    Args:
        into: `[T]`, the number of a new row; a token's new row belongs to its own picture.
        lengths: New rows per picture.
        weight: `[T]`, positive.
        average: Whether to divide by the weights' sum.
        seeds: `[new rows]`, the old row that a new one repeats where nothing is sent into it.
    """
    total = sum(lengths)

    def add(rows: Tensor) -> Tensor:
        return rows.new_zeros(total, *rows.shape[1:]).index_add(0, into, rows)

    wide = in_full(tokens.x)
    weight = weight.to(wide.dtype)
    share, activity = add(weight), tokens.activity
    empty = share <= 0
    active = weight if activity is None else weight * activity
    x = add(wide * active[:, None])
    if average:
        x = x / add(active).masked_fill(empty, 1)[:, None]
    if activity is not None:
        activity = add(active) / share.masked_fill(empty, 1)
    if seeds is not None:
        x = x.where(~empty[:, None], wide[seeds])
        activity = None if activity is None else activity.where(~empty, torch.ones_like(activity))
    merged = replace(
        tokens,
        x=x.to(tokens.x.dtype),
        activity=activity,
        area=add(tokens.area),
        where=into[tokens.where.clamp(min=0)].where(tokens.where >= 0, -1),
        layout=Layout(lengths, into.device),
        size=None if tokens.size is None else add(tokens.size),
    )
    if tokens.centre is None:
        return merged
    box, heavy = union(tokens.box, into, total), add(active)
    centre = add(tokens.centre.to(wide.dtype) * active[:, None]) / heavy.masked_fill(empty, 1)[:, None]
    if seeds is not None:
        box = tokens.box[seeds].where(empty[:, None], box)
        centre = tokens.centre[seeds].to(centre.dtype).where(empty[:, None], centre)
    return replace(merged, centre=centre, box=box)


def union(boxes: Tensor, into: Tensor, rows: int) -> Tensor:
    """Return, for each of the new rows, the box around the boxes `[T, 4]` of all that go into it; 0 if none does."""
    into = into[:, None].expand(-1, 2)
    ends = zip(boxes.split(2, 1), ("amin", "amax"), strict=True)
    parts = [part.new_zeros(rows, 2).scatter_reduce(0, into, part, by, include_self=False) for part, by in ends]
    return torch.cat(parts, 1)


def join(first: Tokens, second: Tokens) -> Tokens:
    """Join the rows of both for every picture, those of the second, which covers no pixel, behind the first's."""
    size = first.size
    if size is not None:
        rest = second.size if second.size is not None else torch.ones_like(second.area)
        size = torch.cat([size, rest.to(size.dtype)])
    names = [name for name in ("x", "activity", "area", "centre", "box") if getattr(first, name) is not None]
    both = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    both = replace(first, **both, size=size, others=None)
    picture = torch.cat([first.layout.picture, second.layout.picture])
    lengths = [a + b for a, b in zip(first.layout.lengths, second.layout.lengths, strict=True)]
    return both.select(picture.sort(dim=0, stable=True).indices, lengths)


def ranked(layout: Layout, scores: Tensor) -> Tensor:
    """Return the positions of each picture's rows by falling scores `[T]`, `[B, Nmax]`; of equals, the first."""
    return layout.pad(scores, -torch.inf).sort(dim=1, descending=True, stable=True).indices


def patch_rows(layout: Layout, prefix: int) -> Tensor:
    """Return the rows that are no prefix tokens."""
    if layout.uniform:
        each = torch.arange(prefix, layout.lengths[0], device=layout.device)
        return (layout.ends[:-1, None] + each).flatten()
    return (layout.position >= prefix).nonzero()[:, 0]
