"""Semantic segmentation on mixed-scale tokens: every pixel still has a token, so a decoder finds all of them.

The decoders (see `msvit.decoders`) work on the mixed-scale tokens themselves, through the same layouts as the backbone.
What they say of a token goes to all the fine patches that it covers, and from there bilinearly to the pixels.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..checks import check_images
from ..core import backbone
from ..core import macs as measure
from ..core import tokens as tk
from ..core.attention import Layout
from ..core.tokens import Tokens
from ..reducers.registry import check_lossless
from .decoders import DECODERS
from .hub import CONFIG, load_folder, save_folder
from .msvit import Gating, MSViT, Result


class Segmenter(MSViT):
    """An MSViT whose head is a decoder.

        model = msvit.segment.Segmenter(msvit.MSViT(vit), classes=11, decoder="mask")
        logits = model(images)

    Pictures whose sides are no multiples of the coarse patch are padded with the mean colour at bottom and right, and
    what is predicted there is cut off again. Masks and gates are those of the padded picture, see `grid`.

    While the gate trains, it also learns from which of a cell's two tokens the decoder should have read:
    y_i = m y_coarse(i) + (1 - m) y_i, with the value of the hard decision and the gradient of this sum.

    Args:
        model: Backbone and gate (of a classifier, say) are used as they are, not copied; the backbone's own head is
            left alone.
        classes: Their names, or how many.
        decoder: "linear" or "mask" (mask transformer).
        scatter: "after" the decoder, which then has as few tokens as the backbone, or "before" it.
    """

    def __init__(self, model: MSViT, classes: int | list[str], decoder: str = "linear", scatter: str = "after"):
        check_lossless(model.reducer)
        super().__init__(model.vit, model.scale, model.gate, model.margin, model.reducer)
        self.coarse_embed = model.coarse_embed
        self.cut.copy_(model.cut)
        if decoder not in DECODERS:
            raise ValueError(f"decoder={decoder!r}; use one of {', '.join(DECODERS)}")
        if scatter not in ("after", "before"):
            raise ValueError(f"scatter={scatter!r}; tokens go to the fine grid 'after' or 'before' the decoder")
        self.classes = [f"class {k}" for k in range(classes)] if isinstance(classes, int) else list(classes)
        if len(self.classes) < 2:
            raise ValueError(f"classes={classes!r}: segmentation needs at least two")
        self.settings = {"classes": self.classes, "decoder": decoder, "scatter": scatter}
        self.scatter = scatter
        self.decoder = DECODERS[decoder](self.vit.embed_dim, len(self.classes), self.vit.blocks[0].attn.num_heads)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Coarse regions (h, w) of a picture of `size` pixels once it is padded."""
        return -(-size[0] // self.coarse_patch), -(-size[1] // self.coarse_patch)

    def pad(self, images: Tensor) -> Tensor:
        """Pictures with sides that are multiples of the coarse patch."""
        bottom, right = (-side % self.coarse_patch for side in images.shape[-2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images

    def run(
        self, images: Tensor, mask: Tensor | None = None, execution: str | None = None, check: bool = False
    ) -> Result:
        """Logits for each pixel, `[B, K, H, W]`, and what was decided on the way.

        Arguments and result are those of `MSViT.run`; the MACs include the decoder's.
        """
        check_images(images, self.vit.patch_embed.proj.in_channels, 1, finite=check)
        height, width = images.shape[-2:]
        images = self.pad(images)
        result = self._result(images, self.decide(images, mask), execution, gated=mask is None)
        return result._replace(logits=result.logits[..., :height, :width])

    def _read_out(self, tokens: Tokens, gating: Gating) -> Tensor:
        """The decoder's logits on the pixels of the padded picture, `[B, K, H, W]`."""
        grid = self.decode(tokens, gating).permute(0, 3, 1, 2)
        size = [side * backbone.patch_size(self.vit) for side in grid.shape[-2:]]
        return F.interpolate(grid, size, mode="bilinear", align_corners=False)

    def decode(self, tokens: Tokens, gating: Gating) -> Tensor:
        """What the decoder makes of the tokens of `encode`: logits on the fine grid, `[B, H_f, W_f, K]`."""
        others = self._others(tokens, gating)
        seeing = (tokens.area > 0).nonzero()[:, 0]
        prefix = backbone.prefix_count(self.vit)
        lengths = [n - prefix for n in tokens.layout.lengths]
        patches = tokens.select(seeing, lengths)
        if others is not None:
            others = replace(tokens, where=others).select(seeing, lengths).where
        x = self.vit.fc_norm(patches.x)
        if self.scatter == "after":
            logits = self.decoder(x, patches.weight, patches.layout)
            return _covered(logits, patches, others, gating)
        grid = _covered(x, patches, others, gating)
        b, rows, columns, _ = grid.shape
        layout = Layout([rows * columns] * b, x.device)
        return self.decoder(grid.flatten(0, 2), None, layout).view(b, rows, columns, -1)

    def _others(self, tokens: Tokens, gating: Gating) -> Tensor | None:
        """The row that would cover each fine patch if its region were decided the other way, `[B, H_f, W_f]`.

        -1 where trimming left it out; None where no gate learns from it, or where a reducer has merged the tokens.
        """
        if tokens.activity is None or not gating.decisions.requires_grad or self.reducer is not None:
            return None
        activity, rows, _ = self._choose(gating, "trimmed")
        if len(rows) < len(tokens.x):  # masked execution
            rows = torch.arange(activity.numel(), device=rows.device)
        seats = rows.new_full((activity.numel(),), -1)
        seats[rows] = torch.arange(len(rows), device=rows.device)
        start = torch.arange(len(activity), device=rows.device)[:, None, None] * activity.shape[1]
        decided_otherwise = gating.decisions.detach() <= 0.5
        return seats[tk.candidate_map(decided_otherwise, self.scale, backbone.prefix_count(self.vit)) + start]

    def dense_macs(self, size: tuple[int, int]) -> int:
        """MACs of backbone and decoder on a picture of `size` pixels with all tokens fine, without gate and reducer."""
        regions = math.prod(self.grid(size))
        tokens = torch.tensor([backbone.prefix_count(self.vit) + regions * self.scale**2])
        counts = measure.plan(len(self.vit.blocks), tokens)
        return int(measure.path_macs(self.vit, tokens, counts) + self._decoder_macs(counts[-1, 1], regions))

    def _macs(self, tokens: Tensor, regions: int, gated: bool, counts: Tensor | None = None) -> Tensor:
        if counts is None:
            counts = measure.plan(len(self.vit.blocks), tokens, self.reducer)
        return super()._macs(tokens, regions, gated, counts) + self._decoder_macs(counts[-1, 1], regions)

    def _decoder_macs(self, tokens: Tensor, regions: int) -> Tensor:
        """What the decoder has over the backbone's own head, which does not run."""
        patches = tokens - backbone.prefix_count(self.vit)
        if self.scatter == "before":
            patches = torch.full_like(tokens, regions * self.scale**2)
        return self.decoder.macs(patches) - measure.head_macs(self.vit, tokens)

    def calibrate(self, loader, macs: float = 0.6) -> float:
        """As `MSViT.calibrate`, with MACs that include the decoder."""
        images = (batch if isinstance(batch, Tensor) else batch[0] for batch in loader)
        return super().calibrate(map(self.pad, images), macs)

    def _save_pretrained(self, folder):
        save_folder(self, folder)
        path = Path(folder) / CONFIG
        config = json.loads(path.read_text()) | {"segmenter": self.settings}
        path.write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id, **options):
        settings = _settings(model_id, options)
        if settings is None:
            raise ValueError(
                f"{model_id} holds a classifier; build Segmenter(MSViT.from_pretrained({str(model_id)!r}), classes=…) "
                "on it and train its decoder"
            )
        return load_folder(lambda vit, **parts: cls(MSViT(vit, **parts), **settings), model_id, **options)


def load(model_id: str, **options) -> MSViT:
    """The model of a run's folder or of a hub id: a `Segmenter` if it is one, else an `MSViT`."""
    kind = MSViT if _settings(model_id, options) is None else Segmenter
    return kind.from_pretrained(model_id, **options)


def _settings(model_id: str, options: dict) -> dict | None:
    """What the config of a folder or a hub id says of a decoder; None for a classifier."""
    path = Path(model_id) / CONFIG
    if not Path(model_id).is_dir():
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        path = Path(hf_hub_download(model_id, CONFIG, **{k: v for k, v in options.items() if k in known}))
    if not path.is_file():
        raise FileNotFoundError(f"{model_id} has no {CONFIG}; is it a folder that save_pretrained wrote?")
    return json.loads(path.read_text()).get("segmenter")


@torch.no_grad()
def slide(model: Segmenter, images: Tensor, window: int, stride: int, mask: Tensor | None = None) -> Result:
    """Evaluation through windows of the size that the model was trained with: logits are means over windows.

    The gate sees one region at a time, so that it decides once for the whole picture, and all windows follow.

    Args:
        window: Side in pixels; a multiple of the coarse patch.
        stride: From a window to the next, likewise. The last one ends where the picture does.
        mask: Decisions instead of the gate's, as in `MSViT.run`, for all regions of the picture.
    """
    patch = model.coarse_patch
    if window % patch or stride % patch or not 0 < stride <= window:
        raise ValueError(
            f"window={window}, stride={stride}: both are multiples of the coarse patch of {patch} px, "
            "and the stride is not the larger one"
        )
    check_images(images, model.vit.patch_embed.proj.in_channels, 1)
    (height, width), (h, w) = images.shape[-2:], model.grid(images.shape[-2:])
    images = model.pad(images)
    gating = model.decide(images, mask)
    coarse = gating.decisions > 0.5
    rows, columns = max(h, window // patch), max(w, window // patch)
    images = F.pad(images, (0, (columns - w) * patch, 0, (rows - h) * patch))
    padded = F.pad(coarse, (0, columns - w, 0, rows - h), value=True)
    total = images.new_zeros(len(images), len(model.classes), *images.shape[-2:])
    count = images.new_zeros(images.shape[-2:])
    tokens, macs = 0, measure.gate_macs(model.gate, h * w) if mask is None else 0
    for y in _starts(rows * patch, window, stride):
        for x in _starts(columns * patch, window, stride):
            at = (slice(None), slice(y // patch, (y + window) // patch), slice(x // patch, (x + window) // patch))
            seen = model.run(images[..., y : y + window, x : x + window], padded[at])
            total[..., y : y + window, x : x + window] += seen.logits
            count[y : y + window, x : x + window] += 1
            tokens, macs = tokens + seen.tokens, macs + seen.macs
    logits = (total / count)[..., :height, :width]
    return Result(logits, gating.soft, gating.scores, coarse, tokens, macs)


def _starts(side: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, side - window, stride), side - window})


def _covered(rows: Tensor, tokens: Tokens, others: Tensor | None, gating: Gating) -> Tensor:
    """Rows of the tokens on the fine grid, with the gate's gradient of which token covers a patch.

    y = m c + (1 - m) f has at a hard m the value of the one token, and the gradient c - f by m.
    """
    grid = tokens.scatter(rows)
    if others is None:
        return grid
    scale = grid.shape[1] // gating.decisions.shape[1]
    m = gating.decisions.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[..., None]
    hard = (m.detach() > 0.5).to(m.dtype)
    other = replace(tokens, where=others).scatter(rows.detach())
    gain = (grid.detach() - other) * (2 * hard - 1)
    return grid + ((m - hard) * gain.masked_fill(others[..., None] < 0, 0)).to(grid.dtype)
