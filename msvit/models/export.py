"""A model as graphs that run without this package: the gate, the masked model, and the packed one for one picture."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import one_of
from ..core.blocks import run_blocks
from ..gating.base import Rule
from ..gating.gate import Quadtree
from .msvit import MSViT

GRAPHS, FORMATS = ("gate", "masked", "packed"), ("torch", "onnx")


class PackedPicture(nn.Module):
    """Logits of one picture by its active tokens alone; their number is a variable of the graph.

    All candidates are embedded, which is a single linear layer, and the active ones picked before the first block.
    """

    def __init__(self, model: MSViT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model = self.model
        gating = model.decide(images)
        tokens = model.tokenize(images, gating, "masked")
        rows = (tokens.activity > 0.5).nonzero()[:, 0]
        packed = replace(tokens.select(rows, [rows.shape[0]]), activity=None)
        final = run_blocks(model.vit, packed).final
        return model.head.logits(model.vit, final, images.shape[-2:])


def exported(model: MSViT, part: str, images: Tensor) -> torch.export.ExportedProgram:
    """Return a part of a model as a graph of `torch.export`.

    Args:
        part: "gate", which takes any number of pictures; "masked", all candidates, those that are inactive hidden,
            which takes as many pictures as there are here; "packed", which takes one.
        images: Of the size that the graph is to take, `[B, c, H, W]`.
    """
    check_exportable(model, part)
    with model.evaluating(), torch.no_grad():
        if part == "gate":
            pictures = torch.cat([images, images])[:2]
            sizes = ({0: torch.export.Dim("pictures", min=1)},)
            return torch.export.export(model.gate, (pictures,), dynamic_shapes=sizes)
        if part == "masked":
            return torch.export.export(model, (images,))
        return torch.export.export(PackedPicture(model).eval(), (images[:1],))


def check_exportable(model: MSViT, part: str):
    """Raise a ValueError that says why a part of a model cannot be a graph."""
    one_of("part", part, GRAPHS)
    if part == "gate" and isinstance(model.gate, Rule):
        raise ValueError(f"{type(model.gate).__name__} is a rule, which has nothing to export; export 'masked' instead")
    if part == "gate" and isinstance(model.gate, Quadtree):
        raise ValueError("a quadtree has a gate for each size of regions, which are no one graph; export 'masked'")
    if model.reducer is not None and part != "gate":
        raise ValueError(
            f"{type(model.reducer).__name__} drops or merges tokens by what they hold, picture by picture, which a "
            "graph of fixed steps cannot follow; export the model without its reducer"
        )
    if model.head.dense and part == "packed":
        raise ValueError("part='packed' with a dense head, whose map is made picture by picture; export 'masked'")


def save_exported(program: torch.export.ExportedProgram, path: str | Path, form: str = "onnx") -> Path:
    """Write a graph as `path`.pt2 for `torch.export.load`, or as `path`.onnx, and return the file."""
    one_of("form", form, FORMATS)
    path = Path(path).with_suffix(".onnx" if form == "onnx" else ".pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "torch":
        torch.export.save(program, path)
    else:
        torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)
    return path
