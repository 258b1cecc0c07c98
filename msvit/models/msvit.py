"""MSViT: a gate, a mixed-scale tokenizer, a timm backbone and a head."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..checks import check_images, check_mask, check_precision, in_interval, one_of
from ..core import backbone
from ..core.blocks import Steps, TokenStage
from ..core.candidates import Candidates, spread
from ..core.fast_linear import fast_linear
from ..core.macs import encoder_macs, gate_macs, token_counts
from ..core.tokens import Tokens
from ..gating.base import Rule
from ..gating.gate import Gate
from ..gating.learned import Quota
from ..reducers.base import check_lossless, check_same_backbone
from .calibrate import calibrate
from .coarse import FullResolution, make_coarse_embed
from .deploy import Deployable
from .features import FeatureExtractor
from .heads import ClassificationHead
from .hub import load_folder, model_files, rename_decoder
from .tokenizer import EXECUTIONS, Gating, tokenize


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
    stages: tuple[TokenStage, ...] = ()
    final: Tokens | None = None


class MSViT(FeatureExtractor, Deployable, nn.Module, PyTorchModelHubMixin):
    """Dynamic mixed-scale tokenization (Havtorn et al. 2023) around a built timm VisionTransformer.

        vit = timm.create_model("deit_small_patch16_224", pretrained=True)
        model = msvit.MSViT(vit)
        logits = model(images)

    The gate decides for each coarse patch (`scale` x `scale` fine ones) whether it becomes one token or scale² of them.
    Every parameter of the backbone stays where timm put it.

    All executions compute the same function of the same decisions: "masked" runs all candidates and hides the
    inactive ones in attention, "trimmed" drops most of these (the default while training), "levelled" drops what is
    beyond the batch's longest picture (the trimming of the paper), "packed" runs the active tokens alone, each picture
    at its own length (the default in evaluation).

    With a dense head, pictures of any size are padded with the mean colour at bottom and right, and what is predicted
    there is cut off again; masks and gates are those of the padded picture, see `grid`.

    Args:
        vit: The backbone; it is used as it is, not copied.
        scale: Fine patches along the side of a coarse one.
        gate: A trained gate, one of `gating.learned`, or a rule of `msvit.make_rule`; None makes a new gate.
        margin: An inactive token stays in a trimmed sequence if its soft activity is at least this; 0 keeps them all.
        reducer: What drops or merges tokens inside the network, after the gate; from `msvit.make_reducer`.
        coarse_embed: How coarse patches are embedded: "shared", resized and through the backbone's own embedding;
            "own", through a copy of it that trains on its own (an ablation); "apt", as APT does, see `FullResolution`.
        head: None is timm's own classifier; a `msvit.SegmentationHead` labels pixels.
        fast_cpu: Run linear layers through oneDNN where PyTorch has it (see `msvit.fast_linear`). Results agree with
            PyTorch's own to rounding.
    """

    def __init__(
        self,
        vit: nn.Module,
        scale: int = 2,
        gate: nn.Module | None = None,
        margin: float = 0.1,
        reducer: nn.Module | None = None,
        coarse_embed: str = "shared",
        head: nn.Module | None = None,
        fast_cpu: bool = False,
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
        in_interval("margin", margin, "[0, 0.5]")
        if reducer is not None:
            check_same_backbone(reducer, vit)
        self.vit, self.scale, self.margin, self.reducer = vit, scale, margin, reducer
        self.gate = gate if gate is not None else Gate(patch * scale, backbone.convolution(vit).in_channels)
        self.coarse_embed = make_coarse_embed(coarse_embed, vit, scale)
        self.set_head(head if head is not None else ClassificationHead())
        self.fast_cpu, self._steps, self._backend = fast_cpu, Steps(), None
        self.register_buffer("cut", torch.tensor(0.5))
        self.register_load_state_dict_pre_hook(rename_decoder)

    def set_head(self, head: nn.Module):
        """Put another head on; a dense one needs all pixels."""
        if head.dense:
            check_lossless(self.reducer)
        self.head = head

    @property
    def threshold(self) -> float:
        """A region is coarse where its soft m exceeds this (in evaluation; while training it is 0.5)."""
        return self.cut.item()

    @threshold.setter
    def threshold(self, value: float):
        if isinstance(self.gate, Quota):
            raise ValueError("a quota has no threshold: set model.gate.rate, or calibrate the model to a budget")
        if not 0 <= value <= 1:
            raise ValueError(
                f"threshold={value}: m lies in [0, 1]; 0 makes every region coarse, 1 makes every one fine"
            )
        self.cut.fill_(value)

    @property
    def coarse_patch(self) -> int:
        """Side of a coarse patch in pixels."""
        return backbone.patch_size(self.vit) * self.scale

    @property
    def num_classes(self) -> int:
        return self.head.num_classes(self.vit)

    @property
    def adaptive(self) -> bool:
        """Whether MACs depend on more than the number of coarse regions, which a reducer can bring about."""
        return self.reducer is not None and self.reducer.adaptive

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the coarse regions (h, w) of a picture of `size` pixels, once it is padded."""
        height, width = map(int, size)  # torch.jit.trace would go on with tensors
        return -(-height // self.coarse_patch), -(-width // self.coarse_patch)

    def pad(self, images: Tensor) -> Tensor:
        """Return pictures with sides that are multiples of the coarse patch."""
        bottom, right = (-side % self.coarse_patch for side in images.shape[-2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def check(self, images: Tensor, finite: bool = False):
        """Raise a ValueError unless the model takes these pictures."""
        patch = 1 if self.head.dense else self.coarse_patch
        weight = backbone.convolution(self.vit).weight
        check_images(images, weight.shape[1], patch, finite)
        check_precision(images, weight)

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        gating, _, encoded = self.encode(self.pad(images))
        with fast_linear(self.fast_cpu):
            return self.head.logits(self.vit, encoded.final, gating.decisions, images.shape[-2:])

    def run(
        self, images: Tensor, mask: Tensor | None = None, execution: str | None = None, check: bool = False
    ) -> Result:
        """Return logits, and what was decided on the way.

        Args:
            images: `[B, c, H, W]`, normalised as the backbone wants them; both sides multiples of the coarse patch
                unless the head is dense.
            mask: Decisions instead of the gate's: bool `[B, h, w]` or `[h, w]`, True = coarse.
            execution: One of the four above; None means trimmed while training and packed in evaluation.
            check: Look for NaN and infinite pixels (costs a pass over the pictures).
        """
        self.check(images, finite=check)
        gating, tokens, (final, counts, stages) = self.encode(self.pad(images), mask, execution)
        with fast_linear(self.fast_cpu):
            logits = self.head.logits(self.vit, final, gating.decisions, images.shape[-2:])
        entering, coarse = tokens.active_counts(), gating.decisions.detach() > 0.5
        path = self.path_macs(coarse.sum((1, 2)), 0 if gating.blocks is None else gating.blocks.long().sum((1, 2)))
        return Result(
            logits=logits,
            gates=gating.soft,
            scores=gating.scores,
            coarse=coarse,
            tokens=entering,
            macs=self._macs(entering, coarse[0].numel(), mask is None, counts) + path,
            counts=counts,
            stages=stages,
            final=final,
        )

    def decide(self, images: Tensor, mask: Tensor | None = None) -> Gating:
        """Return the decisions of the gate, of a rule in its place, or of a mask."""
        grid = self.grid(images.shape[-2:])
        if mask is not None:
            check_mask(mask, len(images), grid)
            m = mask.to(images.device, torch.float32).expand(len(images), -1, -1)
            return Gating(None, m, m)
        if isinstance(self.gate, Rule):
            soft, blocks = self.gate.score(images, grid)
            m = (soft > self.cut).float()
            if blocks is not None:
                blocks = (blocks > self.cut).float()
                m = m.maximum(spread(blocks, grid))
            return Gating(None, soft, m, blocks)
        scores = self.gate(images)
        return Gating(scores, *self.gate.decide(scores, self.cut))

    def tokenize(self, images: Tensor, gating: Gating, execution: str | None = None) -> Tokens:
        """Return the tokens that an execution needs, embedded, before the first block."""
        execution = one_of("execution", execution or self.usual_execution, EXECUTIONS)
        self.check_recordable(execution)
        candidates = Candidates(
            self.grid(images.shape[-2:]), self.scale, self.vit.num_prefix_tokens, gating.blocks is not None
        )
        both = self.head.dense and self.reducer is None
        return tokenize(self.vit, images, candidates, gating, execution, self.margin, self.coarse_embed, both)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold the model in evaluation mode inside; afterwards, come what may, it is in the one it was in."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)

    def macs_of(self, n_coarse: Tensor, size: tuple[int, int], n_blocks: Tensor | int = 0) -> Tensor:
        """Return the MACs, float64 `[B]`, of pictures with so many coarse regions, gate and reducer included.

        Args:
            size: Of the pictures in pixels.
            n_blocks: With three scales, how many blocks of 2 x 2 of these regions have one token.
        """
        regions = math.prod(self.grid(size))
        patches = n_coarse + (regions - n_coarse) * self.scale**2 - 3 * n_blocks
        macs = self._macs(self.vit.num_prefix_tokens + patches, regions, gated=True)
        return macs + self.path_macs(n_coarse, n_blocks)

    def path_macs(self, n_coarse: Tensor | int, n_blocks: Tensor | int = 0) -> Tensor | int:
        """Return the MACs of APT's path for so many coarse regions, some of them in blocks; 0 without that path."""
        if not isinstance(self.coarse_embed, FullResolution):
            return 0
        coarse, block = (self.coarse_embed.macs(self.vit, side) for side in (self.scale, 2 * self.scale))
        return (n_coarse - 4 * n_blocks) * coarse + n_blocks * block

    def dense_macs(self, size: tuple[int, int]) -> int:
        """Return the MACs of backbone and head on a picture with all tokens fine, without gate and reducer."""
        patches = math.prod(self.grid(size)) * self.scale**2
        tokens = torch.tensor([self.vit.num_prefix_tokens + patches])
        counts = token_counts(len(self.vit.blocks), tokens)
        return int(encoder_macs(self.vit, tokens, counts) + self.head.macs(self.vit, counts[-1, 1], patches))

    def _macs(self, tokens: Tensor, regions: int, gated: bool, counts: Tensor | None = None) -> Tensor:
        """Return MACs by the tokens that enter and what each block saw, which follows in closed form if not given."""
        if counts is None:
            counts = token_counts(len(self.vit.blocks), tokens, self.reducer)
        macs = encoder_macs(self.vit, tokens.long(), counts, self.reducer)
        macs = macs + self.head.macs(self.vit, counts[-1, 1], regions * self.scale**2)
        return (macs + (gate_macs(self.gate, regions) if gated else 0)).double()

    def calibrate(self, loader, macs: float = 0.6) -> float:
        """Set the threshold so that the mean MACs over a loader meet that share of dense: one model, many budgets.

        Of a quota it sets the rate.

        Only the gate runs, unless a reducer's counts depend on the picture. The loader yields pictures, or tuples that
        begin with them, all of one size.

        Returns:
            The share that is reached; a share below all-coarse or above all-fine cannot be met.
        """
        return calibrate(self, loader, macs)

    def _save_pretrained(self, folder):
        for name, data in model_files(self).items():
            (folder / name).write_bytes(data)

    @classmethod
    def from_pretrained(cls, model_id, **options) -> "MSViT":  # the mixin's own would ask the hub for any mistyped path
        return load_folder(cls, model_id, **options)
