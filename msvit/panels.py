"""The panels of the explorer, and the whole view as one file.

A panel is a function from a `view.State` to a picture `SIDE` pixels wide; a new one is a line in PANELS.
"""

import base64
import html
import io
import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .view import FREE, State, as_the_model_sees

SIDE = 448  # of a panel in pixels; on a screen it is shown at half of that
FINE, COARSE = (86, 180, 233), (230, 159, 0)  # Okabe and Ito's sky blue and orange, told apart by any eye
INK = (34, 34, 34)
# Nine anchors of cividis (Nuñez, Anderton and Renslow 2018): blue to yellow, ever lighter, to the colour-blind too.
CIVIDIS = np.array([
    (0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120), (155, 148, 118), (188, 174, 108),
    (222, 201, 88), (254, 232, 56),
])  # fmt: skip
STYLE = """<style>
.msvit-title, .msvit-figures, .msvit-message { font: 14px/22px var(--jp-ui-font-family, sans-serif); }
.msvit-title, .msvit-figures { color: var(--jp-ui-font-color1, #222); }
.msvit-title { font-weight: 600; font-size: 13px; white-space: nowrap; }
.msvit-figures { font-variant-numeric: tabular-nums; border-top: 1px solid #bbb; padding-top: 8px; margin-top: 4px; }
.msvit-figures b { font-size: 17px; }
.msvit-figures span { display: inline-block; margin-right: 26px; white-space: nowrap; }
.msvit-message { padding: 6px 10px; border-left: 4px solid #D55E00; background: #fdf1e7; color: #222; }
.msvit-message { overflow-wrap: anywhere; }
.msvit-good { border-color: #009E73; background: #e9f6f1; }
.msvit img { width: 100%; }
</style>"""


# ---- panels: each a function of the state alone


def picture_panel(state: State) -> Image.Image:
    """The picture, at the resolution that the model has it in."""
    return _enlarged(state.look.shot.image)


def gate_panel(state: State) -> Image.Image:
    """m of each region, from blue (fine) to yellow (coarse), with its scale and the threshold below."""
    soft = state.look.soft
    panel = _enlarged(Image.fromarray(colours(soft)), state.look.shot.image.size)
    (width, height), (h, w) = panel.size, soft.shape
    canvas = ImageDraw.Draw(panel)
    if max(h, w) <= 10:
        for r, c in np.ndindex(h, w):
            at = ((c + 0.5) * width / w, (r + 0.5) * height / h)
            ink = "black" if soft[r, c] > 0.55 else "white"
            canvas.text(at, f"{soft[r, c]:.2f}", ink, font(20), anchor="mm")
    scale = Image.new("RGB", (width, 56), "white")
    bar = Image.fromarray(colours(np.linspace(0, 1, width - 40)[None])).resize((width - 40, 16))
    scale.paste(bar, (20, 12))
    canvas, x = ImageDraw.Draw(scale), 20 + state.threshold * (width - 40)
    canvas.polygon([(x, 20), (x - 8, 4), (x + 8, 4)], COARSE, INK)
    canvas.line([(x, 12), (x, 30)], INK, 3)
    ends, cut = ("0 fine", "1 coarse"), cut_text(state.threshold)
    left, right, half = (canvas.textlength(text, font(18)) for text in (*ends, cut))
    middle = min(max(x, 32 + left + half / 2), width - 32 - right - half / 2)  # beside the ends, not over them
    for at, text, anchor in ((20, ends[0], "lt"), (middle, cut, "mt"), (width - 20, ends[1], "rt")):
        canvas.text((at, 36), text, INK, font(18), anchor=anchor)
    return _stacked([panel, scale])


