"""MSViT: a gate, a mixed-scale tokenizer, a timm backbone and a head."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..checks import check_images, check_masks, check_precision, in_interval, one_of
from ..core import backbone
from ..core.blocks import Steps
from ..core.candidates import Candidates
from ..core.fast_linear import fast_linear
from ..core.scales import check_room, checked_scales, grids_of, spread
from ..core.tokens import Tokens
from ..gating.base import Rule
from ..gating.gate import make_gate, sizes_of, warn_if_new
from ..gating.learned import Quota
from ..reducers.base import check_lossless, check_same_backbone
from .calibrate import calibrate
from .coarse import make_coarse_embed
from .costs import Costs
from .deploy import Deployable
from .features import FeatureExtractor
from .heads import ClassificationHead
from .hub import load_folder, model_files, rename_decoder
from .lists import run_list
from .result import Result
from .tokenizer import EXECUTIONS, Gating, tokenize


class MSViT(FeatureExtractor, Deployable, Costs, nn.Module, PyTorchModelHubMixin):
    """Dynamic mixed-scale tokenization (Havtorn et al. 2023) around a built timm VisionTransformer.

        vit = timm.create_model("deit_small_patch16_224", pretrained=True)
        model = msvit.MSViT(vit)
        logits = model(images)

    The gate decides for each coarse patch (`scale` x `scale` fine ones) whether it becomes one token or scale² of them.
    With `scales=(1, 2, 4)` it is a quadtree: a gate decides whether a block of 4 x 4 fine patches becomes one token,
    and another one about each quarter of what was divided. Every parameter of the backbone stays where timm put it.

    All executions compute the same function of the same decisions: "masked" runs all candidates and hides the
    inactive ones in attention, "trimmed" drops most of these (the default while training), "levelled" drops what is
    beyond the batch's longest picture (the trimming of the paper), "packed" runs the active tokens alone, each picture
    at its own length (the default in evaluation).

    Pictures may be of any size: they are padded with the mean colour at bottom and right to whole coarse patches.
    Masks and gates are those of the padded picture, see `grid`, but what is padding alone has no tokens: the backbone
    sees as many as timm's does with `dynamic_img_pad`. A list of pictures `[c, H, W]` of different sizes is one batch,
    packed: see `run`.

    Args:
        vit: The backbone; it is used as it is, not copied.
        scale: Fine patches along the side of a coarse one, the smallest that is decided about.
        gate: A trained gate, one of `gating.learned`, or a rule of `msvit.make_rule`; None makes a new gate.
        margin: An inactive token stays in a trimmed sequence if its soft activity is at least this; 0 keeps them all.
        reducer: What drops or merges tokens inside the network, after the gate; from `msvit.make_reducer`.
        coarse_embed: How coarse patches are embedded: "shared", resized and through the backbone's own embedding;
            "own", through a copy of it that trains on its own (an ablation); "apt", as APT does, see `FullResolution`.
        head: None is timm's own classifier; a `msvit.SegmentationHead` labels pixels.
        fast_cpu: Run linear layers through oneDNN where PyTorch has it (see `msvit.fast_linear`). Results agree with
            PyTorch's own to rounding.
        scales: Sides of all tokens in fine patches, each from the third on twice the one before. None is (1, scale), or
            goes on as far as the gate decides.
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
        scales: Sequence[int] | None = None,
    ):
        super().__init__()
        backbone.check_backbone(vit)
        patch, sizes = backbone.patch_size(vit), sizes_of(gate)
        if not isinstance(scale, int) or scale < 2:
            raise ValueError(f"scale={scale!r}: a coarse patch is a whole number of fine ones wide; use 2, 3, 4 …")
        if scales is None:
            scales = (1, *(scale * 2**i for i in range(sizes or 1)))
        self.scales = checked_scales(scales, sizes)
        scale = self.scales[1]
        if getattr(gate, "patch", patch * scale) != patch * scale:
            raise ValueError(
                f"the gate looks at coarse patches of {gate.patch} px, but scale={scale} on patches of {patch} px "
                f"makes {patch * scale} px; use another scale or train a gate for this backbone"
            )
        in_interval("margin", margin, "[0, 0.5]")
        if reducer is not None:
            check_same_backbone(reducer, vit)
        self.vit, self.margin, self.reducer = vit, margin, reducer
        self.gate = gate if gate is not None else make_gate(patch, self.scales, backbone.convolution(vit).in_channels)
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
    def scale(self) -> int:
        """Fine patches along the side of the smallest region that is decided about."""
        return self.scales[1]

    @property
    def coarse_patch(self) -> int:
        """Side of such a region in pixels."""
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

    def grids(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the regions (h, w) of each size that is decided about, from small to large."""
        return grids_of(self.grid(size), self.scales)

    def patches(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of fine patches that a picture of `size` pixels has."""
        patch, (height, width) = backbone.patch_size(self.vit), map(int, size)
        return -(-height // patch), -(-width // patch)

    def all_fine(self, size: tuple[int, int]) -> list[Tensor]:
        """Return the mask that makes all tokens of pictures of `size` pixels fine."""
        return [torch.zeros(grid, dtype=torch.bool, device=self.cut.device) for grid in self.grids(size)]

    def pad(self, images: Tensor) -> Tensor:
        """Return pictures with sides that are multiples of the coarse patch."""
        bottom, right = (-side % self.coarse_patch for side in images.shape[-2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def check(self, images: Tensor, finite: bool = False):
        """Raise a ValueError unless the model takes these pictures."""
        weight = backbone.convolution(self.vit).weight
        check_images(images, weight.shape[1], finite)
        check_precision(images, weight)
        check_room(self.scales, self.grid(images.shape[-2:]), backbone.patch_size(self.vit), images.shape[-2:])

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(images, list | tuple):
            return self.run(images).logits
        self.check(images)
        gating, _, encoded = self.encode(images)
        with fast_linear(self.fast_cpu):
            return self.head.logits(self.vit, encoded.final, images.shape[-2:])

    def run(
        self,
        images: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence | None = None,
        execution: str | None = None,
        check: bool = False,
    ) -> Result:
        """Return logits, and what was decided on the way.

        Args:
            images: `[B, c, H, W]`, normalised as the backbone wants them; or a list of pictures `[c, H, W]` of any
                sizes. What a `Result` has of each region or pixel is then a list too.
            mask: Decisions instead of the gate's: bool `[B, h, w]` or `[h, w]`, True = coarse. With more than two
                scales it is a list, one for each size of regions from small to large; what is True in a larger one
                counts. Of a list of pictures it is a list with what each one's is.
            execution: One of the four above; None means trimmed while training and packed in evaluation.
            check: Look for NaN and infinite pixels (costs a pass over the pictures).
        """
        if isinstance(images, list | tuple):
            return run_list(self, images, mask, execution, check)
        self.check(images, finite=check)
        size, (gating, tokens, (final, counts, stages)) = images.shape[-2:], self.encode(images, mask, execution)
        with fast_linear(self.fast_cpu):
            logits = self.head.logits(self.vit, final, size)
        entering = tokens.active_counts()
        return Result(
            logits=logits,
            gates=gating.nested[0],
            scores=gating.scores,
            coarse=gating.undivided[0].detach() > 0.5,
            tokens=entering,
            macs=self.spent(gating, size, entering, counts, mask is None),
            counts=counts,
            stages=stages,
            final=final,
            gating=gating,
        )

    def decide(self, images: Tensor, mask: Tensor | Sequence[Tensor] | None = None, everywhere: bool = False) -> Gating:
        """Return the decisions of the gate, of a rule in its place, or of a mask.

        Args:
            everywhere: Ask gates also about regions inside of undivided ones, as it is while training.
        """
        grids, images = self.grids(images.shape[-2:]), self.pad(images)
        if mask is not None:
            masks = check_masks(mask, len(images), grids)
            soft = [m.to(images.device, torch.float32).expand(len(images), -1, -1) for m in masks]
            levels = [Gating(None, m, m) for m in soft]
        elif isinstance(self.gate, Rule):
            levels = [Gating(None, soft, (soft > self.cut).float()) for soft in self.gate.score(images, grids)]
        else:
            levels = self._ask(images, grids, everywhere or self.training or self.recorded)
        return levels[0]._replace(larger=tuple(levels[1:]))

    def _ask(self, images: Tensor, grids: list[tuple[int, int]], everywhere: bool) -> list[Gating]:
        """Return what the gates say from the largest regions down, each where the one before has divided."""
        levels, whole = [], None
        if not (self.training or self.recorded or torch.compiler.is_compiling()):
            warn_if_new(self.gate.levels)
        for gate, grid in zip(reversed(self.gate.levels), reversed(grids), strict=True):
            above = None if whole is None else spread(whole, grid)
            scores = gate(images) if everywhere or above is None else gate(images, above < 0.5)
            soft, m = gate.decide(scores, self.cut)
            whole = m.detach() if above is None else m.detach().maximum(above)
            levels.insert(0, Gating(scores, soft, m))
        return levels

    def tokenize(self, images: Tensor, gating: Gating, execution: str | None = None) -> Tokens:
        """Return the tokens that an execution needs, embedded, before the first block."""
        execution = one_of("execution", execution or self.usual_execution, EXECUTIONS)
        self.check_recordable(execution)
        size, images = images.shape[-2:], self.pad(images)
        candidates = Candidates(self.grid(size), self.scales, self.vit.num_prefix_tokens, self.patches(size))
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
