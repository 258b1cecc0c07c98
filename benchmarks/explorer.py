"""Times what a user of the explorer waits for on this machine: `python benchmarks/explorer.py`, a minute or two.

1. A step of the threshold: model, panels and all that goes to the browser (aim: 100 ms with a ViT-Ti at 224 px).
2. The gallery of 10,000 pictures: to run the shipped model and its dense one on JPEG files of 500 x 375 pixels, to send
   what the browser sorts and filters by, and to make a sheet of thumbnails.

The browser's own part comes on top.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from msvit.explorer import Explorer
from msvit.explorer.gallery import Gallery
from msvit.explorer.models import load_model
from msvit.explorer.sources import PictureSource
from msvit.explorer.survey import Survey, survey


def main(words: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="whose threshold moves")
    parser.add_argument("--steps", type=int, default=20, help="of the threshold (default: 20)")
    parser.add_argument("--pictures", type=int, default=10_000, help="in the gallery (default: 10000)")
    parser.add_argument("--sample", type=int, default=256, help="that the model runs on, for all (default: 256)")
    parser.add_argument("--only", choices=("step", "gallery"), help="one of the two")
    args = parser.parse_args(words)
    parts = {
        "step": lambda: threshold_steps(args.model, args.steps),
        "gallery": lambda: gallery(args.pictures, args.sample),
    }
    found = {}
    for name, part in parts.items():
        if args.only in (None, name):
            found |= part()
    for name, value in found.items():
        print(f"{name:24} {value:9.4g}")
    return found


def threshold_steps(model: str, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step, whole and of the model alone: medians, and the longest."""
    explorer = Explorer(model, source="scenes: middle")
    row = explorer.rows[0]
    soft = torch.from_numpy(row.gated.soft).flatten()
    whole, alone = [], []
    for share in np.linspace(0.1, 0.9, steps + 2):
        whole.append(_milliseconds(partial(setattr, explorer.threshold, "value", soft.quantile(share).item())))
        alone.append(_milliseconds(lambda: row.gated.run(row.state.levels)))
    return {  # but for the first two, which warm up
        "threshold_step_ms": statistics.median(whole[2:]),
        "threshold_longest_ms": max(whole[2:]),
        "threshold_model_ms": statistics.median(alone[2:]),
    }


def gallery(pictures: int, sample: int) -> dict[str, float]:
    """Return the times of a gallery; that of running the model on all is scaled up from a sample."""
    loaded, widget, buffer = load_model("scenes", "none"), Gallery(), io.BytesIO()
    Image.effect_noise((500, 375), 40).convert("RGB").save(buffer, "JPEG")
    source = PictureSource({f"{i}.jpg": buffer.getvalue() for i in range(sample)})
    start = time.perf_counter()
    some = survey(loaded, source)
    made = (time.perf_counter() - start) * pictures / sample
    at = np.arange(pictures) % sample
    columns = {name: getattr(some, name)[at] for name in ("truth", "predicted", "dense", "loss", "tokens", "thumbs")}
    whole = Survey([f"{i}.jpg" for i in range(pictures)], **columns)
    found = {"gallery_made_s": made, "gallery_shown_ms": _milliseconds(lambda: widget.show(whole, loaded))}
    found["gallery_sheet_ms"] = _milliseconds(lambda: whole.sheet(0))
    return found


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
