"""MSViT: a gate, a mixed-scale tokenizer and a timm backbone."""

import math
from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..checks import check_images, check_mask
from ..core import backbone
from ..core import macs as measure
from ..core import tokens as tk
from ..core.attention import Layout
from ..core.blocks import STEPS, Stage, pass_blocks
from ..core.fast_linear import fast_linear
from ..core.sampling import straight_through
from ..core.tokens import Tokens
from ..gating.gate import Gate
from ..gating.rules import Rule
from ..reducers.base import check_backbone
from .calibrate import calibrate
from .hub import load_folder, save_folder

EXECUTIONS = ("masked", "trimmed", "packed")


class Gating(NamedTuple):
    """What was decided about a batch: the gate's logits (None without one), soft values, and m, 1 = coarse.

    Blocks `[B, h // 2, w // 2]` are 1 where 2 x 2 coarse regions have one token; None with two scales.
    """

    scores: Tensor | None
    soft: Tensor
    decisions: Tensor
    blocks: Tensor | None = None


class Result(NamedTuple):
    """What `MSViT.run` computed; B pictures with h x w coarse regions each.

    Attributes:
        logits: `[B, classes]`.
        gates: Soft m in [0, 1], `[B, h, w]`; while training a Gumbel sample that carries gradients.
        scores: The gate's logits without noise, `[B, h, w]`; None where a mask was given.
        coarse: The decisions, bool `[B, h, w]`.
        tokens: Active tokens per picture that enter the first block, prefix tokens included, int64 `[B]`.
        macs: Per picture, for the active tokens alone, gate and reducer included, float64 `[B]`.
        counts: Active tokens that each block's attention and MLP saw, int64 `[depth, 2, B]`.
        stages: Where each fine patch's token was, after the tokenizer and after each step of the reducer.
        final: The tokens after the last norm.
    """

    logits: Tensor
    gates: Tensor
    scores: Tensor | None
    coarse: Tensor
    tokens: Tensor
    macs: Tensor
    counts: Tensor | None = None
    stages: tuple[Stage, ...] = ()
    final: Tokens | None = None


