"""What several test files share: pictures on disk, models to compare, and checks that more than one makes."""

import io
import struct
import zlib

import numpy as np
import timm
import torch
from PIL import Image

import msvit
from msvit.core.blocks import run_blocks
from msvit.data.loaders import set_epoch
from msvit.explorer import drawing, panels
from msvit.explorer import state as view
from msvit.models.heads import SegmentationHead


def write_folder(root, train=6, val=3, classes=("cat", "dog"), size=(40, 30)):
    """A small folder of pictures, each of one colour with a gradient, so that a flip or crop shows."""
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 200, 3) + np.arange(size[0])[None, :, None] + np.zeros((size[1], 1, 1))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def epoch(loaders, e):
    set_epoch(loaders.train, e)
    return list(loaders.train)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def encode(model, images, gating, execution=None):
    """The tokens after the last block and the last norm."""
    return run_blocks(model.vit, model.tokenize(images, gating, execution), model.reducer).final


def decode(model, images, gating, execution=None):
    """What a decoder makes of them on the fine grid, `[B, H_f, W_f, K]`."""
    return model.head.decode(model.vit, encode(model, images, gating, execution), gating.decisions)


def shake(vit):
    """Random values where timm starts with zeros, ones or 1e-5, so that nothing drops out of a comparison."""
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if p.dim() == 1 or "token" in name or "pos_embed" in name or "latent" in name:
                p.add_(0.2 * torch.randn_like(p))
    return vit.eval()


def mini_model(seed=0):
    torch.manual_seed(seed)
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64")).eval()
    model.vit.head.weight.data *= 20  # so that a change of tokens changes the answer visibly
    return model


def check_panels(look, titles):
    """All of one width, and different at two thresholds but for those that promise to stay."""
    shown = panels.shown(look.subject)
    assert list(shown) == titles
    states = [view.see(look, threshold) for threshold in (0.0, 1.0)]
    for title, panel in shown.items():
        pictures = [panel.draw(state) for state in states]
        assert {picture.width for picture in pictures} == {drawing.SIDE}
        assert np.array_equal(*map(np.asarray, pictures)) == panel.fixed, title


COMMON = ["Picture", "Gate: probability of coarse", "Mixed-scale tokens", "Pixels in the tokens"]


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side):
    """A PNG of side x side white pixels in a few kilobytes a megapixel; its header is all that may be read."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer, row = zlib.compressobj(1), b"\0" + b"\xff" * (side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gradient(mode="RGB", size=(64, 48)):
    return Image.linear_gradient("L").resize(size).convert(mode)


def segmenting(model, classes, decoder="linear", scatter="after"):
    """Another model of the same parts, with a segmentation head."""
    head = SegmentationHead(model.vit, classes, decoder, scatter)
    made = msvit.MSViT(model.vit, model.scale, model.gate, model.margin, model.reducer, head=head)
    made.coarse_embed = model.coarse_embed
    made.cut.copy_(model.cut)
    return made
