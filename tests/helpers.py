"""What several test files share: pictures on disk, models to compare, and checks that more than one makes."""

import io
import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import msvit
from msvit.core.blocks import run_blocks
from msvit.data.loaders import set_epoch
from msvit.data.scenes import Scenes
from msvit.explorer.drawing import PANEL_WIDTH
from msvit.explorer.models import LoadedModel
from msvit.explorer.panels import panels_of
from msvit.explorer.sources import BuiltInSource
from msvit.explorer.state import run_backbone, run_gate
from msvit.models.heads import SegmentationHead
from msvit.models.msvit import EXECUTIONS
from msvit.reducers.registry import make_reducer
from msvit.training.recipe import Recipe

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def cells_of(notebook: str) -> Iterator[tuple[str, bool]]:
    """The sources of a notebook's code cells, and whether each is the one with the parameters."""
    for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"]), "parameters" in cell["metadata"].get("tags", ())


def papermill(notebook, to, /, *typed, **parameters):
    """Run a notebook as a user does: `-p` for each parameter, `typed` as it is."""
    words = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    program = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command = [*program, str(NOTEBOOKS / f"{notebook}.ipynb"), str(to), *words, *typed]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=to.parent)


def run_small(notebook, folder, /, *typed, **parameters):
    """Run a notebook into `folder/runs` and `folder/out`, and return the latter."""
    folders = {"runs": folder / "runs", "out": folder / "out"}
    done = papermill(notebook, folder / "out.ipynb", *typed, **folders | parameters)
    assert done.returncode == 0, done.stderr[-2000:]
    return folders["out"]


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
    return model.head.decode(model.vit, encode(model, images, gating, execution))


def slope_inside(loss, hard, index, eps=1e-4):
    """dL/dm by differences of second order at a decision of 0 or 1, taken to between the two: no weight is below 0."""
    step = torch.zeros(hard.numel(), dtype=hard.dtype)
    step[index] = eps * (1 - 2 * hard.flatten()[index])
    moved = [(hard + n * step.view_as(hard)).requires_grad_() for n in range(3)]
    at, near, far = (torch.as_tensor(loss(m), dtype=hard.dtype).item() for m in moved)
    return (4 * near - 3 * at - far) / (2 * step[index].item())


def check_slopes(loss, at, places, eps=1e-5):
    """Assert that the gradient of a loss is, at some places of a vector, what central differences are."""
    gradient = torch.autograd.grad(loss(there := at.clone()), there)[0]
    for i in places:
        step = torch.zeros_like(at).index_fill(0, torch.tensor([i]), eps)
        slope = (loss(at + step) - loss(at - step)).item() / (2 * eps)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def shake(vit):
    """Random values where timm starts with zeros, ones or 1e-5, so that nothing drops out of a comparison."""
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if p.dim() == 1 or "token" in name or "pos_embed" in name or "latent" in name:
                p.add_(0.2 * torch.randn_like(p))
    return vit.eval()


def assert_all_fine_is_timm(vit, size):
    """Assert that a backbone with all tokens fine answers as timm's, in every execution."""
    images, model = torch.randn(2, 3, *size), msvit.MSViT(vit).eval()
    fine = torch.zeros(model.grid(size), dtype=torch.bool)
    with torch.no_grad():
        expected = vit(images)
        assert expected.std() > 0.01
        for execution in EXECUTIONS:
            assert (model.run(images, fine, execution).logits - expected).abs().max() <= 1e-5


def mini_model(seed=0):
    torch.manual_seed(seed)
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64")).eval()
    model.vit.head.weight.data *= 20  # so that a change of tokens changes the answer visibly
    return model


def check_panels(gated, titles):
    """Assert that panels are of one width, and different at two thresholds but for those that promise to stay."""
    panels = panels_of(gated.loaded)
    assert list(panels) == titles
    states = [run_backbone(gated, threshold) for threshold in (0.0, 1.0)]
    for title, panel in panels.items():
        pictures = [panel.draw(state) for state in states]
        assert {picture.width for picture in pictures} == {PANEL_WIDTH}
        assert np.array_equal(*map(np.asarray, pictures)) == panel.fixed, title


# Titles of the explorer's panels.
COMMON = ["Picture", "Gate: m (1 = coarse)", "Mixed-scale tokens", "Pixels in the tokens"]
SEGMENTED = ["Prediction", "Ground truth", "Error"]


def segmenter_of(seed=0, reducer=None, classes=None, **settings):
    """A small segmenter of random weights that predicts several classes."""
    torch.manual_seed(seed)
    vit = timm.create_model("vit_mini_patch8_64", num_classes=0)
    parts = {"reducer": make_reducer(reducer, vit)} if reducer else {}
    classes = Scenes(1, difficulty="easy").regions if classes is None else classes
    model = segmenting(msvit.MSViT(vit, **parts), classes, **settings).eval()
    model.head.decoder.head.weight.data.normal_()
    return model


def reduced(name, **settings):
    """The mini model with a reducer, as the explorer loads it."""
    model = mini_model()
    model.reducer = make_reducer(name, model.vit, **settings)
    return LoadedModel.of(name, model.eval())


def gate_of(loaded, index=1):
    """The gate's output on an easy scene."""
    source = BuiltInSource("scenes:easy")
    return run_gate(loaded, source.picture(source.names()[index], loaded.size))


def open_explorer(*models, **settings):
    pytest.importorskip("anywidget", reason="anywidget is not installed (extra `notebooks`)")
    from msvit.explorer import Explorer

    return Explorer(*models, **settings)


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


def write_run(folder, **settings):
    """A finished run as training leaves it, without the training."""
    recipe = Recipe(**settings)
    path = folder / recipe.run_name
    path.mkdir(parents=True)
    (path / "settings.json").write_text(json.dumps(recipe.to_dict()))
    summary = {
        "accuracy": 0.9 - recipe.gating.target / 10,
        "macs": recipe.gating.target,
        "tokens": 30.0,
        "coarse": 0.5,
        "seconds": 2.0,
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


# Rotary positions as timm's `Eva` makes them.
ROTARY = [
    {},
    {"ref_feat_shape": (4, 5), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy", "attn_type": "rope"},
    {"rope_rotate_half": True, "rope_temperature": 100.0},
    {"rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": 100.0, "num_reg_tokens": 2},
    {"rope_type": "mixed", "rope_temperature": 10.0, "rope_grid_indexing": "xy", "attn_type": "rope"},
    {"rope_type": "mixed", "rope_temperature": 10.0, "use_abs_pos_emb": False},
    {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
]


def plotted(page: str) -> list[list[dict]]:
    """The traces of each of a page's plotly figures."""
    return [json.loads(data) for data in re.findall(r"Plotly\.newPlot\(\s*\S+\s*(\[.*?\}\]),\s*\{", page)]