class MSViT(nn.Module, PyTorchModelHubMixin):
    """Dynamic mixed-scale tokenization (Havtorn et al. 2023) around a built timm VisionTransformer.

        vit = timm.create_model("deit_small_patch16_224", pretrained=True)
        model = msvit.MSViT(vit)
        logits = model(images)

    The gate decides for each coarse patch (`scale` x `scale` fine ones) whether it becomes one token or scale² of them.
    Every parameter of the backbone stays where timm put it.

    Three executions compute the same function of the same decisions: "masked" runs all candidates and hides the
    inactive ones in attention, "trimmed" drops most of these (the default while training), "packed" runs the active
    tokens alone, each picture at its own length (the default in evaluation).

    Args:
        vit: The backbone; it is used as it is, not copied.
        scale: Fine patches along the side of a coarse one.
        gate: A trained gate, or a rule of `msvit.make_rule`; None makes a new gate.
        margin: An inactive token stays in a trimmed sequence if its soft activity is at least this; 0 keeps them all.
        reducer: What drops or merges tokens inside the network, after the gate; from `msvit.make_reducer`.
        share_embedding: Coarse patches go through the backbone's own embedding; False gives them a copy of it that
            trains on its own (an ablation).
    """

    def __init__(
        self,
        vit: nn.Module,
        scale: int = 2,
        gate: nn.Module | None = None,
        margin: float = 0.1,
        reducer: nn.Module | None = None,
        share_embedding: bool = True,
    ):
        super().__init__()
        backbone.check_backbone(vit)
        patch = backbone.patch_size(vit)
        if not isinstance(scale, int) or scale < 2:
            raise ValueError(f"scale={scale!r}: a coarse patch is a whole number of fine ones wide; use 2, 3, 4 …")
        if getattr(gate, "patch", patch * scale) != patch * scale:
            raise ValueError(
                f"the gate looks at coarse patches of {gate.patch} px, but scale={scale} on patches of {patch} px "
                f"makes {patch * scale} px; use another scale or train a gate for this backbone"
            )
        if not 0 <= margin <= 0.5:
            raise ValueError(f"margin={margin}: inactive tokens have a soft activity in [0, 0.5]; 0 keeps them all")
        if reducer is not None:
            check_backbone(reducer, vit)
        self.vit, self.scale, self.margin, self.reducer = vit, scale, margin, reducer
        self.gate = gate if gate is not None else Gate(patch * scale, vit.patch_embed.proj.in_channels)
        self.coarse_embed = None if share_embedding else backbone.copy_embedding(vit)
        self.register_buffer("cut", torch.tensor(0.5))
        self._steps = STEPS

    @property
    def threshold(self) -> float:
        """A region is coarse where its soft m exceeds this (in evaluation; while training it is 0.5)."""
        return self.cut.item()

    @threshold.setter
    def threshold(self, value: float):
        if not 0 <= value <= 1:
            raise ValueError(
                f"threshold={value}: m lies in [0, 1]; 0 makes every region coarse, 1 makes every one fine"
            )
        self.cut.fill_(value)

    @property
    def coarse_patch(self) -> int:
        """Side of a coarse patch in pixels."""
        return backbone.patch_size(self.vit) * self.scale

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Coarse regions (h, w) of a picture of `size` pixels."""
        return size[0] // self.coarse_patch, size[1] // self.coarse_patch

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images).logits

    def run(
        self, images: Tensor, mask: Tensor | None = None, execution: str | None = None, check: bool = False
    ) -> Result:
        """Logits, and what was decided on the way.

        Args:
            images: `[B, c, H, W]`, normalised as the backbone wants them; both sides multiples of the coarse patch.
            mask: Decisions instead of the gate's: bool `[B, h, w]` or `[h, w]`, True = coarse.
            execution: "masked", "trimmed" or "packed"; None means trimmed while training and packed in evaluation.
            check: Look for NaN and infinite pixels (costs a pass over the pictures).
        """
        check_images(images, self.vit.patch_embed.proj.in_channels, self.coarse_patch, finite=check)
        return self._result(images, self.decide(images, mask), execution, gated=mask is None)

    def _result(self, images: Tensor, gating: Gating, execution: str | None, gated: bool) -> Result:
        """From checked pictures and decisions to all that `run` returns."""
        with fast_linear():
            tokens = self.tokenize(images, gating, execution)
            final, counts, stages = pass_blocks(self.vit, tokens, self.reducer, self._steps)
            logits = self._read_out(final, gating)
        entering, coarse = tokens.active_counts(), gating.decisions.detach() > 0.5
        return Result(
            logits=logits,
            gates=gating.soft,
            scores=gating.scores,
            coarse=coarse,
            tokens=entering,
            macs=self._macs(entering, coarse[0].numel(), gated, counts),
            counts=counts,
            stages=stages,
            final=final,
        )

    def _read_out(self, tokens: Tokens, gating: Gating) -> Tensor:
        """Logits from the tokens after the last norm."""
        return backbone.pooled_logits(self.vit, tokens)

    def decide(self, images: Tensor, mask: Tensor | None = None) -> Gating:
        """The decisions of the gate, of a rule in its place, or of a mask."""
        grid = self.grid(images.shape[-2:])
        if mask is not None:
            check_mask(mask, len(images), grid)
            m = mask.to(images.device, torch.float32).expand(len(images), -1, -1)
            return Gating(None, m, m)
        if isinstance(self.gate, Rule):
            soft, blocks = self.gate.judge(images, grid)
            m = (soft > self.cut).float()
            if blocks is not None:
                blocks = (blocks > self.cut).float()
                m = m.maximum(tk.spread(blocks, grid))
            return Gating(None, soft, m, blocks)
        scores = self.gate(images)
        soft = self.gate.soften(scores)
        return Gating(scores, soft, straight_through(soft, 0.5 if self.training else self.cut))

    def tokenize(self, images: Tensor, gating: Gating, execution: str | None = None) -> Tokens:
        """The tokens that an execution needs, embedded, before the first block."""
        execution = execution or ("trimmed" if self.training else "packed")
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r}; use one of {', '.join(EXECUTIONS)}")
        vit, scale, prefix = self.vit, self.scale, backbone.prefix_count(self.vit)
        blocks, grid = gating.blocks, self.grid(images.shape[-2:])
        activity, rows, lengths = self._choose(gating, execution)
        b, n = activity.shape
        base = backbone.bases(vit, grid, scale)
        if blocks is not None:
            base = tk.with_blocks(base, (grid[0] * scale, grid[1] * scale), scale)
        seeing, pixels = tk.pixels_of(rows, images, backbone.patch_size(vit), scale, prefix, blocks is not None)
        numbers = rows[seeing] % n
        patches = self._embed(pixels, (numbers < prefix + grid[0] * grid[1]))
        x = base[rows % n].to(patches.dtype).index_add_(0, seeing, patches)
        x = vit.norm_pre(vit.pos_drop(x))

        area = base.new_ones(n, dtype=torch.float32)
        area[:prefix] = 0
        area[prefix : prefix + grid[0] * grid[1]] = scale**2
        area[prefix + grid[0] * grid[1] * (1 + scale**2) :] = 4 * scale**2
        start = torch.arange(b, device=x.device)[:, None, None] * n
        where = tk.candidate_map(gating.decisions.detach() > 0.5, scale, prefix, blocks) + start
        if execution != "masked":
            moved = torch.empty(b * n, dtype=torch.long, device=x.device)
            moved[rows] = torch.arange(len(rows), device=x.device)
            where = moved[where]
        activity = None if execution == "packed" else activity.flatten()[rows]
        return Tokens(x, activity, area[rows % n], where, Layout(lengths, x.device))

    def _choose(self, gating: Gating, execution: str) -> tuple[Tensor, Tensor, list[int]]:
        """Activity of all candidates `[B, N]`, those that an execution takes along, and how many a picture has."""
        scale, prefix, blocks = self.scale, backbone.prefix_count(self.vit), gating.blocks
        activity = tk.candidate_activity(gating.decisions, scale, prefix, blocks)
        active = activity.detach() > 0.5
        if execution == "packed":
            return activity, *tk.choose_active(active)
        if execution == "masked":
            return activity, *tk.choose_all(active)
        soft = tk.candidate_activity(gating.soft.detach(), scale, prefix, blocks)
        # Inactive tokens are there for their gradient.
        margin = self.margin if gating.decisions.requires_grad else 1.0
        return activity, *tk.choose_trimmed(active, soft, margin)

    def _embed(self, pixels: Tensor, coarse: Tensor) -> Tensor:
        """Embeddings `[n, C]` of pixels `[n, c S S]`, of which some (bool `[n]`) are coarse patches."""
        if self.coarse_embed is None:
            return backbone.embed(self.vit, pixels)
        own, shared = coarse.nonzero()[:, 0], (~coarse).nonzero()[:, 0]
        both = torch.cat([backbone.embed(self.vit, pixels[shared]), self.coarse_embed(pixels[own])])
        return both[torch.cat([shared, own]).argsort()]

    def encode(self, images: Tensor, gating: Gating, execution: str | None = None) -> Tokens:
        """The tokens after the last block and the last norm."""
        return pass_blocks(self.vit, self.tokenize(images, gating, execution), self.reducer, self._steps).final

    def compile_blocks(self, **options):
        """Compiles what a block does row by row; attention stays eager, since its shapes change with every batch."""
        self._steps = tuple(torch.compile(step, dynamic=True, **options) for step in STEPS)

    def macs_of(self, n_coarse: Tensor, size: tuple[int, int], n_blocks: Tensor | int = 0) -> Tensor:
        """MACs, float64 `[B]`, of pictures of `size` pixels with so many coarse regions, gate and reducer included.

        Args:
            n_blocks: With three scales, how many blocks of 2 x 2 of these regions have one token.
        """
        regions = math.prod(self.grid(size))
        patches = n_coarse + (regions - n_coarse) * self.scale**2 - 3 * n_blocks
        return self._macs(backbone.prefix_count(self.vit) + patches, regions, gated=True)

    def dense_macs(self, size: tuple[int, int]) -> int:
        """MACs of the plain backbone on a picture of `size` pixels."""
        regions = math.prod(self.grid(size))
        tokens = torch.tensor([backbone.prefix_count(self.vit) + regions * self.scale**2])
        return int(measure.vit_macs(self.vit, tokens))

    def _macs(self, tokens: Tensor, regions: int, gated: bool, counts: Tensor | None = None) -> Tensor:
        """By the tokens that enter and what each block saw of them, which follows in closed form if not given."""
        if counts is None:
            counts = measure.plan(len(self.vit.blocks), tokens, self.reducer)
        gate = measure.gate_macs(self.gate, regions) if gated else 0
        return (measure.path_macs(self.vit, tokens.long(), counts, self.reducer) + gate).double()

    def calibrate(self, loader, macs: float = 0.6) -> float:
        """Sets the threshold so that the mean MACs over a loader meet that share of dense: one model, many budgets.

        Only the gate runs, unless a reducer's counts depend on the picture. The loader yields pictures, or tuples that
        begin with them, all of one size.

        Returns:
            The share that the threshold reaches; a share below all-coarse or above all-fine cannot be met.
        """
        return calibrate(self, loader, macs)

    def _save_pretrained(self, folder):
        save_folder(self, folder)

    @classmethod
    def _from_pretrained(cls, *, model_id, **options):
        return load_folder(cls, model_id, **options)
