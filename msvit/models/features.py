"""The part of timm's interface by which a backbone serves other models: features, and checkpointing of gradients."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import in_interval, one_of
from ..core.blocks import Encoded, run_blocks
from ..core.fast_linear import fast_linear
from ..core.tokens import Tokens
from .tokenizer import Gating

OUTPUT_FORMATS = ("NCHW", "NLC", "tokens")


class EncodedPictures(NamedTuple):
    """Decisions, the tokens that enter the first block, and what the blocks make of them."""

    gating: Gating
    tokens: Tokens
    encoded: Encoded


class FeatureExtractor:
    """What a model with mixed-scale tokens says where a timm encoder is asked.

    Tokens are scattered to the fine grid: each fine patch has the token that covers it, so that shapes are those of the
    backbone, and with all regions fine the values too. The mixed-scale tokens themselves are to be had as well.
    """

    def set_grad_checkpointing(self, enable: bool = True):
        """Compute what lies within a block again for its gradient, in place of keeping it; as timm's models."""
        self.vit.set_grad_checkpointing(enable)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens after the last norm as timm does: prefix tokens and fine patches, `[B, P + N, C]`.

        The mixed-scale tokens are in `run(images).final`.
        """
        tokens, _ = self._features(images, mask, ())
        prefix, patches = _scattered(tokens, self.vit.num_prefix_tokens)
        return torch.cat([prefix, patches.flatten(1, 2)], 1)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list] | list:
        """Return `forward_features`, and what chosen blocks return, as timm does.

        Args:
            indices: Of blocks; the last so many if one number, all if None.
            return_prefix_tokens: Give pairs: patches, and prefix tokens `[B, P, C]`.
            norm: Take them through the last norm.
            output_fmt: "NCHW" is maps `[B, C, H_f, W_f]`, "NLC" is `[B, N, C]`, both on the fine grid; "tokens" is the
                mixed-scale `Tokens`, prefix tokens included.
            intermediates_only: Leave `forward_features` away.
            mask: Decisions instead of the gate's, as in `run`.
        """
        one_of("output_fmt", output_fmt, OUTPUT_FORMATS)
        if output_fmt == "tokens" and return_prefix_tokens:
            raise ValueError("return_prefix_tokens with output_fmt='tokens': they are the first rows of each picture's")
        chosen = _chosen(indices, len(self.vit.blocks))
        final, taken = self._features(images, mask, chosen)
        if norm:
            taken = [replace(tokens, x=self.vit.norm(tokens.x)) for tokens in taken]
        found = [self._formatted(tokens, output_fmt, return_prefix_tokens) for tokens in taken]
        if intermediates_only:
            return found
        prefix, patches = _scattered(final, self.vit.num_prefix_tokens)
        return torch.cat([prefix, patches.flatten(1, 2)], 1), found

    def encode(
        self, images: Tensor, mask: Tensor | None = None, execution: str | None = None, after: Callable | None = None
    ) -> EncodedPictures:
        """Return all but the logits; the arguments are those of `run` and `run_blocks`."""
        gating = self.decide(images, mask)
        with fast_linear(self.fast_cpu):
            tokens = self.tokenize(images, gating, execution)
            encoded = self.through_blocks(tokens, after)
        return EncodedPictures(gating, tokens, encoded)

    def through_blocks(self, tokens: Tokens, after: Callable | None = None) -> Encoded:
        """Take tokens from before the first block to after the last norm, through the reducer."""
        return run_blocks(self.vit, tokens, self.reducer, self._steps, after=after)

    def _features(self, images: Tensor, mask: Tensor | None, chosen: Collection[int]) -> tuple[Tokens, list[Tokens]]:
        """Return the tokens after the last norm, and those after the chosen blocks, in the order of the blocks."""
        self.check(images)
        taken = []

        def after(layer: int, tokens: Tokens):
            if layer in chosen:
                taken.append(tokens)

        return self.encode(images, mask, after=after).encoded.final, taken

    def _formatted(self, tokens: Tokens, output_fmt: str, with_prefix: bool) -> Tokens | Tensor | tuple[Tensor, Tensor]:
        if output_fmt == "tokens":
            return tokens
        prefix, grid = _scattered(tokens, self.vit.num_prefix_tokens)
        patches = grid.flatten(1, 2) if output_fmt == "NLC" else grid.permute(0, 3, 1, 2).contiguous()
        return (patches, prefix) if with_prefix else patches


def _scattered(tokens: Tokens, prefix: int) -> tuple[Tensor, Tensor]:
    """Return prefix tokens `[B, P, C]`, and the others on the fine grid, `[B, H_f, W_f, C]`."""
    rows = tokens.layout.ends[:-1, None] + torch.arange(prefix, device=tokens.x.device)
    return tokens.x[rows], tokens.scatter()


def _chosen(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """Return the numbers of the blocks that are asked for: all, the last so many, or these, from the end if below 0."""
    if isinstance(indices, int):
        in_interval("indices", indices, f"[1, {depth}]")
        return set(range(depth - indices, depth))
    for index in indices or ():
        in_interval("indices", index, f"[{-depth}, {depth})")
    return set(range(depth)) if indices is None else {index % depth for index in indices}
