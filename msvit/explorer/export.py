"""The explorer's view in words, for the screen, and as a whole in one file."""

import base64
import hashlib
import html
import itertools
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

from ..checks import cut, plain
from .drawing import INK, PANEL_WIDTH, font, png
from .painting import UNPAINTED
from .panels import panels_of, threshold_text
from .state import State
from .times import Times

LONGEST_NAME = 120  # bytes of a file's name
# Said where the gated model is the slower one: it has as many steps as a large one, and hardly any work in them.
TOO_SMALL = "no gain on the clock: so small a model spends its time between its matrix products (see msvit bench)"
PANELS_IN_LINE = 6  # of a file; more are put into two lines
CSS = """<style>
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


def prediction_and_truth(numbers: dict) -> tuple[str, str]:
    """Return the prediction, and what is known about it, in a few words each."""
    if "probability" in numbers:
        known = f"it is {numbers['truth']}" if numbers["truth"] else "true class unknown"
        return f"{numbers['prediction']} {numbers['probability']:.1%}", known
    if numbers["accuracy"] is None:
        return f"{len(numbers['prediction'])} classes found", "ground truth unknown"
    return f"{numbers['accuracy']:.1%} of pixels right", f"mean IoU {numbers['miou']:.1%}"


def tokens_text(numbers: dict) -> str:
    """Return how many tokens there were, and how many of them a reducer left, in words."""
    text = f"of {numbers['dense_tokens']} tokens"
    if len(numbers["stages"]) > 1:
        first, last = numbers["stages"][0], numbers["stages"][-1]
        text += f", {numbers['tokens'] - first['tokens'] + last['tokens']} left at block {last['layer']}"
    return text


def caption(state: State) -> list[str]:
    """Return the view's figures in two lines, and the model's note in a third."""
    n = state.numbers()
    by_hand = int((state.painted != UNPAINTED).sum())
    parts = [
        f"{n['tokens']} {tokens_text(n)}",
        f"{macs_text(n['macs'])} of {macs_text(n['dense_macs'])}, {n['macs_share']:.0%} of dense",
        *times_text(state.times),
        threshold_text(state.threshold),
        *([f"{by_hand} regions painted"] if by_hand else []),
    ]
    title = f"{n['model']} on {n['picture']}: " + ", ".join(prediction_and_truth(n))
    return [title, "  ·  ".join(parts), *filter(None, [n["note"]])]


def times_text(times: Times | None) -> list[str]:
    """Return the times in words, medians with their quartiles; nothing where they are not measured."""
    if times is None:
        return []
    one, dense = (f"{t.median:.1f} ({t.low:.1f}–{t.high:.1f})" for t in times)
    return [f"{one} ms, dense {dense} ms"]


def macs_text(macs: float) -> str:
    """Return a count of multiply-accumulates with its unit."""
    return f"{macs / 1e9:.2f} GMACs" if macs >= 1e8 else f"{macs / 1e6:.1f} MMACs"


def as_png(states: list[State]) -> bytes:
    """Return the view as a PNG file: a row of panels for each state."""
    texts, pictures, size = _arranged(states)
    whole = Image.new("RGB", size, "white")
    for x, y, panel in pictures:
        whole.paste(panel, (x, y))
    canvas = ImageDraw.Draw(whole)
    for x, y, points, text in texts:
        canvas.text((x, y), text, INK, font(points), anchor="ls")
    return png(whole)


def as_svg(states: list[State]) -> str:
    """Return the view as an SVG file, with real text."""
    texts, pictures, (width, height) = _arranged(states)
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
    """Write the view, and its figures as JSON beside it; without a name they are called by what they show."""
    files = {kind: as_png(states) if kind == "png" else as_svg(states).encode() for kind in kinds}
    files["json"] = (json.dumps([state.numbers() for state in states], indent=1) + "\n").encode()
    return write_files(out, name or name_of(states), files)


def name_of(states: list[State]) -> str:
    """Return a file's name for what is shown; one that would be too long ends with a hash of the whole."""
    words = [*(s.gated.loaded.name for s in states), states[0].gated.picture.name, f"{states[0].tokens}-tokens"]
    name = "_".join("".join(c if c.isalnum() or c in ".-" else "-" for c in word) for word in words)
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name.encode()) <= LONGEST_NAME else f"{cut(name, LONGEST_NAME - 9)}-{digest}"


def write_files(out: Path, name: str, files: dict[str, bytes]) -> list[Path]:
    """Write files of one name, by their suffixes, and return their paths; where one is there, all get a number."""
    if Path(name).name != name:
        raise ValueError(f"name={name!r} leads out of {out}; use one without /")
    out.mkdir(parents=True, exist_ok=True)
    numbered = (name if k == 1 else f"{name}-{k}" for k in itertools.count(1))
    free = next(stem for stem in numbered if not any((out / f"{stem}.{kind}").exists() for kind in files))
    paths = [out / f"{free}.{kind}" for kind in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    return paths


def figures_html(state: State) -> str:
    """Return the figures of a state for the screen."""
    n = state.numbers()
    predicted, known = map(html.escape, prediction_and_truth(n))
    note = f" · {html.escape(n['note'])}" if n["note"] else ""
    parts = [
        f'<b class="msvit-prediction">{predicted}</b> {known}',
        f'<b class="msvit-tokens">{n["tokens"]}</b> {tokens_text(n)}',
        f"<b>{macs_text(n['macs'])}</b>, {n['macs_share']:.0%} of dense",
        *(times_text(state.times) or ["time: measured at rest"]),
        threshold_text(n["threshold"]),
    ]
    title = f"<b>{html.escape(n['model'])}</b> on {html.escape(n['picture'])}{note}<br>"
    slower = state.times is not None and state.times.gain < 1 and n["macs_share"] < 1
    parts += [TOO_SMALL] if slower else []
    return f'<div class="msvit-figures">{title}{"".join(f"<span>{part}</span>" for part in parts)}</div>'


def _arranged(states: list[State]) -> tuple[list, list, tuple[int, int]]:
    """Return texts (x, y of the baseline, size, text), pictures (x, y, picture) and the size of the whole."""
    gap, y, texts, pictures = 28, 0, [], []
    drawn = [[(title, panel.draw(state)) for title, panel in panels_of(state.gated.loaded).items()] for state in states]
    columns = [len(panels) if len(panels) <= PANELS_IN_LINE else math.ceil(len(panels) / 2) for panels in drawn]
    width = gap + max(columns) * (PANEL_WIDTH + gap)
    for state, panels, across in zip(states, drawn, columns, strict=True):
        y += 10
        for points, text in zip((30, 24, 20), map(plain, caption(state)), strict=False):
            y += 38
            fitting = int(points * (width - 2 * gap) / max(font(points).getlength(text), 1))
            texts.append((gap, y, min(points, fitting), text))
        for start in range(0, len(panels), across):
            line = panels[start : start + across]
            for i, (title, panel) in enumerate(line):
                x = gap + i * (PANEL_WIDTH + gap)
                texts.append((x, y + 50, 22, title))
                pictures.append((x, y + 64, panel))
            y += 64 + max(panel.height for _, panel in line)
        y += gap
    return texts, pictures, (width, y)
