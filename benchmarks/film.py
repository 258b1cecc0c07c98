"""Films the explorer in a real Chromium: the threshold moves, then a mask is painted. One command, a minute or two:

python -m benchmarks.film                                           # writes reports/explorer.gif
python -m benchmarks.film --model scenes --source "scenes: middle"
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nbformat
from PIL import Image, ImageDraw

from .browser import ROOT, TOKEN, VOILA, chromium, serving

WINDOW = {"width": 1180, "height": 620}
CURSOR = [(0, 0), (0, 17), (4, 13), (7, 19), (10, 18), (7, 12), (12, 12)]  # a screenshot has none
TRACK = (0.5, 0.65, 0.8, 0.99, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.15, 0.01, 0.15, 0.3, 0.4, 0.5)
STROKES = (("coarse", 0.3), ("fine", 0.7))  # brushes, and where on the picture's height each paints
COLOURS = 96
WAITING = 600  # seconds, on a machine that does much else
ANSWER = 5_000  # milliseconds in which the kernel answers, if it does
MOST_BYTES = 3_000_000


class Frame(NamedTuple):
    image: Image.Image
    milliseconds: int


def main(words: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.film", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="photo", help="as in the notebook gate_explorer (default: photo)")
    parser.add_argument("--source", default="photographs")
    parser.add_argument("--picture", type=int, default=3, help="which of the source's pictures (default: 3)")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/explorer.gif")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = f"from msvit.explorer import Explorer\n\nExplorer({args.model!r}, source={args.source!r}, runs='runs')"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
        nbformat.write(notebook, folder / "film.ipynb")  # the explorer alone, without prose
        with serving("voila", "film.ipynb", *VOILA, folder=folder, private=folder, waiting=WAITING) as address:
            frames = list(film(f"{address}/?token={TOKEN}", args.picture))
    print(f"{args.out}: {len(frames)} frames, {write_gif(frames, args.out) / 1e6:.2f} MB")


def film(address: str, picture: int) -> Iterator[Frame]:
    """Yield the frames: the threshold goes up, down and back to the middle, then the brush paints two strokes."""
    with chromium() as browser:
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(1000 * WAITING)
        page.goto(address)
        page.wait_for_selector(".msvit-tokens")
        pictures = page.locator(".widget-dropdown select").nth(3)
        _do(page, partial(pictures.select_option, index=picture))
        track = page.locator(".widget-slider .noUi-target").first.bounding_box()
        y = track["y"] + track["height"] / 2
        for share in TRACK:
            x = track["x"] + share * track["width"]
            _do(page, partial(page.mouse.click, x, y))
            yield _shot(page, x, y, 900 if share in (0.5, 0.99, 0.01) else 170)
        canvas = page.locator(".msvit-canvas").first.bounding_box()
        for brush, height in STROKES:
            page.get_by_role("button", name=brush, exact=True).click()
            y = canvas["y"] + height * canvas["height"]
            for k in range(4):
                x = canvas["x"] + (k + 0.5) / 4 * canvas["width"]
                _do(page, partial(_drag, page, x, y, k == 0))
                yield _shot(page, x, y, 350)
            page.mouse.up()
        page.wait_for_function("document.querySelector('.msvit-figures').textContent.includes('ms, dense')")
        yield _shot(page, x, y, 2500)


def _drag(page, x: float, y: float, begin: bool):
    page.mouse.move(x, y, steps=4)
    if begin:
        page.mouse.down()


def _do(page, action: Callable[[], object]):
    """Do something, and wait until the page has drawn the kernel's answer, or until it is clear that none comes."""
    from playwright.sync_api import TimeoutError

    before = page.inner_html(".msvit-figures")
    action()
    with suppress(TimeoutError):
        changed = "before => document.querySelector('.msvit-figures').innerHTML !== before"
        page.wait_for_function(changed, arg=before, timeout=ANSWER)
    page.wait_for_timeout(500)


def _shot(page, x: float, y: float, milliseconds: int) -> Frame:
    """Return the window as it is, with a cursor at (x, y)."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    ImageDraw.Draw(image).polygon([(x + dx, y + dy) for dx, dy in CURSOR], "black", "white")
    return Frame(image, milliseconds)


def write_gif(frames: list[Frame], path: Path) -> int:
    """Write frames as a GIF that repeats for ever, in one palette, and return its size in bytes."""
    width, height = frames[0].image.size
    strip = Image.new("RGB", (width, 3 * height))
    for k, at in enumerate((0, len(frames) // 2, -1)):
        strip.paste(frames[at].image, (0, k * height))
    palette = strip.quantize(COLOURS)
    images = [frame.image.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    durations = [frame.milliseconds for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise RuntimeError(f"{path} has {size / 1e6:.1f} MB; a README takes {MOST_BYTES / 1e6:.0f}")
    return size


if __name__ == "__main__":
    main()