def grid_panel(state: State) -> Image.Image:
    """The tokens on the picture: an orange, hatched frame is one coarse token, a blue cross fine ones."""
    panel = _enlarged(state.look.shot.image)
    veil = Image.new("RGBA", panel.size)
    canvas, k, (h, w) = ImageDraw.Draw(veil), state.look.subject.model.scale, state.coarse.shape
    sy, sx = panel.height / h, panel.width / w
    for r, c in sorted(np.ndindex(h, w), key=lambda at: state.coarse[at]):
        y, x = r * sy, c * sx
        if state.coarse[r, c]:
            for t in np.arange(0.25, 2, 0.25):  # diagonals, cut at the region's borders
                a, b = max(0, t - 1), min(1, t)
                canvas.line([(x + a * sx, y + (t - a) * sy), (x + b * sx, y + (t - b) * sy)], (*COARSE, 110), 2)
            _frame(canvas, (x, y, sx, sy), COARSE)
        else:
            for i in range(k * k):
                _frame(canvas, (x + i % k * sx / k, y + i // k * sy / k, sx / k, sy / k), FINE)
        if state.painted[r, c] != FREE:
            canvas.ellipse([x + 8, y + 8, x + 22, y + 22], "white", "black", 2)
    return Image.alpha_composite(panel.convert("RGBA"), veil).convert("RGB")


def pixels_panel(state: State) -> Image.Image:
    """What the tokens hold: coarse regions at 1 / k of the resolution, as the average that the tokenizer takes."""
    return _enlarged(Image.fromarray(as_the_model_sees(state)))


def classes_panel(state: State) -> Image.Image:
    """The most probable classes; the true one, where it is known, is underlined."""
    look, top = state.look, np.argsort(-state.probabilities, kind="stable")[:6]
    width, height = _enlarged(look.shot.image).size
    panel = Image.new("RGB", (width, max(height, 330)), "white")
    canvas, step = ImageDraw.Draw(panel), max(height, 330) / 6
    for row, i in enumerate(top):
        y, p, name = row * step + step / 2, float(state.probabilities[i]), look.subject.classes[i]
        while canvas.textlength(name, font(24)) > width - 110:
            name = name[:-2].rstrip() + "…"
        canvas.text((4, y - 4), name, INK, font(24), anchor="ls")
        canvas.text((width - 4, y - 4), f"{p:.1%}", INK, font(24), anchor="rs")
        if look.subject.classes[i] == look.shot.truth:
            canvas.line([(4, y + 1), (4 + canvas.textlength(name, font(24)), y + 1)], INK, 2)
        canvas.rectangle([4, y + 6, width - 4, y + 20], (235, 235, 235))
        canvas.rectangle([4, y + 6, 4 + p * (width - 8), y + 20], (0, 114, 178) if row == 0 else (130, 170, 200))
    return panel


PANELS: dict[str, Callable[[State], Image.Image]] = {
    "Picture": picture_panel,
    "Gate: probability of coarse": gate_panel,
    "Mixed-scale tokens": grid_panel,
    "Pixels in the tokens": pixels_panel,
    "Class probabilities": classes_panel,
}
FIXED = (picture_panel,)  # these change with the picture only


# ---- the whole view, for keeping


def caption(state: State) -> list[str]:
    """The view's figures in two lines."""
    n = state.numbers()
    truth = f" (it is {n['truth']})" if n["truth"] else ""
    by_hand = int((state.painted != FREE).sum())
    return [
        f"{n['model']} on {n['picture']}: {n['prediction']} {n['probability']:.1%}{truth}",
        f"{n['tokens']} of {n['dense_tokens']} tokens  ·  {macs_text(n['macs'])} of {macs_text(n['dense_macs'])}, "
        f"{n['macs_share']:.0%} of dense  ·  {n['ms']:.1f} ms, dense {n['dense_ms']:.1f} ms  ·  "
        + cut_text(state.threshold)
        + (f"  ·  {by_hand} regions painted" if by_hand else ""),
    ]


def macs_text(macs: float) -> str:
    """A count of multiply-accumulates with its unit."""
    return f"{macs / 1e9:.2f} GMACs" if macs >= 1e8 else f"{macs / 1e6:.1f} MMACs"


def as_png(states: list[State]) -> bytes:
    """The view as a PNG file: a row of panels for each state."""
    texts, pictures, size = _placed(states)
    sheet = Image.new("RGB", size, "white")
    for x, y, panel in pictures:
        sheet.paste(panel, (x, y))
    canvas = ImageDraw.Draw(sheet)
    for x, y, points, text in texts:
        canvas.text((x, y), text, INK, font(points), anchor="ls")
    return png(sheet)


def as_svg(states: list[State]) -> str:
    """The view as an SVG file, with real text."""
    texts, pictures, (width, height) = _placed(states)
    parts = [
        f'<image x="{x}" y="{y}" width="{p.width}" height="{p.height}" '
        f'href="data:image/png;base64,{base64.b64encode(png(p)).decode()}"/>'
        for x, y, p in pictures
    ]
    parts += [
        f'<text x="{x}" y="{y}" font-size="{points}" fill="#222">{html.escape(t)}</text>' for x, y, points, t in texts
    ]
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="DejaVu Sans, sans-serif"'
    return "\n".join([f"<svg {box}>", '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def save(states: list[State], out: Path, name: str = "", kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Writes the view, and its figures as JSON beside it; without a name they are called by what they show."""
    numbers = [state.numbers() for state in states]
    words = [*(n["model"] for n in numbers), numbers[0]["picture"], f"{numbers[0]['tokens']}-tokens"]
    plain = "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in word) for word in words)
    files = {kind: as_png(states) if kind == "png" else as_svg(states).encode() for kind in kinds}
    files["json"] = (json.dumps(numbers, indent=1) + "\n").encode()
    out.mkdir(parents=True, exist_ok=True)
    paths = {kind: out / f"{name or plain[:120]}.{kind}" for kind in files}
    for kind, data in files.items():
        paths[kind].write_bytes(data)
    return list(paths.values())


def figures_html(state: State) -> str:
    """The figures of a state for the screen."""
    n = state.numbers()
    truth = f"it is {html.escape(n['truth'])}" if n["truth"] else "true class unknown"
    note = f"<br>{html.escape(state.look.subject.note)}" if state.look.subject.note else ""
    parts = [
        f'<b class="msvit-prediction">{html.escape(n["prediction"])} {n["probability"]:.1%}</b> {truth}',
        f'<b class="msvit-tokens">{n["tokens"]}</b> of {n["dense_tokens"]} tokens',
        f"<b>{macs_text(n['macs'])}</b>, {n['macs_share']:.0%} of dense",
        f"<b>{n['ms']:.1f} ms</b>, dense {n['dense_ms']:.1f} ms",
        cut_text(n["threshold"]),
    ]
    title = f"<b>{html.escape(n['model'])}</b> on {html.escape(n['picture'])}{note}<br>"
    return f'<div class="msvit-figures">{title}{"".join(f"<span>{part}</span>" for part in parts)}</div>'


def _placed(states: list[State]) -> tuple[list, list, tuple[int, int]]:
    """Texts (x, y of the baseline, size, text), pictures (x, y, picture) and the size of the whole."""
    gap, y, texts, pictures = 28, 0, [], []
    for state in states:
        first, second = caption(state)
        texts += [(gap, y + 48, 30, first), (gap, y + 86, 24, second)]
        panels = {title: draw(state) for title, draw in PANELS.items()}
        for i, (title, panel) in enumerate(panels.items()):
            x = gap + i * (SIDE + gap)
            texts.append((x, y + 136, 22, title))
            pictures.append((x, y + 150, panel))
        y += 150 + max(panel.height for panel in panels.values()) + gap
    return texts, pictures, (gap + len(PANELS) * (SIDE + gap), y)


# ---- small tools


def png(image: Image.Image) -> bytes:
    """A PNG file, compressed fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as cividis, uint8 `[..., 3]`."""
    at = np.linspace(0, 1, len(CIVIDIS))
    return np.stack([np.interp(values, at, channel) for channel in CIVIDIS.T], -1).round().astype(np.uint8)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has every sign that class names need, from the system or from matplotlib; else PIL's own."""
    spec = find_spec("matplotlib")
    inside = "mpl-data/fonts/ttf/DejaVuSans.ttf"
    places = [Path(root) / inside for root in spec.submodule_search_locations] if spec else []
    for place in ["DejaVuSans.ttf", *map(str, places)]:
        try:
            return ImageFont.truetype(place, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def cut_text(threshold: float) -> str:
    """A threshold, in words."""
    return f"coarse where m > {threshold:.2f}" if 0.01 <= threshold <= 0.99 else f"coarse where m > {threshold:.3g}"


def _enlarged(image: Image.Image, like: tuple[int, int] | None = None) -> Image.Image:
    """At the panels' width, in the proportions of `like`, every pixel a sharp block."""
    width, height = like or image.size
    return image.resize((SIDE, round(SIDE * height / width)), Image.Resampling.NEAREST)


def _frame(canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: tuple[int, ...]):
    """A thin frame just inside of a box, with a dark seam that sets it off from light pixels."""
    x, y, w, h = box
    canvas.rectangle([x, y, x + w - 1, y + h - 1], None, (0, 0, 0, 120), 1)
    canvas.rectangle([x + 1, y + 1, x + w - 2, y + h - 2], None, (*colour, 255), 2)


def _stacked(panels: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), "white")
    y = 0
    for panel in panels:
        whole.paste(panel, (0, y))
        y += panel.height
    return whole
