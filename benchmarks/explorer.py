"""Times what a user of the explorer waits for on this machine: `python -m benchmarks.explorer`, a minute or two.

1. From the start of `make explorer`'s server to the first useful picture in a Chromium (aim: 15 s on two cores).
2. A step of the threshold: model, panels and all that goes to the browser (aim: 100 ms with a ViT-Ti at 224 px).
3. The gallery of 10,000 pictures: to run the shipped model and its dense one on JPEG files of 500 x 375 pixels, to show
   them, and to sort, filter and scroll them in the browser.
"""

import argparse
import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from msvit.explorer import Explorer
from msvit.explorer.gallery import Gallery
from msvit.explorer.models import load_model
from msvit.explorer.sources import PictureSource
from msvit.explorer.survey import Survey, survey

from .browser import CHROMIUM, ROOT, TOKEN, VOILA, WAITING, chromium, serving

# Runs the gallery's own script on its traits, without a kernel, and does what a user does.
SHOW = """traits => {
  const model = { get: (name) => traits[name], set() {}, save_changes() {}, send() {}, on() {}, off() {} };
  render({ model, el: document.body });
}"""
SORT, FILTER = (f"""() => {{
  const start = performance.now(), select = document.querySelectorAll('select')[{at}];
  select.value = '{option}';
  select.dispatchEvent(new Event('change'));
  document.body.getBoundingClientRect();
  return performance.now() - start;
}}""" for at, option in ((0, "most tokens"), (1, "differs from dense")))  # fmt: skip
SCROLL = """top => {
  const start = performance.now(), list = document.querySelector('.msvit-gallery');
  list.scrollTop = top;
  list.dispatchEvent(new Event('scroll'));
  document.body.getBoundingClientRect();
  return performance.now() - start;
}"""


def main(words: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.explorer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="whose threshold moves")
    parser.add_argument("--steps", type=int, default=20, help="of the threshold (default: 20)")
    parser.add_argument("--pictures", type=int, default=10_000, help="in the gallery (default: 10000)")
    parser.add_argument("--sample", type=int, default=256, help="that the model runs on, for all (default: 256)")
    parser.add_argument("--only", choices=("first", "step", "gallery"), help="one of the three")
    args = parser.parse_args(words)
    parts = {
        "first": first_picture,
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


def first_picture() -> dict[str, float]:
    """Return the seconds from the start of the server, as `make explorer` starts it, to the first model's panels."""
    recipe = (ROOT / "Makefile").read_text().partition("\nexplorer:")[2].partition("\n\n")[0]
    options = (*VOILA, *re.findall(r"--MappingKernelManager\S+", recipe))
    with tempfile.TemporaryDirectory() as private, chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(1000 * WAITING)
        start = time.perf_counter()
        with serving("voila", "notebooks/gate_explorer.ipynb", *options, folder=ROOT, private=Path(private)) as address:
            page.goto(f"{address}/?token={TOKEN}")
            page.wait_for_selector(".msvit-tokens")
            page.wait_for_function("[...document.querySelectorAll('.msvit img')].some(img => img.naturalWidth > 100)")
            return {"first_picture_s": time.perf_counter() - start}


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
    return found | (_in_browser(widget) if CHROMIUM else {})


def _in_browser(widget: Gallery) -> dict[str, float]:
    """Return the milliseconds that the browser takes over a gallery."""
    script = (ROOT / "msvit/explorer/gallery.js").read_text()
    traits = {name: getattr(widget, name) for name in ("names", "classes", "truth", "predicted", "dense", "loss")}
    traits |= {name: getattr(widget, name) for name in ("tokens", "thumb", "sheet", "version")}
    with chromium() as browser:
        page = browser.new_page()
        page.add_script_tag(content=script.replace("export default { render };", ""))
        page.evaluate(SHOW, traits)
        found = {"gallery_sort_ms": page.evaluate(SORT), "gallery_filter_ms": page.evaluate(FILTER)}
        page.locator("select").nth(1).select_option("all pictures")
        found["gallery_scroll_ms"] = statistics.median(page.evaluate(SCROLL, 900 * k) for k in range(20))
    return found


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
