"""`msvit export`: a finished run's model as graphs in files, each held against the model itself."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.backbone import convolution
from ..models.export import GRAPHS, check_exportable, exported, save_exported
from ..models.msvit import MSViT
from .runs import load_model, read_finished

PICTURES = 8


@torch.no_grad()
def export_run(folder: str, form: str = "onnx", out: str | None = None, parts: tuple = GRAPHS) -> list[dict[str, Any]]:
    """Write parts of a run's model, and return a line for each: its file, or why there is none.

    Each graph is compared with the model on pictures of noise, on which the gate decides otherwise than on the one that
    the graph was made with; `difference` is the largest one of an output, None where nothing runs ONNX here.

    Args:
        form: "onnx", or "torch" for `torch.export.load`.
        out: Folder of the files; None is the run's own.
    """
    read_finished(folder)
    model, lines = load_model(folder).eval(), []
    target = Path(out or folder)
    target.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(model)
    for part in parts:
        try:
            check_exportable(model, part)
        except ValueError as error:
            lines.append({"part": part, "file": None, "why": str(error)})
            continue
        program = exported(model, part, pictures[0])
        path = save_exported(program, target / part, form)
        run, own = _runner(path), model.gate if part == "gate" else model
        off = None if run is None else max((run(x) - own(x)).abs().max().item() for x in pictures)
        lines.append({"part": part, "file": str(path), "megabytes": path.stat().st_size / 1e6, "difference": off})
    return lines


def _pictures(model: MSViT) -> Tensor:
    """Return pictures one by one `[n, 1, c, H, W]`, of rising contrast."""
    shape = (PICTURES, 1, convolution(model.vit).in_channels, *model.vit.patch_embed.img_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise * torch.linspace(0.1, 2, PICTURES).view(-1, 1, 1, 1, 1)


def _runner(path: Path) -> Any:
    """Return a function that runs a file."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
