"""MSViT: a gate, a mixed-scale tokenizer and a timm backbone."""

from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from . import backbone, measure, tokens as tk
from .checks import check_images, check_mask
from .gate import Gate, straight_through
from .hub import load_folder, save_folder
from .layout import Layout, attend
from .tokens import Tokens

EXECUTIONS = ("masked", "trimmed", "packed")


class Gating(NamedTuple):
    """What was decided about a batch: the gate's logits and soft values (None under a mask), and m, 1 = coarse."""

    scores: Tensor | None
    soft: Tensor
    decisions: Tensor


class Result(NamedTuple):
    """What `MSViT.run` computed; B pictures with h x w coarse regions each.

    Attributes:
        logits: `[B, classes]`.
        gates: Soft m in [0, 1], `[B, h, w]`; while training a Gumbel sample that carries gradients.
        scores: The gate's logits without noise, `[B, h, w]`; None where a mask was given.
        coarse: The decisions, bool `[B, h, w]`.
        tokens: Active tokens per picture, prefix tokens included, int64 `[B]`.
        macs: Per picture, for the active tokens alone, gate included, float64 `[B]`.
    """

    logits: Tensor
    gates: Tensor
    scores: Tensor | None
    coarse: Tensor
    tokens: Tensor
    macs: Tensor


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
        gate: A trained gate; None makes a new one.
        slack: Room for inactive tokens in a trimmed sequence, as a share of the largest active count.
    """

    def __init__(self, vit: nn.Module, scale: int = 2, gate: nn.Module | None = None, slack: float = 0.1):
        super().__init__()
        backbone.check_backbone(vit)
        patch = backbone.patch_size(vit)
        if not isinstance(scale, int) or scale < 2:
            raise ValueError(
                f"scale={scale!r}: a coarse patch is a whole number of fine ones wide; use 2, 3, 4 …"
            )
        if getattr(gate, "patch", patch * scale) != patch * scale:
            raise ValueError(
                f"the gate looks at coarse patches of {gate.patch} px, but scale={scale} on patches of {patch} px "
                f"makes {patch * scale} px; use another scale or train a gate for this backbone"
            )
        if slack < 0:
            raise ValueError(f"slack={slack}: the room for inactive tokens is a share >= 0")
        self.vit, self.scale, self.slack = vit, scale, slack
        self.gate = gate if gate is not None else Gate(patch * scale, vit.patch_embed.proj.in_channels)
        self.register_buffer("cut", torch.tensor(0.5))
        self._steps = (_before_attention, _after_attention)

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
        gating = self.decide(images, mask)
        coarse = gating.decisions.detach() > 0.5
        tokens = self.encode(images, gating, execution)
        counts = tokens.active_counts()
        return Result(
            logits=backbone.pooled_logits(self.vit, tokens),
            gates=gating.soft,
            scores=gating.scores,
            coarse=coarse,
            tokens=counts,
            macs=self._macs(counts, coarse[0].numel(), gated=mask is None),
        )

    def decide(self, images: Tensor, mask: Tensor | None = None) -> Gating:
        """The gate's decisions, or those of a mask."""
        if mask is not None:
            check_mask(mask, len(images), self.grid(images.shape[-2:]))
            m = mask.to(images.device, torch.float32).expand(len(images), -1, -1)
            return Gating(None, m, m)
        scores = self.gate(images)
        soft = self.gate.soften(scores)
        return Gating(scores, soft, straight_through(soft, 0.5 if self.training else self.cut))

    def tokenize(self, images: Tensor, gating: Gating, execution: str | None = None) -> Tokens:
        """The tokens that an execution needs, embedded, before the first block."""
        execution = execution or ("trimmed" if self.training else "packed")
        if execution not in EXECUTIONS:
            raise ValueError(f"execution={execution!r}; use one of {', '.join(EXECUTIONS)}")
        vit, scale, prefix = self.vit, self.scale, backbone.prefix_count(self.vit)
        activity = tk.candidate_activity(gating.decisions, scale, prefix)
        active = activity.detach() > 0.5
        if execution == "packed":
            rows, lengths = tk.choose_active(active)
        elif execution == "masked":
            rows, lengths = tk.choose_all(active)
        else:
            soft = tk.candidate_activity(gating.soft.detach(), scale, prefix)
            rows, lengths = tk.choose_trimmed(active, soft, self.slack)

        b, n = active.shape
        base = backbone.bases(vit, self.grid(images.shape[-2:]), scale)
        seeing, pixels = tk.pixels_of(rows, images, backbone.patch_size(vit), scale, prefix)
        patches = backbone.embed(vit, pixels)
        x = base[rows % n].to(patches.dtype).index_add(0, seeing, patches)
        x = vit.norm_pre(vit.pos_drop(x))

        area = base.new_ones(n, dtype=torch.float32)
        area[:prefix] = 0
        area[prefix : prefix + gating.decisions[0].numel()] = scale**2
        start = torch.arange(b, device=x.device)[:, None, None] * n
        where = tk.candidate_map(gating.decisions.detach() > 0.5, scale, prefix) + start
        if execution != "masked":
            moved = torch.empty(b * n, dtype=torch.long, device=x.device)
            moved[rows] = torch.arange(len(rows), device=x.device)
            where = moved[where]
        activity = None if execution == "packed" else activity.flatten()[rows]
        return Tokens(x, activity, area[rows % n], where, Layout(lengths, x.device))

    def encode(self, images: Tensor, gating: Gating, execution: str | None = None) -> Tokens:
        """The tokens after the last block and the last norm."""
        tokens = self.tokenize(images, gating, execution)
        before, after = self._steps
        x = tokens.x
        for block in self.vit.blocks:
            h, q, k, v = before(block, x)
            heads = attend(tokens.layout, q, k, v, tokens.activity)
            x = after(block, x, h, heads, tokens.layout)
        return Tokens(self.vit.norm(x), tokens.activity, tokens.area, tokens.where, tokens.layout)

    def compile_blocks(self, **options):
        """Compiles what a block does row by row; attention stays eager, since its shapes change with every batch."""
        self._steps = tuple(
            torch.compile(step, dynamic=True, **options) for step in (_before_attention, _after_attention)
        )

    def macs_of(self, n_coarse: Tensor, size: tuple[int, int]) -> Tensor:
        """MACs, float64 `[B]`, of pictures of `size` pixels with so many coarse regions, gate included."""
        h, w = self.grid(size)
        tokens = backbone.prefix_count(self.vit) + n_coarse + (h * w - n_coarse) * self.scale**2
        return self._macs(tokens, h * w, gated=True)

    def dense_macs(self, size: tuple[int, int]) -> int:
        """MACs of the plain backbone on a picture of `size` pixels."""
        h, w = self.grid(size)
        tokens = torch.tensor([backbone.prefix_count(self.vit) + h * w * self.scale**2])
        return int(measure.vit_macs(self.vit, tokens))

    def _macs(self, tokens: Tensor, regions: int, gated: bool) -> Tensor:
        gate = measure.gate_macs(self.gate, regions) if gated else 0
        return (measure.vit_macs(self.vit, tokens) + gate).double()

    @torch.no_grad()
    def calibrate(self, loader, macs: float = 0.6) -> float:
        """Sets the threshold so that the mean MACs over a loader meet that share of dense: one model, many budgets.

        Only the gate runs. The loader yields pictures, or tuples that begin with them, all of one size.

        Returns:
            The share that the threshold reaches; a share below all-coarse or above all-fine cannot be met.
        """
        if not 0 < macs <= 1.1:
            raise ValueError(f"macs={macs}: a share of the dense model's MACs, such as 0.6")
        training = self.training
        self.eval()
        device, soft, size = self.cut.device, [], None
        for batch in loader:
            images = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
            check_images(images, self.vit.patch_embed.proj.in_channels, self.coarse_patch)
            if size is not None and size != images.shape[-2:]:
                raise ValueError(
                    f"pictures of {tuple(size)} and {tuple(images.shape[-2:])} px; calibrate on one size"
                )
            size = images.shape[-2:]
            soft.append(self.decide(images).soft.flatten(1))
        self.train(training)
        if not soft:
            raise ValueError("the loader is empty; calibrate on some pictures")
        soft, dense = torch.cat(soft), self.dense_macs(size)

        def share(cut: Tensor) -> float:
            return self.macs_of((soft > cut).sum(1), size).mean().item() / dense

        levels = soft.flatten().unique()
        cuts = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_ones(1)])
        low, high = 0, len(cuts) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(cuts[middle]) <= macs else (low, middle)
        best = min((low, high), key=lambda i: abs(share(cuts[i]) - macs))
        self.cut.copy_(cuts[best])
        return share(cuts[best])

    def _save_pretrained(self, folder):
        save_folder(self, folder)

    @classmethod
    def _from_pretrained(cls, *, model_id, **options):
        return load_folder(cls, model_id, **options)


def _before_attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attention needs: the normed rows, queries, keys and values."""
    h = block.norm1(x)
    return h, *backbone.split_heads(block, h)


def _after_attention(block: nn.Module, x: Tensor, h: Tensor, heads: Tensor, layout: Layout) -> Tensor:
    """The rest of the block."""
    x = x + backbone.drop_path(block.drop_path1, backbone.merge_heads(block, h, heads), layout)
    return x + backbone.drop_path(block.drop_path2, backbone.mlp_branch(block, x), layout)
