"""Heads: what a model says at the end. A class for each picture by timm's own head, or one for each pixel.

A head has `logits`, `macs`, `loss` and `accuracy`, and says whether its task is `dense`. The decoders of the dense one
(Segmenter, Strudel et al. 2021) work on the mixed-scale tokens themselves, through the same layouts as the backbone:
called `decoder(x [T, C], weight [T] or None, layout)` on patch tokens alone, they return `[T, K]`. What they say of a
token goes to all the fine patches that it covers, and from there bilinearly to the pixels.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..checks import one_of
from ..core import backbone
from ..core.attention import Layout, attend
from ..core.blocks import after_attention, before_attention, mlp
from ..core.macs import classifier_macs, linear_macs
from ..core.tokens import Tokens
from ..data import IGNORE

SEGMENTER_EPS = 1e-5  # of all of the decoder's norms
FIRST_EPS = 1e-6  # of those in its blocks until version 0.1


class ClassificationHead(nn.Module):
    """timm's own pooling and classifier, which stay in the backbone."""

    dense = False

    def num_classes(self, vit: nn.Module) -> int:
        return vit.num_classes

    def logits(self, vit: nn.Module, tokens: Tokens, size: tuple[int, int]) -> Tensor:
        """Return `[B, K]` from the tokens after the last norm."""
        return backbone.pooled_logits(vit, tokens)

    def macs(self, vit: nn.Module, tokens: Tensor, fine_patches: int) -> Tensor:
        """Return the head's MACs on so many tokens per picture, prefix included, int64 `[B]`."""
        return classifier_macs(vit, tokens)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy with labels `[B]` or, after mixup, with shares `[B, K]` (smoothed already)."""
        return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.is_floating_point() else smoothing)

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        return (logits.argmax(1) == labels).float().mean()


class SegmentationHead(nn.Module):
    """A class for each pixel, by a decoder on mixed-scale tokens: every pixel still has a token, so all are found.

        head = msvit.SegmentationHead(vit, classes=11, decoder="mask")
        logits = msvit.MSViT(vit, head=head)(images)  # [B, 11, H, W]

    While the gate trains, it also learns from which of the tokens over a patch the decoder should have read, with two
    scales y_i = m y_coarse(i) + (1 - m) y_i: the value of the hard decision and the gradient of this sum.

    Args:
        vit: For its width; the backbone's own head is left alone.
        classes: Their names, or how many.
        decoder: "linear" or "mask" (mask transformer).
        scatter: "after" the decoder, which then has as few tokens as the backbone, or "before" it.
        eps: Of the norms in the mask transformer's blocks; None is Segmenter's. Models of version 0.1 have another.
    """

    dense = True

    def __init__(
        self,
        vit: nn.Module,
        classes: int | list[str],
        decoder: str = "linear",
        scatter: str = "after",
        eps: float | None = None,
    ):
        super().__init__()
        one_of("decoder", decoder, DECODERS)
        one_of("scatter", scatter, ("after", "before"))
        self.classes = [f"class {k}" for k in range(classes)] if isinstance(classes, int) else list(classes)
        if len(self.classes) < 2:
            raise ValueError(f"classes={classes!r}: segmentation needs at least two")
        if eps is not None and decoder != "mask":
            raise ValueError(f"eps={eps!r}: the decoder {decoder!r} has no norms; leave it out, or use decoder='mask'")
        self.scatter = scatter
        self.settings: dict[str, Any] = {"classes": self.classes, "decoder": decoder, "scatter": scatter}
        own = {} if eps is None else {"eps": eps}
        self.settings |= own
        self.decoder = DECODERS[decoder](vit.embed_dim, len(self.classes), vit.blocks[0].attn.num_heads, **own)
        self.register_load_state_dict_pre_hook(_complete_decoder)

    def num_classes(self, vit: nn.Module) -> int:
        return len(self.classes)

    def no_weight_decay(self) -> set[str]:
        return {f"decoder.{name}" for name in getattr(self.decoder, "no_weight_decay", set)()}

    def logits(self, vit: nn.Module, tokens: Tokens, size: tuple[int, int]) -> Tensor:
        """Return `[B, K, *size]`; what lies beyond the size, where pictures were padded, is cut off."""
        grid = self.decode(vit, tokens).permute(0, 3, 1, 2)
        whole = [side * backbone.patch_size(vit) for side in grid.shape[-2:]]
        return F.interpolate(grid, whole, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]

    def decode(self, vit: nn.Module, tokens: Tokens) -> Tensor:
        """Return what the decoder makes of the tokens after the last norm: logits `[B, H_f, W_f, K]`."""
        prefix = vit.num_prefix_tokens
        seeing = (tokens.area > 0).nonzero()[:, 0]
        patches = tokens.select(seeing, [n - prefix for n in tokens.layout.lengths])
        x = vit.fc_norm(patches.x)
        if self.scatter == "after":
            return _covered(self.decoder(x, patches.weight, patches.layout), patches)
        grid = _covered(x, patches)
        b, rows, columns, _ = grid.shape
        layout = Layout([rows * columns] * b, x.device)
        return self.decoder(grid.flatten(0, 2), None, layout).view(b, rows, columns, -1)

    def macs(self, vit: nn.Module, tokens: Tensor, fine_patches: int) -> Tensor:
        """Return the decoder's MACs on so many tokens per picture, prefix included, int64 `[B]`."""
        patches = tokens - vit.num_prefix_tokens
        return self.decoder.macs(torch.full_like(tokens, fine_patches) if self.scatter == "before" else patches)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Return the cross-entropy with labels `[B, H, W]`."""
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, ignore_index=IGNORE)

    def accuracy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(1) == targets)[targets != IGNORE].float().mean()


def _covered(rows: Tensor, tokens: Tokens) -> Tensor:
    """Return the rows of the tokens on the fine grid, with the gate's gradient of which token covers a patch.

    y = sum_d a_d y_d over the tokens of all scales that cover a patch, whose activities add up to 1, has at hard
    decisions the value of the active one, and the gradient y_d - y by a_d.
    """
    grid = tokens.scatter(rows)
    if tokens.others is None:
        return grid
    gain = torch.zeros_like(grid)
    for others in tokens.others.unbind(1):
        seats = others.clamp(min=0)
        activity = tokens.activity[seats].masked_fill(others < 0, 0)[..., None]
        hard = (activity.detach() > 0.5).to(activity.dtype)
        gain = gain + (activity - hard).to(grid.dtype) * (rows.detach()[seats] - grid.detach())
    return grid + gain


class LinearDecoder(nn.Module):
    """The logits of each token by one linear layer."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
        """Return logits `[T, K]` of rows `[T, C]`."""
        return self.head(x)

    def macs(self, tokens: Tensor) -> Tensor:
        return tokens * linear_macs(self)


class MaskTransformer(nn.Module):
    """Segmenter's: class embeddings c_k pass through two blocks behind a picture's tokens, and meet them again:

        z = Norm(blocks([x W_dec + b, c])),   p_i = z_i W_patch,   q_k = z_(n + k) W_classes
        mask_ik = LayerNorm_k( p_i / |p_i| . q_k / |q_k| )

    The weight says how often a token counts as a key, as in the backbone; a class embedding counts once. It is as wide
    as the backbone and has as many heads. Parameters have the names that they have in Segmenter's checkpoints: what
    begins with "decoder." there loads into a `SegmentationHead` as it is.

    Args:
        eps: Of the norms in the blocks, 1e-5 in Segmenter.
    """

    def __init__(self, width: int, classes: int, heads: int, eps: float = SEGMENTER_EPS, depth: int = 2):
        super().__init__()
        norm = partial(nn.LayerNorm, eps=eps)
        self.cls_emb = nn.Parameter(torch.empty(1, classes, width))
        self.proj_dec = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, SEGMENTER_EPS)
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.mask_norm = nn.LayerNorm(classes, SEGMENTER_EPS)
        self.apply(_small_weights)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without decay, as the backbone's class token is."""
        return {"cls_emb"}

    def forward(self, x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
        """Return logits `[T, K]` of rows `[T, C]`."""
        classes, b = self.cls_emb.shape[1], len(layout.lengths)
        joint = Layout([n + classes for n in layout.lengths], x.device)
        last = joint.ends[1:, None] - classes + torch.arange(classes, device=x.device)
        place = torch.arange(len(x), device=x.device) + classes * layout.picture
        x = self.proj_dec(x).to(torch.promote_types(x.dtype, self.cls_emb.dtype))
        z = x.new_zeros(len(x) + b * classes, x.shape[1]).index_copy(0, place, x)
        z = z.index_copy(0, last.flatten(), self.cls_emb.to(x.dtype).expand(b, -1, -1).flatten(0, 1))
        if weight is not None:
            weight = weight.new_ones(len(z)).index_copy(0, place, weight)
        for block in self.blocks:
            normed, q, k, v = before_attention(block, z)
            z = after_attention(block, z, normed, attend(joint, q, k, v, weight), joint)
            z = mlp(block, z, joint)
        z = self.decoder_norm(z)
        p, q = z[place] @ self.proj_patch, z[last] @ self.proj_classes
        return self.mask_norm(_products(layout, *(y / y.norm(dim=-1, keepdim=True) for y in (p, q))))

    def macs(self, tokens: Tensor) -> Tensor:
        """Return proj_dec on the tokens, blocks and one more projection on all rows, and the products of both."""
        _, k, width = self.cls_emb.shape
        rows = tokens + k
        blocks = rows * linear_macs(self.blocks) + len(self.blocks) * 2 * rows**2 * width
        return blocks + (tokens + rows) * width**2 + tokens * k * width


def _complete_decoder(head: SegmentationHead, state: dict, prefix: str, *rest):
    """Complete the weights of a mask transformer of version 0.1: it had no projections, and other names and norms."""
    old = f"{prefix}decoder."
    if f"{old}classes" not in state:
        return
    state[f"{old}cls_emb"] = state.pop(f"{old}classes")[None]
    for part in ("weight", "bias"):
        state[f"{old}decoder_norm.{part}"] = state.pop(f"{old}norm.{part}")
    norm = state[f"{old}decoder_norm.weight"]
    state[f"{old}proj_dec.bias"] = torch.zeros_like(norm)
    for name in ("proj_dec.weight", "proj_patch", "proj_classes"):
        state[f"{old}{name}"] = torch.eye(len(norm), dtype=norm.dtype, device=norm.device)
    head.settings["eps"] = FIRST_EPS
    for block in head.decoder.blocks:
        block.norm1.eps = block.norm2.eps = FIRST_EPS


def _products(layout: Layout, rows: Tensor, classes: Tensor) -> Tensor:
    """Multiply each row `[T, C]` with its own picture's class embeddings `[B, K, C]`, `[T, K]`."""
    if layout.uniform or rows.is_cuda:
        return layout.unpad(layout.pad(rows) @ classes.transpose(1, 2))
    return torch.cat([part @ own.T for part, own in zip(rows.split(layout.lengths), classes, strict=True)])


def _small_weights(module: nn.Module):
    """Initialise weights as timm does those of a vision transformer."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


DECODERS = {"linear": LinearDecoder, "mask": MaskTransformer}
